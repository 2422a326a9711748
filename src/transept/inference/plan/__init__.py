"""A finished model becomes a flat plan of a dozen operations, run by the native core: one call a step.

The names are found when they are first used: a plan that was kept in a file runs without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transept.inference.plan.lower import NotLowered
    from transept.inference.plan.runner import NativeEncoder, NativeModel, NativeRunner
    from transept.inference.plan.source import Lowerable
    from transept.inference.plan.weights import ModuleWeights, StoredWeights, Weights

_HOMES = {
    "Lowerable": "source",
    "ModuleWeights": "weights",
    "NativeEncoder": "runner",
    "NativeModel": "runner",
    "NativeRunner": "runner",
    "NotLowered": "lower",
    "StoredWeights": "weights",
    "Weights": "weights",
}
__all__ = ["Lowerable", "ModuleWeights", "NativeEncoder", "NativeModel", "NativeRunner", "NotLowered", "StoredWeights", "Weights"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"transept.inference.plan.{_HOMES[name]}"), name)
