"""Guessing the next tokens so that one step may confirm several; what is not what plain decoding would choose is thrown away, so nothing
is lost.

(Leviathan et al. 2022, arXiv 2211.17192; looking the guess up in the text itself: Saxena 2023.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable


@runtime_checkable
class Drafter(Protocol):
    """Guesses for one sequence; `push` is told every token of it, the prompt's first."""

    def push(self, tokens: Sequence[int]) -> None:
        """These tokens follow."""
        ...

    def propose(self) -> tuple[int, ...]:
        """What may come next; empty for no guess."""
        ...

    def judged(self, proposed: int, accepted: int) -> None:
        """So many of the guessed tokens were right."""
        ...


class Lookup:
    """Guesses that what followed the latest three tokens the last time follows them again.

    The guess doubles when it was right throughout and halves when less than half of it was; after three misses in a row it pauses, each
    time for twice as many tokens.
    """

    GRAM = 3
    MISSES = 3

    def __init__(self, most: int = 8):
        self.most, self.length = most, min(3, most)
        self.tokens: list[int] = []
        self.after: dict[tuple[int, ...], int] = {}
        self.misses, self.pause, self.resume = 0, 16, 0
        self.proposed = self.accepted = 0

    def push(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            # The latest run of tokens is entered only when its follower is known, so that it never finds itself.
            if len(self.tokens) >= self.GRAM:
                self.after[tuple(self.tokens[-self.GRAM :])] = len(self.tokens)
            self.tokens.append(token)

    def propose(self) -> tuple[int, ...]:
        if len(self.tokens) < self.resume:
            return ()
        at = self.after.get(tuple(self.tokens[-self.GRAM :]))
        return () if at is None else tuple(self.tokens[at : at + self.length])

    def judged(self, proposed: int, accepted: int) -> None:
        self.proposed += proposed
        self.accepted += accepted
        if accepted == proposed:
            self.length = min(2 * self.length, self.most)
        elif 2 * accepted < proposed:
            self.length = max(1, self.length // 2)
        self.misses = 0 if accepted else self.misses + 1
        if self.misses >= self.MISSES:
            self.misses, self.resume, self.pause = 0, len(self.tokens) + self.pause, min(2 * self.pause, 1024)
        elif accepted:
            self.pause = 16
