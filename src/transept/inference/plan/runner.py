"""The native core behind the two interfaces of the house: the engine's Runner, and the plain loop's Predictor."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from transept import native
from transept.core.errors import InputError
from transept.core.shapes import Float, Int, Tensor
from transept.inference.engine.runner import Row
from transept.inference.plan.lower import lower
from transept.inference.plan.weights import Weights
from transept.native.binding import PAGE


def cores() -> int:
    """The physical cores this process may use, as far as the system tells; half the logical ones where they come in pairs."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(os.environ.get("TRANSEPT_THREADS", allowed)))


class NativeRunner:
    """Runs steps of a lowered decoder: each row's arithmetic has a fixed order, so a request's bits depend on nothing else in the step."""

    def __init__(
        self, model: nn.Module, weights: Weights, *, pages: int, fast: bool = False, threads: int | None = None, max_rows: int = 256
    ):
        self.program, self.out = lower(model, weights, pages=pages, max_rows=max_rows, fast=fast)
        self.plan = self.program.build(native.Team(threads or cores()))
        self.max_rows = max_rows

    def prepare(self, copies: Sequence[tuple[int, int]], fresh: Sequence[int]) -> None:
        """Copies pages (from, to) in this order; fresh pages need no clearing, since only written columns are read."""
        for source, target in copies:
            for cache in self.program.caches:
                cache.data[target] = cache.data[source]

    def step(self, rows: Sequence[Row]) -> Float[Tensor, "n v"]:
        """Writes the columns of all rows and returns the wanted logits, row after row."""
        parts = [part for batch in _batches(rows, self.max_rows) for part in self._run(batch)]
        return torch.from_numpy(np.concatenate(parts)) if parts else torch.empty(0, self.out.width)

    def _run(self, rows: list[Row]) -> list[np.ndarray]:
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
        self.plan.step(batch)
        return [self.plan.view(self.out, len(select)).copy()] if select else []


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


@dataclass
class State:
    """The cache of one sequence in a NativeModel: its pages and how many columns they hold."""

    owner: NativeModel
    pages: tuple[int, ...]
    length: int = 0

    def __del__(self) -> None:
        self.owner.free.extend(self.pages)


class NativeModel:
    """A lowered decoder as the plain loop wants it: one sequence at a time, only the last column's logits are made."""

    def __init__(self, model: nn.Module, weights: Weights, *, context: int | None, fast: bool = False, threads: int | None = None):
        self.columns = context or 1 << 15
        pages = -(-self.columns // PAGE)
        self.runner = NativeRunner(model, weights, pages=pages, fast=fast, threads=threads)
        self.free = list(range(pages))
        self.device = torch.device("cpu")

    def cache(self, batch: int, capacity: int = 64) -> State:
        """Pages for one sequence of `capacity` columns."""
        wanted = -(-max(capacity, 1) // PAGE)
        if batch != 1:
            raise InputError(f"the native loop runs one sequence at a time, asked for {batch}: use the engine for more")
        if wanted > len(self.free):
            raise InputError(f"{capacity} columns need {wanted} pages of cache, but {len(self.free)} are free")
        taken, self.free = self.free[:wanted], self.free[wanted:]
        return State(self, tuple(taken))

    def hidden(self, ids: Int[Tensor, "1 t"], *, cache: State | None = None) -> Float[Tensor, "1 1 v"]:
        """The logits that follow the ids: `head` leaves them as they are."""
        state = self.cache(1, ids.shape[1]) if cache is None else cache
        row = Row(tuple(ids[0].tolist()), state.length, state.pages, 1)
        logits = self.runner.step([row])
        state.length += ids.shape[1]
        return logits[None]

    def head(self, states: Float[Tensor, "b v"]) -> Float[Tensor, "b v"]:
        """The logits, which are made already."""
        return states
