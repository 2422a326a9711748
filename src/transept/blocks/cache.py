"""Caches are arguments: one slot per layer and branch, `append` gives back everything that may be attended to (rows 82c, 82d)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from transept.core.errors import InputError
from transept.core.shapes import Float, Int, Tensor
from transept.ops.masks import Positions


@runtime_checkable
class Slot(Protocol):
    """One layer's part of a cache."""

    def append(
        self, k: Float[Tensor, "b k t e"], v: Float[Tensor, "b k t f"], positions: Positions
    ) -> tuple[Float[Tensor, "b k s e"], Float[Tensor, "b k s f"]]:
        """Takes in the keys and values of t new columns; returns those of the latest s >= t columns, the new ones last."""
        ...

    def reorder(self, rows: Int[Tensor, "c"]) -> None:
        """Row i becomes what row rows[i] was (beam search)."""
        ...

    def truncate(self, length: int) -> None:
        """Forgets every column from `length` on."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that the slot holds."""
        ...


@dataclass(frozen=True)
class Room:
    """How much a cache is made for: batch rows, columns, and where its numbers live."""

    batch: int
    capacity: int
    dtype: torch.dtype
    device: torch.device


class Dense:
    """Keeps every column, in one buffer that doubles when it is full.

    Latent attention uses it with one head: k is c^KV and v is k^R (eq. 37-47 of arXiv 2412.19437), so these two are all that is kept.
    """

    def __init__(self, room: Room, heads: int, k_width: int, v_width: int):
        self.k = torch.empty(room.batch, heads, room.capacity, k_width, dtype=room.dtype, device=room.device)
        self.v = torch.empty(room.batch, heads, room.capacity, v_width, dtype=room.dtype, device=room.device)
        self.length = 0

    def append(self, k: Tensor, v: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        end = self.length + k.shape[2]
        if end > self.k.shape[2]:
            self.k, self.v = (_grown(x, max(end, 2 * x.shape[2]), self.length) for x in (self.k, self.v))
        self.k[:, :, self.length : end] = k
        self.v[:, :, self.length : end] = v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]

    def reorder(self, rows: Tensor) -> None:
        self.k, self.v = self.k[rows], self.v[rows]

    def truncate(self, length: int) -> None:
        self.length = min(self.length, length)

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes


class Ring:
    """Keeps the latest `window` columns only: what a sliding window can still see.

    Where the rows of a batch are padded a column is no longer a position, so then nothing is dropped.
    """

    def __init__(self, room: Room, heads: int, k_width: int, v_width: int, window: int):
        self.window = window
        self.k = torch.empty(room.batch, heads, 0, k_width, dtype=room.dtype, device=room.device)
        self.v = torch.empty(room.batch, heads, 0, v_width, dtype=room.dtype, device=room.device)
        self.seen = 0

    def append(self, k: Tensor, v: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        k, v = torch.cat((self.k, k), 2), torch.cat((self.v, v), 2)
        self.seen += len(positions)
        kept = k.shape[2] if positions.first is None else min(self.window, k.shape[2])
        self.k, self.v = k[:, :, k.shape[2] - kept :], v[:, :, v.shape[2] - kept :]
        return k, v

    def reorder(self, rows: Tensor) -> None:
        self.k, self.v = self.k[rows], self.v[rows]

    def check(self, length: int) -> None:
        """Refuses a length to which it cannot go back, because columns were dropped."""
        if length < self.seen and self.seen > self.k.shape[2]:
            raise InputError(f"a ring cache of {self.window} columns cannot go back from {self.seen} columns to {length}")

    def truncate(self, length: int) -> None:
        self.check(length)
        dropped = max(0, self.seen - length)
        kept = self.k.shape[2] - dropped
        self.k, self.v, self.seen = self.k[:, :, :kept], self.v[:, :, :kept], self.seen - dropped

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes


@dataclass(frozen=True)
class Memory:
    """What cross-attention looks at: `states` and where they stand, and the `source` they were made of.

    Its batch is 1 where every row of a call looks at the same.
    """

    states: Float[Tensor, "b s d"]
    positions: Positions
    source: Tensor | None = None

    def __len__(self) -> int:
        return self.states.shape[0]

    def rows(self, rows: Int[Tensor, "c"]) -> Memory:
        """Row i is what row rows[i] was."""
        where = self.positions if self.positions.first is not None else Positions(chosen(self.positions.index, rows), None)
        return Memory(chosen(self.states, rows), where, None if self.source is None else chosen(self.source, rows))


class Cross:
    """Keeps the keys and values of a memory: made once, the same for every step; one row serves all where there is but one (row 18)."""

    def __init__(self, room: Room, heads: int, k_width: int, v_width: int):
        self.k = torch.empty(room.batch, heads, 0, k_width, dtype=room.dtype, device=room.device)
        self.v = torch.empty(room.batch, heads, 0, v_width, dtype=room.dtype, device=room.device)

    @property
    def empty(self) -> bool:
        """True until the memory has been read."""
        return self.k.shape[2] == 0

    def append(self, k: Tensor, v: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        if not self.empty:
            raise InputError("this cache holds a memory already; a new source needs a new cache")
        self.k, self.v = k, v
        return k, v

    def reorder(self, rows: Tensor) -> None:
        self.k, self.v = chosen(self.k, rows), chosen(self.v, rows)

    def truncate(self, length: int) -> None:
        """Nothing: a memory is not part of what was generated."""

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes


class Cache:
    """All slots of a model, the positions of the columns seen so far, and the memory of an encoder-decoder."""

    def __init__(self, slots: Sequence[Mapping[str, Slot]], batch: int):
        self.slots = slots
        self.batch = batch
        self.positions: Positions | None = None
        self.memory: Memory | None = None

    @property
    def length(self) -> int:
        """How many columns were seen."""
        return 0 if self.positions is None else len(self.positions)

    def next(self) -> int | Tensor:
        """The position that follows: one number, or one per row [b] where rows differ."""
        if self.positions is None:
            return 0
        if self.positions.first is not None:
            return self.positions.first + len(self.positions)
        return self.positions.index.amax(1) + 1

    def extend(self, new: Positions) -> Positions:
        """The positions of all columns, the new ones last."""
        old = self.positions
        if old is None:
            self.positions = new
        elif old.first is not None and new.first == old.first + len(old):
            self.positions = Positions.span(old.first, len(old) + len(new), new.index.device)
        else:
            rows = max(old.index.shape[0], new.index.shape[0], self.batch)
            self.positions = Positions(torch.cat((old.index.expand(rows, -1), new.index.expand(rows, -1)), 1), None)
        return self.positions

    def reorder(self, rows: Int[Tensor, "c"]) -> None:
        """Row i becomes what row rows[i] was."""
        for slot in self._all():
            slot.reorder(rows)
        self.batch = len(rows)
        if self.positions is not None and self.positions.first is None:
            self.positions = Positions(self.positions.index[rows], None)
        if self.memory is not None:
            self.memory = self.memory.rows(rows)

    def truncate(self, length: int) -> None:
        """Forgets every column from `length` on; InputError, and nothing is changed, where a slot has dropped what it would need."""
        for slot in self._all():
            if isinstance(slot, Ring):
                slot.check(length)
        for slot in self._all():
            slot.truncate(length)
        if self.positions is not None:
            self.positions = Positions(self.positions.index[:, :length], self.positions.first) if length else None

    @property
    def nbytes(self) -> int:
        """Bytes that all slots hold."""
        return sum(slot.nbytes for slot in self._all())

    def _all(self) -> list[Slot]:
        return [slot for slots in self.slots for slot in slots.values()]


def chosen(x: Tensor, rows: Int[Tensor, "c"]) -> Tensor:
    """The rows of x [b ...] in that order; a single row stands for all."""
    return x if x.shape[0] == 1 else x[rows]


def _grown(x: Tensor, capacity: int, length: int) -> Tensor:
    wider = x.new_empty(*x.shape[:2], capacity, x.shape[3])
    wider[:, :, :length] = x[:, :, :length]
    return wider
