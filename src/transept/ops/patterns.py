"""The sparse patterns of the field as rules of the mask algebra (rows 43, 47-49): combs, fixed summaries, dilated windows, random
blocks.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch

from transept.core.shapes import Bool, Int, Tensor
from transept.ops.masks import PAD, Columns, Full, Mask, Spans, Window


@dataclass(frozen=True)
class Every(Mask):
    """A comb: queries see keys whose distance is a multiple of `step`; counted in steps, `inner` says which of those."""

    step: int
    inner: Mask = Full()

    def allow(self, q: Tensor, k: Tensor) -> Tensor:
        inside = self.inner.allow(q // self.step, k // self.step)
        return ((q - k) % self.step == 0) & inside

    def period(self) -> int:
        return self.step * self.inner.period()


@dataclass(frozen=True)
class Segment(Mask):
    """Queries see the keys of their own segment of `size` positions (Child et al. 2019, section 4.3, A^(1) of "fixed")."""

    size: int

    def allow(self, q: Tensor, k: Tensor) -> Tensor:
        return q // self.size == k // self.size

    def blocks(self, q: Spans, k: Spans) -> Tensor:
        low = torch.maximum(q.low[:, None] // self.size, k.low // self.size)
        return low <= torch.minimum(q.high[:, None] // self.size, k.high // self.size)

    def whole(self, q: Spans, k: Spans) -> Tensor:
        low = torch.minimum(q.low[:, None], k.low) // self.size
        return low == torch.maximum(q.high[:, None], k.high) // self.size

    def period(self) -> int:
        return self.size


@dataclass(frozen=True)
class Summary(Columns):
    """The last `count` keys of each segment of `size` are seen by all (Child et al. 2019, section 4.3, A^(2) of "fixed")."""

    size: int
    count: int

    def chosen(self, k: Tensor) -> Tensor:
        return k % self.size >= self.size - self.count


@dataclass(frozen=True, eq=False)
class Marked(Columns):
    """The keys marked True in `flags`, by row and position, are seen by all queries of their row (Beltagy et al. 2020, section 3.1)."""

    flags: Bool[Tensor, "b n"]

    def chosen(self, k: Tensor) -> Tensor:
        rows = max(len(k), len(self.flags))
        where = k.reshape(len(k), -1).expand(rows, -1)
        marked = self.flags.expand(rows, -1).gather(1, where.clamp(0, self.flags.shape[1] - 1)) & (where != PAD)
        return marked.view(rows, *k.shape[1:])


class Union(Mask):
    """Base of the named patterns that are unions of simpler ones."""

    def allow(self, q: Tensor, k: Tensor) -> Tensor:
        return functools.reduce(torch.logical_or, (part.allow(q, k) for part in self.parts()))

    def grain(self) -> int:
        return max(part.grain() for part in self.parts())


@dataclass(frozen=True)
class Strided(Union):
    """The nearest `stride` keys and every key a multiple of `stride` away (Child et al. 2019, section 4.3; row 47)."""

    stride: int

    def parts(self) -> tuple[Mask, ...]:
        return Window(self.stride), Every(self.stride)


@dataclass(frozen=True)
class Fixed(Union):
    """The query's own segment of `stride` keys and the last `summary` keys of every segment (Child et al. 2019, section 4.3; row 48)."""

    stride: int
    summary: int

    def parts(self) -> tuple[Mask, ...]:
        return Segment(self.stride), Summary(self.stride, self.summary)


@dataclass(frozen=True)
class Dilated(Union):
    """A window with gaps: keys fewer than `size` steps of `step` away, on both sides (Beltagy et al. 2020, figure 2c; row 49)."""

    size: int
    step: int

    def parts(self) -> tuple[Mask, ...]:
        return (Every(self.step, Window(self.size)),)


@dataclass(frozen=True)
class Listed(Mask):
    """Block i of `block` queries sees the key blocks table[i]."""

    block: int
    table: tuple[tuple[int, ...], ...]

    def allow(self, q: Tensor, k: Tensor) -> Tensor:
        near = _near(self.block, self.table).to(q.device)
        last = len(near) - 1
        inside = (q // self.block <= last) & (k // self.block <= last)
        return near[(q // self.block).clamp(0, last), (k // self.block).clamp(0, last)] & inside

    def grain(self) -> int:
        return self.block

    def blocks(self, q: Spans, k: Spans) -> Tensor:
        return self._count(q, k) > 0

    def whole(self, q: Spans, k: Spans) -> Tensor:
        area = (q.high // self.block - q.low // self.block + 1)[:, None] * (k.high // self.block - k.low // self.block + 1)
        return self._count(q, k) == area

    def _count(self, q: Spans, k: Spans) -> Int[Tensor, "m n"]:
        """How many allowed pairs of blocks lie between two spans, from the table's running sums."""
        sums, last = _sums(self.block, self.table).to(q.low.device), len(self.table)
        (q0, q1), (k0, k1) = (((x.low // self.block).clamp(0, last), (x.high // self.block + 1).clamp(0, last)) for x in (q, k))
        return sums[q1][:, k1] - sums[q0][:, k1] - sums[q1][:, k0] + sums[q0][:, k0]


@dataclass(frozen=True)
class Random(Union):
    """Each block of `block` queries sees `count` key blocks drawn among `total` by `seed` (Zaheer et al. 2020, section 2; row 43)."""

    block: int
    count: int
    total: int
    seed: int = 0

    def parts(self) -> tuple[Mask, ...]:
        return (Listed(self.block, _drawn(self.count, self.total, self.seed)),)


@functools.lru_cache(maxsize=64)
def _drawn(count: int, total: int, seed: int) -> tuple[tuple[int, ...], ...]:
    draw = np.random.default_rng(seed)
    return tuple(tuple(sorted(draw.choice(total, min(count, total), replace=False).tolist())) for _ in range(total))


@functools.lru_cache(maxsize=256)
def _near(block: int, table: tuple[tuple[int, ...], ...]) -> Bool[Tensor, "n n"]:
    near = torch.zeros(len(table), len(table), dtype=torch.bool)
    for i, row in enumerate(table):
        near[i, list(row)] = True
    return near


@functools.lru_cache(maxsize=256)
def _sums(block: int, table: tuple[tuple[int, ...], ...]) -> Int[Tensor, "n1 n1"]:
    return torch.nn.functional.pad(_near(block, table).long().cumsum(0).cumsum(1), (1, 0, 1, 0))
