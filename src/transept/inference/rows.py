"""What a step computes of one sequence, and who computes steps: the words that the engine and every executor share. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True)
class Row:
    """The part of one sequence in a step: `tokens` from position `start` on, its page table, and for how many of the last of them logits
    are wanted.
    """

    tokens: tuple[int, ...]
    start: int
    pages: tuple[int, ...]
    logits: int


@runtime_checkable
class Runner(Protocol):
    """Computes steps. The rows of a step are independent: any subset may be computed again, and gives the same."""

    def prepare(self, copies: Sequence[tuple[int, int]], fresh: Sequence[int]) -> None:
        """Copies pages (from, to) in this order, then clears the fresh ones."""
        ...

    def step(self, rows: Sequence[Row]) -> Any:
        """Writes the columns of all rows and returns the wanted logits [n v], row after row, as an array or a tensor. The next step may
        write over them.
        """
        ...
