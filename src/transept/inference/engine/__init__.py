"""Many requests at once on one model: scheduler, page table, runner, and the engine that joins them (rows 82c-82e).

The names are found when they are first used: on the native core the engine runs without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transept.inference.engine.engine import Ask, Engine, Event, Handle, RequestError
    from transept.inference.engine.front import AsyncEngine, Busy, Stream
    from transept.inference.engine.grammar import Grammar, GrammarCompiler
    from transept.inference.engine.local import Local
    from transept.inference.engine.runner import TorchRunner
    from transept.inference.engine.scheduler import Limits
    from transept.inference.engine.speculate import Draft, Drafter, Lookup
    from transept.inference.rows import Row, Runner

__all__ = [
    "Ask",
    "AsyncEngine",
    "Busy",
    "Draft",
    "Drafter",
    "Engine",
    "Event",
    "Grammar",
    "GrammarCompiler",
    "Handle",
    "Limits",
    "Local",
    "Lookup",
    "RequestError",
    "Row",
    "Runner",
    "Stream",
    "TorchRunner",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    from transept.inference.engine import engine, front, grammar, local, runner, scheduler, speculate

    return next(getattr(m, name) for m in (engine, front, grammar, local, runner, scheduler, speculate) if hasattr(m, name))
