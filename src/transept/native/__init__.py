"""The native core: runs a whole plan step in one call with its own threads. Imports numpy and the core floor only, never torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transept.native.binding import (
        Batch,
        Cache,
        Plan,
        Program,
        Raw,
        Team,
        View,
        Weight,
        exp_sum,
        gated_bias,
        pack,
        packed_bytes,
        raw,
        vector,
    )
    from transept.native.library import available, isa, why_not

__all__ = [
    "Batch",
    "Cache",
    "Plan",
    "Program",
    "Raw",
    "Team",
    "View",
    "Weight",
    "available",
    "exp_sum",
    "gated_bias",
    "isa",
    "pack",
    "packed_bytes",
    "raw",
    "vector",
    "why_not",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from transept.native import binding, library

        # Kept, so that the next look does not come here.
        found = globals()[name] = getattr(library if name in ("available", "isa", "why_not") else binding, name)
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
