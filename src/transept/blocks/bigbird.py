"""BigBird's attention: global, window and random blocks (Zaheer et al. 2020, arXiv 2007.14062, section 2; rows 43-46), drawn as in its
published code.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from transept.blocks.attention import merge, split
from transept.blocks.context import Context
from transept.blocks.encoder import Encoder, SpanHead, SpanOutput
from transept.blocks.feedforward import MLP
from transept.blocks.norms import LayerNorm
from transept.blocks.stack import Stack
from transept.blocks.traits import Traits
from transept.core.errors import InputError
from transept.core.shapes import Bool, Float, Int, Tensor
from transept.core.tap import peek, tap
from transept.ops.activations import Act
from transept.ops.attention import attend, weights
from transept.ops.masks import Bound, Full, PerHead
from transept.ops.patterns import Listed


class BlockSparseAttention(Traits, nn.Module):
    """ITC of the paper: the first and the last block are global, each block sees itself and both neighbours, and `random` blocks more.

    In training the random blocks are drawn for each head by `seed`. In evaluation the published code draws none and names the first block
    in their place, so that its keys count 1 + `random` times; so does this. A text of at most 5 + 2 `random` blocks sees everything.
    """

    def __init__(self, dim: int, heads: int, block: int, random: int, *, seed: int, longest: int):
        super().__init__()
        self.heads, self.block, self.random, self.seed, self.longest = heads, block, random, seed, longest
        self.scale = (dim // heads) ** -0.5
        self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b t d"], ctx: Context) -> Float[Tensor, "b t d"]:
        q, k, v = (split(p(x), self.heads) for p in (self.q, self.k, self.v))
        mask = self.mask(ctx, x.shape[1])
        if not self.training and mask.mask != Full():
            q, k, v = self._counted(q, k, v, mask)
        peek(self, "weights", partial(weights, q, k, mask=mask, scale=self.scale))
        y = attend(tap(self, "q", q), tap(self, "k", k), tap(self, "v", v), mask=mask, scale=self.scale)[..., : x.shape[2] // self.heads]
        return self.out(merge(tap(self, "heads", y)))

    def mask(self, ctx: Context, length: int) -> Bound:
        """Who sees whom in a text of that length."""
        blocks = -(-length // self.block)
        if length <= (5 + 2 * self.random) * self.block:
            return ctx.bind(Full(), length)
        if not self.training:
            return ctx.bind(Listed(self.block, _table(blocks, ())), length)
        tables = (_table(blocks, drawn) for drawn in draw(blocks, self.block, self.random, self.heads, (self.seed, self.longest)))
        return ctx.bind(PerHead(tuple(Listed(self.block, table) for table in tables)), length)

    def _counted(self, q: Tensor, k: Tensor, v: Tensor, mask: Bound) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v with numbers more, whose product adds log(1 + random) to the scores of the inner blocks with the first one.

        Eight, of which one is used: the fused kernel is fast at such widths.
        """
        inner = (mask.q.index >= self.block) & (mask.q.index // self.block < -(-q.shape[2] // self.block) - 1)
        first = (mask.k.index >= 0) & (mask.k.index < self.block)
        height = math.log(1 + self.random) / self.scale
        more = [
            torch.stack((flag * 1.0, *[torch.zeros_like(flag, dtype=torch.float)] * 7), -1).to(q.dtype)[:, None] for flag in (inner, first)
        ]
        grown = [torch.cat((x, extra.expand(*x.shape[:3], -1)), -1) for x, extra in zip((q, k), (more[0] * height, more[1]), strict=True)]
        return grown[0], grown[1], F.pad(v, (0, 8))

    def traits(self) -> dict[str, object]:
        return {"heads": self.heads, "block": self.block, "random": self.random, "seed": self.seed}


class DeepSpanHead(SpanHead):
    """A feed-forward network with a residual connection and a norm before the two vectors, as published for BigBird."""

    def __init__(self, dim: int, ffn: int, act: Act, eps: float):
        super().__init__(dim)
        self.mlp, self.norm = MLP(dim, ffn, act), LayerNorm(dim, eps)

    def forward(self, x: Float[Tensor, "b t d"]) -> SpanOutput:
        return replace(super().forward(self.norm(x + self.mlp(x))), hidden=x)


class AskedEncoder(Encoder):
    """An encoder that looks for an answer behind the question, which ends at the first `separator`: no token of the question but the
    first can be chosen, and where the caller names no segments the question is the first one and the rest the second.
    """

    def __init__(self, embed: nn.Module, stack: Stack, head: SpanHead, separator: int):
        super().__init__(embed, stack, head)
        self.separator = separator

    def forward(
        self, ids: Int[Tensor, "b t"], *, mask: Bool[Tensor, "b t"] | None = None, segments: Int[Tensor, "b t"] | None = None
    ) -> SpanOutput:
        """Scores of each token as the first and as the last of the answer. Raises InputError where a row has no separator."""
        found = (ids == self.separator).long()
        ended = found.any(1)
        if not ids.is_meta and ids.shape[1] and not ended.all():
            row = int(ended.int().argmin())
            raise InputError(f"a question should end with the separator {self.separator}, but row {row} has none")
        asked = found.cumsum(1) - found == 0
        out: SpanOutput = self.head(self.states(ids, mask=mask, segments=(~asked).long() if segments is None else segments))
        barred = asked.to(out.start.dtype) * 1e6
        barred[:, 0] = 0
        return replace(out, start=out.start - barred, end=out.end - barred)


@lru_cache(maxsize=512)
def _table(blocks: int, drawn: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    """The key blocks of each query block: `drawn` are the random ones of all but the first and the last."""
    inner = [{0, i - 1, i, i + 1, blocks - 1, *(drawn[i - 1] if drawn else ())} for i in range(1, blocks - 1)]
    every = tuple(range(blocks))
    return (every, *(tuple(sorted(row)) for row in inner), every)


@lru_cache(maxsize=64)
def draw(blocks: int, size: int, random: int, heads: int, origin: tuple[int, int]) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """For each head the random blocks of each block but the first and the last, in the published code's order of drawing; `origin` is the
    seed and the longest text of the model.

    At exactly 1024 tokens that code draws the last block, which is global too, and counts it twice; this counts it once.
    """
    seed, longest = origin
    stream = np.random.RandomState(seed)
    if blocks * size in (1024, 3072, 4096):
        return tuple(_draw_early(stream, (blocks, longest // size), size, random) for _ in range(heads))
    every: list[list[tuple[int, ...]]] = [[] for _ in range(heads)]
    first = min(blocks, 2 * random + 5)
    for i in range(1, blocks - 1):
        for h in range(heads):
            every[h].append(_legal(stream, i, first, random))
    return tuple(tuple(rows) for rows in every)


def _legal(stream: np.random.RandomState, i: int, end: int, random: int) -> tuple[int, ...]:
    """Blocks below `end` that block i sees neither as window nor as global."""
    illegal = {i - 1, i, i + 1, 0, end - 1} | ({end - 2} if i == 1 else set()) | ({1} if i == end - 2 else set())
    return tuple(int(j) for j in stream.permutation(np.arange(end, dtype=np.int32)) if j not in illegal)[:random]


def _draw_early(stream: np.random.RandomState, counts: tuple[int, int], size: int, random: int) -> tuple[tuple[int, ...], ...]:
    """The plan for the paper's own lengths: drawn for the longest text among the blocks of its first 1024 tokens, then cut."""
    blocks, total = counts
    middle = np.arange(1, total - 1, dtype=np.int32)
    last = 1024 // size - 1 if 1024 > 2 * size else total - 1
    rows = []
    for i in range(1, total - 1):
        start = i - 2
        if i == 1:
            among = middle[2:last]
        elif i == 2:
            among = middle[3:last]
        elif i in (total - 3, total - 2):
            among = middle[:last]
        elif start > last:
            among = middle[:last]
        elif i + 1 == last:
            among = middle[:start]
        else:
            among = np.concatenate((middle[:start], middle[i + 1 : last]))
        rows.append(tuple(int(j) for j in stream.permutation(among)[:random]))
    return tuple(rows[: blocks - 2])
