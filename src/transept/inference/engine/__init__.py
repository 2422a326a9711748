"""Many requests at once on one model: scheduler, page table, runner, and the engine that joins them (rows 82c-82e)."""

from __future__ import annotations

from transept.inference.engine.engine import Ask, Engine, Event, Handle, RequestError
from transept.inference.engine.front import AsyncEngine, Busy, Stream
from transept.inference.engine.grammar import Grammar, GrammarCompiler
from transept.inference.engine.runner import Row, Runner, TorchRunner
from transept.inference.engine.scheduler import Limits
from transept.inference.engine.speculate import Drafter, Lookup

__all__ = [
    "Ask",
    "AsyncEngine",
    "Busy",
    "Drafter",
    "Engine",
    "Event",
    "Grammar",
    "GrammarCompiler",
    "Handle",
    "Limits",
    "Lookup",
    "RequestError",
    "Row",
    "Runner",
    "Stream",
    "TorchRunner",
]
