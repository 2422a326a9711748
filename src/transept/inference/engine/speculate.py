"""Guessing the next tokens so that one step may confirm several; what is not what plain decoding would choose is thrown away, so nothing
is lost.

(Leviathan et al. 2022, arXiv 2211.17192; looking the guess up in the text itself: Saxena 2023.)
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from transept.core.errors import InputError

MOST = 8
"""Tokens of a guess."""


@runtime_checkable
class Drafter(Protocol):
    """Guesses for one sequence; `push` is told every token of it, the prompt's first."""

    def push(self, tokens: Sequence[int]) -> None:
        """These tokens follow."""
        ...

    def propose(self, costs: Sequence[float], step: float) -> tuple[int, ...]:
        """What may come next; empty for no guess. A guess of n tokens costs `costs[n]` of what a token costs without guessing, which is
        `step` seconds.
        """
        ...

    def judged(self, proposed: int, accepted: int) -> None:
        """So many of the guessed tokens were right."""
        ...


class Clock:
    """What further rows cost: the mean seconds of late steps of each number of rows, and where none was seen the line a + b n through
    those that were.
    """

    KEEP = 0.95
    COST = 0.25
    """Of one row more beside one, believed until steps of different sizes were seen."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[float, float]] = {}

    def seen(self, rows: int, seconds: float) -> None:
        """A step of so many rows took so long."""
        weight, total = self.known.get(rows, (0.0, 0.0))
        self.known[rows] = (self.KEEP * weight + 1.0, self.KEEP * total + seconds)

    def step(self, rows: int) -> float:
        """Seconds of a step of so many rows; 0 where no step was seen yet."""
        if not self.known:
            return 0.0
        # One step alone may have been held up by anything.
        if rows in self.known and self.known[rows][0] > 1.5:
            weight, total = self.known[rows]
            return total / weight
        points = [(min(weight, 8.0), n, total / weight) for n, (weight, total) in self.known.items()]
        mass = sum(w for w, _, _ in points)
        n, t = (sum(p[0] * p[i] for p in points) / mass for i in (1, 2))
        spread = sum(w * (x - n) ** 2 for w, x, _ in points)
        slope = sum(w * (x - n) * (y - t) for w, x, y in points) / spread if spread else self.COST * t / (1 + self.COST * (n - 1))
        return max(0.0, t + slope * (rows - n))

    def costs(self, rows: int, most: int) -> list[float]:
        """0 to `most` rows more, each beside the mean of `rows` rows."""
        base = self.step(rows)
        if base <= 0.0:
            return [self.COST * n for n in range(most + 1)]
        return [max(0.0, self.step(rows + n) / base - 1.0) * rows for n in range(most + 1)]


class Pace:
    """How many tokens to guess: as many as pay for themselves at the share that was right of late; where none do, nothing for a while,
    each time twice as long.
    """

    KEEP = 0.9
    PAUSE = 64
    LONGEST = 4096

    def __init__(self, most: int):
        self.most, self.right, self.tried = most, 2.0, 3.0
        self.pause, self.resume = self.PAUSE, 0

    def length(self, at: int, costs: Sequence[float], own: float = 0.0) -> int:
        """Tokens to guess behind `at` others where n of them cost `costs[n]` in the step and each of them `own` before it, both as parts of
        what a token costs.
        """
        if at < self.resume or costs[1] + own >= 1.0:
            return 0
        share, gain, best, length = self.right / self.tried, 1.0, 1.0, 0
        for n in range(1, min(self.most + 1, len(costs))):
            gain += share**n
            if gain / (1.0 + costs[n] + n * own) > best:
                best, length = gain / (1.0 + costs[n] + n * own), n
        if not length:
            # After the pause one guess decides anew.
            self.resume, self.pause = at + self.pause, min(2 * self.pause, self.LONGEST)
            self.right, self.tried = 0.5, 1.0
        return length

    def judged(self, proposed: int, accepted: int) -> None:
        """So many of the guessed tokens were right: those behind the first wrong one say nothing."""
        self.right = self.KEEP * self.right + accepted
        self.tried = self.KEEP * self.tried + min(accepted + 1, proposed)
        if accepted == proposed:
            self.pause = self.PAUSE


class Lookup:
    """Guesses that what followed the latest three tokens the last time follows them again."""

    GRAM = 3

    def __init__(self, most: int = MOST):
        self.pace = Pace(most)
        self.tokens: list[int] = []
        self.after: dict[tuple[int, ...], int] = {}

    def push(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            # The latest run of tokens is entered only when its follower is known, so that it never finds itself.
            if len(self.tokens) >= self.GRAM:
                self.after[tuple(self.tokens[-self.GRAM :])] = len(self.tokens)
            self.tokens.append(token)

    def propose(self, costs: Sequence[float], step: float) -> tuple[int, ...]:
        at = self.after.get(tuple(self.tokens[-self.GRAM :]))
        return () if at is None else tuple(self.tokens[at : at + self.pace.length(len(self.tokens), costs)])

    def judged(self, proposed: int, accepted: int) -> None:
        self.pace.judged(proposed, accepted)


class Draft:
    """Guesses what a smaller lowered decoder of the same vocabulary would write greedily; `capacity` is its longest sequence."""

    def __init__(self, model: Any, capacity: int, most: int = 5):
        self.model, self.capacity, self.pace = model, capacity, Pace(most)
        self.tokens: list[int] = []
        self.guess: list[int] = []
        self.state: Any = None
        self.seconds = 0.0

    def push(self, tokens: Sequence[int]) -> None:
        # Columns of guesses that were wrong are written anew.
        if self.state is not None:
            self.state.length = min(self.state.length, len(self.tokens) + self._agreed(tokens))
        self.tokens, self.guess = [*self.tokens, *tokens], []

    def propose(self, costs: Sequence[float], step: float) -> tuple[int, ...]:
        # Before it reads the whole prompt, two tokens tell what it costs.
        if not step or not self._begun():
            return ()
        length = min(self.pace.length(len(self.tokens), costs, self.seconds / step), self.capacity - len(self.tokens))
        if length < 1:
            return ()
        self.guess, self.state.length = [], min(self.state.length, len(self.tokens) - 1)
        fresh = self.tokens[self.state.length :]
        for _ in range(length):
            self.guess.append(int(self._advance(fresh).argmax()))
            fresh = self.guess[-1:]
        return tuple(self.guess)

    def judged(self, proposed: int, accepted: int) -> None:
        self.pace.judged(proposed, accepted)

    def _agreed(self, tokens: Sequence[int]) -> int:
        pairs = enumerate(zip(tokens, self.guess, strict=False))
        return next((i for i, (token, guessed) in pairs if token != guessed), min(len(tokens), len(self.guess)))

    def _begun(self) -> bool:
        if self.state is None:
            try:
                self.state = self.model.cache(1, self.capacity)
            except InputError:
                # Others hold its pages: decoding goes on without guesses.
                return False
            for token in self.tokens[:2]:
                self.seconds = 0.0
                self._advance([token])
        return True

    def _advance(self, tokens: Sequence[int]) -> Any:
        began = time.perf_counter()
        logits = self.model.advance(self.state, tokens)
        if len(tokens) == 1:
            spent = time.perf_counter() - began
            self.seconds = 0.8 * self.seconds + 0.2 * spent if self.seconds else spent
        return logits
