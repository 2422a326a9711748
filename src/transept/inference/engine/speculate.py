"""Guessing the next tokens so that one step may confirm several; what is not what plain decoding would choose is thrown away, so nothing
is lost.

(Leviathan et al. 2022, arXiv 2211.17192; looking the guess up in the text itself: Saxena 2023.)
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from transept.core.errors import InputError


@runtime_checkable
class Drafter(Protocol):
    """Guesses for one sequence; `push` is told every token of it, the prompt's first."""

    def push(self, tokens: Sequence[int]) -> None:
        """These tokens follow."""
        ...

    def propose(self, cost: float, step: float) -> tuple[int, ...]:
        """What may come next; empty for no guess. A guessed token costs `cost` of what a token costs without guessing, which is `step`
        seconds.
        """
        ...

    def judged(self, proposed: int, accepted: int) -> None:
        """So many of the guessed tokens were right."""
        ...


class Clock:
    """What a further row costs: steps of n rows are taken to last a + b n seconds, fitted to those of the last while."""

    KEEP = 0.97
    COST = 0.3
    """Believed until steps of different sizes were seen."""

    def __init__(self) -> None:
        self.sums = (0.0, 0.0, 0.0, 0.0, 0.0)

    def seen(self, rows: int, seconds: float) -> None:
        """A step of so many rows took so long."""
        new = (1.0, rows, rows * rows, seconds, rows * seconds)
        self.sums = tuple(self.KEEP * old + value for old, value in zip(self.sums, new, strict=True))

    def cost(self, rows: int) -> float:
        """One more row, beside the mean of `rows` rows."""
        weight, n, nn, t, nt = self.sums
        spread = weight * nn - n * n
        if spread <= 0.01 * weight * weight:
            return self.COST
        slope = (weight * nt - n * t) / spread
        mean = (t / weight - slope * n / weight) / rows + slope
        return min(1.0, max(0.02, slope / mean)) if mean > 0 else self.COST

    def step(self, rows: int) -> float:
        """Seconds of each of `rows` rows, so far as they are known."""
        weight, n, _, t, _ = self.sums
        return t / n if n else 0.0


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

    def length(self, at: int, cost: float, own: float = 0.0) -> int:
        """Tokens to guess behind `at` others, each at this cost in the step and at `own` before it; both as parts of a plain step."""
        if at < self.resume:
            return 0
        share, gain, best, length = self.right / self.tried, 1.0, 1.0, 0
        for n in range(1, self.most + 1):
            gain += share**n
            if gain / (1.0 + n * (cost + own)) > best:
                best, length = gain / (1.0 + n * (cost + own)), n
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

    def __init__(self, most: int = 8):
        self.pace = Pace(most)
        self.tokens: list[int] = []
        self.after: dict[tuple[int, ...], int] = {}

    def push(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            # The latest run of tokens is entered only when its follower is known, so that it never finds itself.
            if len(self.tokens) >= self.GRAM:
                self.after[tuple(self.tokens[-self.GRAM :])] = len(self.tokens)
            self.tokens.append(token)

    def propose(self, cost: float, step: float) -> tuple[int, ...]:
        at = self.after.get(tuple(self.tokens[-self.GRAM :]))
        return () if at is None else tuple(self.tokens[at : at + self.pace.length(len(self.tokens), cost)])

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

    def propose(self, cost: float, step: float) -> tuple[int, ...]:
        own = self.seconds / step if step else 0.0
        length = min(self.pace.length(len(self.tokens), cost, own), self.capacity - len(self.tokens))
        if length < 1 or not self._begun():
            return ()
        fresh = self.tokens[self.state.length :]
        for _ in range(length):
            began = time.perf_counter()
            token = int(self.model.advance(self.state, fresh).argmax())
            if len(fresh) == 1:
                spent = time.perf_counter() - began
                self.seconds = 0.8 * self.seconds + 0.2 * spent if self.seconds else spent
            fresh = [token]
            self.guess.append(token)
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
        return True
