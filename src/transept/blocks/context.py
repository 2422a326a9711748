"""What a block may know besides its input: one small frozen record, the same for training, prefill, decoding and cross-attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from transept.blocks.cache import Slot
from transept.core.errors import InputError
from transept.core.shapes import Float, Tensor
from transept.ops.masks import Bound, Mask, Positions, once

V = TypeVar("V")


@dataclass(frozen=True)
class Context:
    """The state of one call.

    `positions` are those of this call's tokens [b t]; `seen` those of every key column there is, the cached ones included [b s]; `slots`
    holds this block's cache slots by branch name and `slot` the one of the branch at work; `memory` [b s d] with `memory_positions` is
    what cross-attention looks at; `memo` keeps what all layers share, such as a dense mask.
    """

    positions: Positions
    seen: Positions
    slots: Mapping[str, Slot] = field(default_factory=dict)
    slot: Slot | None = None
    memory: Float[Tensor, "b s d"] | None = None
    memory_positions: Positions | None = None
    memo: dict[Any, Any] = field(default_factory=dict)

    def layer(self, slots: Mapping[str, Slot]) -> Context:
        """The same call, with the cache slots of one block."""
        return replace(self, slots=slots)

    def branch(self, name: str) -> Context:
        """The same call, with the cache slot of one branch."""
        slot = self.slots.get(name)
        return self if slot is self.slot else replace(self, slot=slot)

    def bind(self, mask: Mask, length: int) -> Bound:
        """The mask laid over this call's queries and the latest `length` key columns; made once for all layers that ask alike."""
        return self.once(("mask", mask, length), lambda: Bound(mask, self.positions, last(self.seen, length)))

    def bind_memory(self, mask: Mask) -> Bound:
        """The mask laid over this call's queries and the columns of the memory."""
        where = self.memory_positions
        if where is None:
            raise InputError("this model reads a source beside its input: give source=, or a cache that holds one")
        return self.once(("memory", mask), lambda: Bound(mask, self.positions, where))

    def once(self, key: Any, compute: Callable[[], V]) -> V:
        """`compute()` at the first asking of this call, the same object afterwards."""
        return once(self.memo, key, compute)


def last(positions: Positions, length: int) -> Positions:
    """The latest `length` columns."""
    if length == len(positions):
        return positions
    skipped = len(positions) - length
    first = None if positions.first is None else positions.first + skipped
    return Positions(positions.index[:, skipped:], first, None if positions.document is None else positions.document[:, skipped:])
