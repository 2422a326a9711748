"""A finished model becomes a flat plan of a dozen operations, run by the native core: one call a step.

The names are found when they are first used: a plan that was kept in a file runs without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transept.inference.plan.lower import NotLowered
    from transept.inference.plan.runner import NativeEncoder, NativeModel, NativeRunner
    from transept.inference.plan.source import Lowerable
    from transept.inference.plan.weights import ModuleWeights, StoredWeights, Weights

__all__ = ["Lowerable", "ModuleWeights", "NativeEncoder", "NativeModel", "NativeRunner", "NotLowered", "StoredWeights", "Weights"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    from transept.inference.plan import lower, runner, source, weights

    return next(getattr(module, name) for module in (source, weights, runner, lower) if hasattr(module, name))
