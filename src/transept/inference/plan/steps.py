"""Runs the steps of a lowered decoder for its engine and for the plain loop. Needs numpy only, never torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transept import native
from transept.core.errors import InputError
from transept.inference.engine.engine import Ask
from transept.inference.engine.local import Local
from transept.inference.generation import Detokenizer, Piece
from transept.inference.rows import Row
from transept.native.binding import PAGE


def cores() -> int:
    """The logical cores this process may use, or $TRANSEPT_THREADS."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(os.environ.get("TRANSEPT_THREADS", allowed)))


def pages_of(context: int | None) -> int:
    """How many pages one sequence of the whole context takes; a cache has one more, page 0, which belongs to nobody."""
    return -(-(context or 1 << 15) // PAGE)


class Steps:
    """Runs steps of a program: each row's arithmetic has a fixed order, so a request's bits depend on nothing else in the step."""

    def __init__(self, program: native.Program, out: native.View, *, threads: int | None = None):
        self.program, self.out, self.max_rows = program, out, program.max_rows
        self.plan = program.build(native.Team(threads or cores()))
        self.singles: native.Batch | None = None
        self.table = np.empty((0, 0), np.int32)

    def prepare(self, copies: Sequence[tuple[int, int]], fresh: Sequence[int]) -> None:
        """Copies pages (from, to) in this order; fresh pages need no clearing, since only written columns are read."""
        for source, target in copies:
            for cache in self.program.caches:
                cache.data[target] = cache.data[source]

    def run(self, rows: Sequence[Row], seconds: NDArray[np.float64] | None = None) -> NDArray[np.float32]:
        """Writes the columns of all rows and returns the wanted logits [n v], row after row; `seconds` [records] sums up their time."""
        parts = [self._run(batch, seconds).copy() for batch in _batches(rows, self.max_rows)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.empty((0, self.out.width), np.float32)

    def step(self, rows: Sequence[Row]) -> Any:
        """The same without a copy where one batch holds all: what the engine asks of a Runner."""
        return self._run(rows, None) if sum(len(row.tokens) for row in rows) <= self.max_rows else self.run(rows)

    def _run(self, rows: Sequence[Row], seconds: NDArray[np.float64] | None) -> NDArray[np.float32]:
        single = all(len(row.tokens) == 1 == row.logits for row in rows)
        batch, wanted = (self._next(rows), len(rows)) if single else self._described(rows)
        taken = None if seconds is None else np.zeros_like(seconds)
        self.plan.step(batch, taken)
        if seconds is not None and taken is not None:
            seconds += taken
        return self.plan.view(self.out, wanted)

    def _next(self, rows: Sequence[Row]) -> native.Batch:
        """One token of each row: the step before with other numbers, so it is not described anew, which takes as long as a layer."""
        longest = max(len(row.pages) for row in rows)
        if self.singles is None or self.table.shape[0] != len(rows) or self.table.shape[1] < longest:
            self.table, each = np.zeros((len(rows), 2 * longest), np.int32), np.arange(len(rows), dtype=np.int32)
            self.singles = native.Batch(np.zeros_like(each), each, np.zeros_like(each), tables=self.table, select=each)
        for line, row in zip(self.table, rows, strict=True):
            line[: len(row.pages)] = row.pages
        self.singles.move([row.tokens[0] for row in rows], [row.start for row in rows])
        return self.singles

    def _described(self, rows: Sequence[Row]) -> tuple[native.Batch, int]:
        """Any step, and how many logits it gives."""
        sizes = [len(row.tokens) for row in rows]
        table = np.zeros((len(rows), max(len(row.pages) for row in rows)), np.int32)
        for i, row in enumerate(rows):
            table[i, : len(row.pages)] = row.pages
        ends = np.cumsum(sizes)
        select = [at for end, row in zip(ends, rows, strict=True) for at in range(end - row.logits, end)]
        batch = native.Batch(
            [token for row in rows for token in row.tokens],
            np.repeat(np.arange(len(rows)), sizes),
            np.concatenate([np.arange(row.start, row.start + n) for row, n in zip(rows, sizes, strict=True)]),
            tables=table,
            select=select or None,
        )
        return batch, len(select)


def _batches(rows: Sequence[Row], most: int) -> list[list[Row]]:
    """The rows in groups of at most `most` tokens; a longer row is cut, its logits at its end."""
    batches: list[list[Row]] = [[]]
    room = most
    for row in rows:
        start, tokens = row.start, row.tokens
        while tokens:
            # Wanted logits are not torn apart: they lie in the row's last piece.
            if room == 0 or (len(tokens) > room and len(tokens) - room < row.logits):
                batches.append([])
                room = most
            piece, tokens = tokens[:room], tokens[room:]
            batches[-1].append(Row(piece, start, row.pages, 0 if tokens else row.logits))
            start, room = start + len(piece), room - len(piece)
    return [batch for batch in batches if batch]


class Loop:
    """A lowered decoder: `stream` runs in its engine, `cache` and `advance` are what the plain loop asks of a model."""

    def __init__(self, runner: Steps, *, context: int | None):
        self.runner, self.local = runner, Local(runner, pages=pages_of(context), page=PAGE, context=context)

    def stream(self, ask: Ask, tokenizer: Callable[[], Detokenizer] | None = None) -> Iterator[Piece]:
        """The pieces of a continuation, made by the engine; others may be read meanwhile."""
        return self.local.stream(ask, tokenizer)

    def cache(self, batch: int, capacity: int = 64) -> State:
        """Pages for one sequence of `capacity` columns."""
        if batch != 1:
            raise InputError(f"the native loop runs one sequence at a time, asked for {batch}: use the engine for more")
        return State(self.local, self.local.reserve(max(capacity, 1)))

    def advance(self, state: State, ids: Sequence[int]) -> NDArray[np.float32]:
        """The logits [v] that follow these tokens of the sequence."""
        logits = self.runner.run([Row(tuple(ids), state.length, state.pages, 1)])
        state.length += len(ids)
        return logits[0]


@dataclass
class State:
    """The cache of one sequence: its pages and how many columns they hold."""

    owner: Local
    pages: tuple[int, ...]
    length: int = 0

    def __del__(self) -> None:
        self.owner.release(self.pages)
