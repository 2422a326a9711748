"""Transept: the transformer family on one small set of shared blocks.

The public door is here; importing it loads no torch, each name is found when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transept.compiled import load as load
    from transept.compiled import save as save
    from transept.door import Model as Model
    from transept.inspection.watch import watch as watch
    from transept.inspection.watch import watchable as watchable

__version__ = "0.1.0"
_DOORS = {"load": "transept.compiled", "save": "transept.compiled", "Model": "transept.door",
          "watch": "transept.inspection.watch", "watchable": "transept.inspection.watch"}  # fmt: skip
__all__ = ["Model", "__version__", "load", "save", "watch", "watchable"]


def __getattr__(name: str) -> Any:
    if name in _DOORS:
        return getattr(importlib.import_module(_DOORS[name]), name)
    raise AttributeError(f"module 'transept' has no attribute {name!r}; it has {', '.join(__all__)}")
