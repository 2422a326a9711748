"""Blocks one above the other, from tokens to logits; the same call for training, prefill, chunked prefill and decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from transept.blocks.block import Block
from transept.blocks.cache import Cache, Memory, Room
from transept.blocks.context import Context
from transept.core.errors import InputError
from transept.core.shapes import Bool, Float, Int, Tensor
from transept.core.tap import tap
from transept.ops.masks import Positions


@dataclass
class Output:
    """What a model returns: `logits` of every token, or of a whole row where it scores classes, and its last states."""

    logits: Float[Tensor, "b *columns v"]
    hidden: Float[Tensor, "b t d"]


class Stack(nn.Module):
    """Blocks in order, then a last norm."""

    def __init__(self, layers: Sequence[nn.Module], norm: nn.Module):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm

    def forward(self, x: Float[Tensor, "b t d"], ctx: Context, cache: Cache | None = None) -> Float[Tensor, "b t d"]:
        for i, layer in enumerate(self.layers):
            x = layer(x, ctx if cache is None else ctx.layer(cache.slots[i]))
        return tap(self, "hidden", self.norm(x))

    def cache(self, room: Room) -> Cache:
        """An empty cache for this stack."""
        return Cache([layer.slots(room) for layer in self.layers if isinstance(layer, Block)], room.batch)


class Trunk(nn.Module):
    """embed, blocks, norm: everything below a head; it reads tokens from left to right."""

    def __init__(self, embed: nn.Module, layers: Sequence[nn.Module], norm: nn.Module):
        super().__init__()
        self.embed = embed
        self.stack = Stack(layers, norm)

    def hidden(
        self,
        ids: Int[Tensor, "b t"],
        *,
        mask: Bool[Tensor, "b t"] | None = None,
        cache: Cache | None = None,
        memory: Memory | None = None,
        document: Int[Tensor, "b t"] | None = None,
    ) -> Float[Tensor, "b t d"]:
        """The last states; `mask` is True at real tokens, `cache` remembers what came before, cross-attention looks at `memory`.

        In packed rows `document` [b t] numbers the documents, negative at padding: each is read as if it were alone in its row.
        """
        ctx = context(ids, mask, cache, memory) if document is None else packed(ids, mask, cache, document)
        return self.stack(self.embed(ids, ctx.positions.index), ctx, cache)


class Decoder(Trunk):
    """A trunk with a head over the vocabulary (row 38 without cross-attention)."""

    def __init__(self, embed: nn.Module, layers: Sequence[Block], norm: nn.Module, head: nn.Module):
        super().__init__(embed, layers, norm)
        self.head = head

    def forward(
        self,
        ids: Int[Tensor, "b t"],
        *,
        mask: Bool[Tensor, "b t"] | None = None,
        cache: Cache | None = None,
        document: Int[Tensor, "b t"] | None = None,
    ) -> Output:
        """Logits and last states of every token; `mask` is True at real tokens, `cache` remembers what came before, `document` numbers the
        documents of packed rows."""
        hidden = self.hidden(ids, mask=mask, cache=cache, document=document)
        return Output(logits=self.head(hidden), hidden=hidden)

    def cache(self, batch: int, capacity: int = 64) -> Cache:
        """An empty cache for `batch` rows, with room for `capacity` columns before it must grow."""
        weight = next(self.parameters())
        return self.stack.cache(Room(batch, capacity, weight.dtype, weight.device))


def packed(x: Tensor, mask: Tensor | None, cache: Cache | None, document: Tensor) -> Context:
    """The context of rows that hold several documents each."""
    if mask is not None or cache is not None:
        raise InputError("packed rows have neither a mask (negative document numbers are padding) nor a cache")
    if document.shape != x.shape[:2]:
        raise InputError(f"the document numbers have the shape {tuple(document.shape)}, but the input has {tuple(x.shape[:2])}")
    positions = Positions.packed(document)
    return Context(positions, positions)


def context(x: Tensor, mask: Bool[Tensor, "b t"] | None, cache: Cache | None, memory: Memory | None = None) -> Context:
    """The context of a call on x [b t ...]: positions go on from the cache, and a column with mask False has none.

    A memory has as many rows as x, or one for all.
    """
    if x.shape[1] == 0:
        raise InputError("the input is empty: a model needs at least one token")
    if mask is not None and mask.shape != x.shape[:2]:
        raise InputError(f"the mask has the shape {tuple(mask.shape)}, but the input has {tuple(x.shape[:2])}")
    start = 0 if cache is None else cache.next()
    if mask is None and isinstance(start, int):
        positions = Positions.span(start, x.shape[1], x.device)
    else:
        every = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
        positions = Positions.of(every, start)
    seen = positions if cache is None else cache.extend(positions)
    return Context(positions, seen) if memory is None else Context(positions, seen, memory=memory.states, memory_positions=memory.positions)
