"""A small algebra of attention masks.

A mask is a rule over positions: may the query at position i attend to the key at position j? Rules combine with `&` and `|`, so
`Causal() & Window(256) | Global([0])` is one object that knows both the dense boolean (the oracle) and when nothing need be masked.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from transept.core.shapes import Bool, Int, Tensor

PAD = -1
"""The position of a token that is not there: no query may attend to it."""


@dataclass(frozen=True)
class Positions:
    """Where the tokens of one call stand.

    `index` is int64 [b t], PAD where there is no token. `first` is the position of column 0 when every row counts up from it without a
    gap, so that masks can be decided without looking at the numbers; it is None when rows differ. Where a row holds several documents
    one behind the other, `document` [b t] tells them apart, and each counts its own positions.
    """

    index: Int[Tensor, "b t"]
    first: int | None
    document: Int[Tensor, "b t"] | None = None

    @staticmethod
    def span(first: int, length: int, device: torch.device | None = None) -> Positions:
        """The positions first, first + 1, ... of `length` tokens, the same for every row (b = 1)."""
        return Positions(torch.arange(first, first + length, device=device)[None], first)

    @staticmethod
    def of(mask: Bool[Tensor, "b t"], start: Int[Tensor, "b"] | int = 0) -> Positions:
        """Counts the real tokens (True) of each row from `start`; the others get PAD."""
        begin = start[:, None] if isinstance(start, torch.Tensor) else start
        return Positions(torch.where(mask, mask.long().cumsum(1) - 1 + begin, PAD), None)

    @staticmethod
    def packed(document: Int[Tensor, "b t"]) -> Positions:
        """The positions of rows that hold several documents: each run of equal numbers counts from 0; negative numbers are padding."""
        columns = torch.arange(document.shape[1], device=document.device).expand_as(document)
        begins = torch.ones_like(document, dtype=torch.bool)
        begins[:, 1:] = document[:, 1:] != document[:, :-1]
        index = columns - torch.where(begins, columns, 0).cummax(1).values
        return Positions(torch.where(document < 0, PAD, index), None, document)

    def __len__(self) -> int:
        return self.index.shape[1]


@dataclass(frozen=True)
class Box:
    """A rectangle of positions: queries q0 .. q0+t-1 by keys k0 .. k0+s-1."""

    q0: int
    t: int
    k0: int
    s: int


@dataclass(frozen=True)
class Spans:
    """The lowest and the highest position in each of m blocks of columns; a block without a token has low > high."""

    low: Int[Tensor, "m"]
    high: Int[Tensor, "m"]

    @staticmethod
    def of(index: Int[Tensor, "b t"], size: int) -> Spans:
        """The spans of blocks of `size` columns, over all rows."""
        short = -index.shape[1] % size
        blocks = torch.nn.functional.pad(index, (0, short), value=PAD).view(len(index), -1, size)
        low = blocks.masked_fill(blocks == PAD, _FAR).amin((0, 2))
        return Spans(low, blocks.amax((0, 2)))


_FAR = 1 << 40


class Mask:
    """Base of the rules. `allow` is the definition; the other methods may answer without computing it."""

    def allow(self, q: Tensor, k: Tensor) -> Tensor:
        """True where the query position may attend to the key position; the two integer tensors broadcast."""
        raise NotImplementedError

    def covers(self, box: Box) -> bool:
        """True only if every pair of the box is allowed."""
        return False

    def trim(self, box: Box) -> Mask:
        """A simpler rule that is equal on the box."""
        return Full() if self.covers(box) else self

    def reach(self) -> int | None:
        """How many of the latest positions a query may look back on, itself counted; None for all."""
        return None

    def blocks(self, q: Spans, k: Spans) -> Bool[Tensor, "m n"]:
        """The blocks worth computing: never False where some query of block i may attend to some key of block j."""
        return torch.ones(len(q.low), len(k.low), dtype=torch.bool, device=q.low.device)

    def whole(self, q: Spans, k: Spans) -> Bool[Tensor, "m n"]:
        """True only where every query of block i may attend to every key of block j."""
        return torch.zeros(len(q.low), len(k.low), dtype=torch.bool, device=q.low.device)

    def period(self) -> int:
        """A shift of all positions that changes nothing; 0 where there is none."""
        return 0

    def grain(self) -> int:
        """The size of the blocks that the rule is made of; 0 where it is made of positions."""
        return 0

    def parts(self) -> tuple[Mask, ...]:
        """Rules whose union is this one, each of one shape: a band, columns, rows, a comb or a list of blocks."""
        return (self,)

    def atoms(self) -> tuple[Mask, ...]:
        """Rules whose intersection is this one."""
        return (self,)

    def __and__(self, other: Mask) -> Mask:
        return And(self, other)

    def __or__(self, other: Mask) -> Mask:
        return Or(self, other)


@dataclass(frozen=True)
class Full(Mask):
    """Every pair is allowed (bidirectional attention)."""

    def allow(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.ones_like(q + k, dtype=torch.bool)

    def covers(self, box: Box) -> bool:
        return True

    def whole(self, q: Spans, k: Spans) -> Tensor:
        return self.blocks(q, k)

    def period(self) -> int:
        return 1


@dataclass(frozen=True)
class Causal(Mask):
    """No query sees a later key (row 17)."""

    def allow(self, q: Tensor, k: Tensor) -> Tensor:
        return k <= q

    def covers(self, box: Box) -> bool:
        return box.q0 >= box.k0 + box.s - 1

    def blocks(self, q: Spans, k: Spans) -> Tensor:
        return k.low <= q.high[:, None]

    def whole(self, q: Spans, k: Spans) -> Tensor:
        return k.high <= q.low[:, None]

    def period(self) -> int:
        return 1


@dataclass(frozen=True)
class Window(Mask):
    """Queries see the keys fewer than `size` positions away, on both sides (row 44)."""

    size: int

    def allow(self, q: Tensor, k: Tensor) -> Tensor:
        return (q - k).abs() < self.size

    def covers(self, box: Box) -> bool:
        return max(box.q0 + box.t - 1 - box.k0, box.k0 + box.s - 1 - box.q0) < self.size

    def reach(self) -> int | None:
        return self.size

    def blocks(self, q: Spans, k: Spans) -> Tensor:
        return torch.maximum(k.low - q.high[:, None], q.low[:, None] - k.high) < self.size

    def whole(self, q: Spans, k: Spans) -> Tensor:
        return torch.maximum(q.high[:, None] - k.low, k.high - q.low[:, None]) < self.size

    def period(self) -> int:
        return 1


class Columns(Mask):
    """Base of the rules by which some keys are seen by every query."""

    def chosen(self, k: Tensor) -> Tensor:
        """True at the positions of those keys."""
        raise NotImplementedError

    def allow(self, q: Tensor, k: Tensor) -> Tensor:
        found = self.chosen(k)
        return found.expand(torch.broadcast_shapes(q.shape, found.shape))


class Rows(Mask):
    """Base of the rules by which some queries see every key."""

    def chosen(self, q: Tensor) -> Tensor:
        """True at the positions of those queries."""
        raise NotImplementedError

    def allow(self, q: Tensor, k: Tensor) -> Tensor:
        return self.chosen(q).expand(torch.broadcast_shapes(q.shape, k.shape))


@dataclass(frozen=True)
class Seen(Columns):
    """The named positions are seen by all."""

    index: tuple[int, ...]

    def chosen(self, k: Tensor) -> Tensor:
        return torch.isin(k, torch.tensor(self.index, device=k.device))


@dataclass(frozen=True)
class Seers(Rows):
    """The named positions see all."""

    index: tuple[int, ...]

    def chosen(self, q: Tensor) -> Tensor:
        return torch.isin(q, torch.tensor(self.index, device=q.device))


@dataclass(frozen=True)
class Global(Mask):
    """The named positions see all and are seen by all (row 45)."""

    index: tuple[int, ...]

    def allow(self, q: Tensor, k: Tensor) -> Tensor:
        chosen = torch.tensor(self.index, device=q.device)
        return torch.isin(q, chosen) | torch.isin(k, chosen)

    def parts(self) -> tuple[Mask, ...]:
        return Seers(self.index), Seen(self.index)


@dataclass(frozen=True)
class And(Mask):
    """Allowed by both."""

    left: Mask
    right: Mask

    def __str__(self) -> str:
        return f"{self.left} & {self.right}"

    def allow(self, q: Tensor, k: Tensor) -> Tensor:
        return self.left.allow(q, k) & self.right.allow(q, k)

    def covers(self, box: Box) -> bool:
        return self.left.covers(box) and self.right.covers(box)

    def trim(self, box: Box) -> Mask:
        left, right = self.left.trim(box), self.right.trim(box)
        return right if left == Full() else left if right == Full() else And(left, right)

    def reach(self) -> int | None:
        both = [r for r in (self.left.reach(), self.right.reach()) if r is not None]
        return min(both) if both else None

    def blocks(self, q: Spans, k: Spans) -> Tensor:
        return self.left.blocks(q, k) & self.right.blocks(q, k)

    def whole(self, q: Spans, k: Spans) -> Tensor:
        return self.left.whole(q, k) & self.right.whole(q, k)

    def period(self) -> int:
        return math.lcm(self.left.period(), self.right.period())

    def grain(self) -> int:
        return max(self.left.grain(), self.right.grain())

    def parts(self) -> tuple[Mask, ...]:
        left, right = self.left.parts(), self.right.parts()
        return (self,) if len(left) == len(right) == 1 else tuple(And(a, b) for a in left for b in right)

    def atoms(self) -> tuple[Mask, ...]:
        return self.left.atoms() + self.right.atoms()


@dataclass(frozen=True)
class Or(Mask):
    """Allowed by either."""

    left: Mask
    right: Mask

    def __str__(self) -> str:
        return f"({self.left} | {self.right})"

    def allow(self, q: Tensor, k: Tensor) -> Tensor:
        return self.left.allow(q, k) | self.right.allow(q, k)

    def covers(self, box: Box) -> bool:
        return self.left.covers(box) or self.right.covers(box)

    def reach(self) -> int | None:
        left, right = self.left.reach(), self.right.reach()
        return None if left is None or right is None else max(left, right)

    def blocks(self, q: Spans, k: Spans) -> Tensor:
        return self.left.blocks(q, k) | self.right.blocks(q, k)

    def whole(self, q: Spans, k: Spans) -> Tensor:
        return self.left.whole(q, k) | self.right.whole(q, k)

    def period(self) -> int:
        return math.lcm(self.left.period(), self.right.period())

    def grain(self) -> int:
        return max(self.left.grain(), self.right.grain())

    def parts(self) -> tuple[Mask, ...]:
        return self.left.parts() + self.right.parts()


@dataclass(frozen=True)
class PerHead(Mask):
    """One rule for each head (Child et al. 2019, eq. 9): it can be laid over positions, but not combined."""

    masks: tuple[Mask, ...]


@dataclass(frozen=True)
class Bound:
    """A mask laid over the positions of one call."""

    mask: Mask
    q: Positions
    k: Positions
    memo: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def rule(self) -> Mask:
        """The simplest rule equal to the mask on these positions; Full() means that nothing need be masked."""
        # Not a cached_property: its lock is nothing that torch.compile can trace.
        return once(self.memo, "rule", self._rule)

    def _rule(self) -> Mask:
        if self.q.first is None or self.k.first is None:
            return self.mask
        return self.mask.trim(Box(self.q.first, len(self.q), self.k.first, len(self.k)))

    @property
    def everything(self) -> bool:
        """True if every query attends to every key, known without looking at the numbers."""
        return self.q.first is not None and self.k.first is not None and self.rule == Full()

    @property
    def triangle(self) -> bool:
        """True if this is the plain lower triangle of a square."""
        square = self.q.first is not None and self.q.first == self.k.first and len(self.q) == len(self.k)
        return square and self.rule == Causal()

    @property
    def dense(self) -> Bool[Tensor, "#b #h t s"]:
        """The dense boolean, True = may attend, one for all heads unless the mask differs by head: the oracle of every faster way."""
        return once(self.memo, "dense", self._dense)

    def _dense(self) -> Tensor:
        q, k = self.q.index[:, :, None], self.k.index[:, None, :]
        real = ((k != PAD) & (q != PAD))[:, None]
        if self.q.document is not None and self.k.document is not None:
            real = real & (self.q.document[:, :, None] == self.k.document[:, None, :])[:, None]
        if isinstance(self.mask, PerHead):
            return torch.stack([mask.allow(q, k) for mask in self.mask.masks], 1) & real
        return self.mask.allow(q, k)[:, None] & real


def once(memo: dict[Any, Any], key: Any, compute: Callable[[], Any]) -> Any:
    """`compute()` the first time that `key` is asked for within one call of a model, the same object afterwards."""
    if key not in memo:
        memo[key] = compute()
    return memo[key]
