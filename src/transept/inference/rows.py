"""What a step computes of one sequence: the word that the engine and every executor share. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """The part of one sequence in a step: `tokens` from position `start` on, its page table, and for how many of the last of them logits
    are wanted.
    """

    tokens: tuple[int, ...]
    start: int
    pages: tuple[int, ...]
    logits: int
