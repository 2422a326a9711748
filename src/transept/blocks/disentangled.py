"""Disentangled attention: content and relative position meet in separate products (row 68).

He et al. 2020, arXiv 2006.03654, and 2021, arXiv 2111.09543.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from transept.blocks.attention import merge, split
from transept.blocks.block import Block
from transept.blocks.cache import Cache
from transept.blocks.context import Context
from transept.blocks.norms import LayerNorm, NoNorm
from transept.blocks.stack import Stack
from transept.core.shapes import Float, Int, Tensor
from transept.core.spec import Spec
from transept.core.tap import peek, tap
from transept.ops.activations import Act
from transept.ops.attention import attend, weights
from transept.ops.masks import PAD, Full


@dataclass(frozen=True, kw_only=True)
class RelativeSpec(Spec):
    """`span` distances on either side have their own vector; with `buckets` the far ones share them in logarithmic steps up to `limit`.

    `c2p` and `p2c` are the two products of eq. 4; `shared` projects positions with the content's own matrices (v2), `biased` says that
    the key projections carry a bias (v2), `normed` that the table is normed (v2).
    """

    span: int
    limit: int
    buckets: bool = False
    c2p: bool = True
    p2c: bool = True
    shared: bool = False
    biased: bool = False
    normed: bool = False

    @property
    def products(self) -> int:
        """How many products are summed into a score; it scales by 1/sqrt(products * head width)."""
        return 1 + self.c2p + self.p2c


def distance(q: Int[Tensor, "b t"], k: Int[Tensor, "b s"], spec: RelativeSpec) -> Int[Tensor, "b t s"]:
    """The row of the table for each pair: eq. 3, through the logarithmic buckets of v2 where the spec has them."""
    away = q[:, :, None] - k[:, None, :]
    if spec.buckets:
        middle = spec.span // 2
        far = away.abs().clamp(min=1).float() / middle
        # In float32 throughout: published models were trained with its rounding at the edges of the buckets.
        steps = (far.log() / torch.tensor((spec.limit - 1) / middle).log() * (middle - 1)).ceil() + middle
        away = torch.where(away.abs() <= middle, away, (steps * away.sign()).long())
    return (away + spec.span).clamp(0, 2 * spec.span - 1)


class RelativeTable(nn.Module):
    """A vector for each relative distance, the same for all layers."""

    def __init__(self, spec: RelativeSpec, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2 * spec.span, dim).normal_(std=0.02))
        self.norm = LayerNorm(dim, eps) if spec.normed else NoNorm()

    def forward(self) -> Float[Tensor, "r d"]:
        return self.norm(self.weight)


class DisentangledAttention(nn.Module):
    """softmax((q k^T + q k_r^T + k q_r^T) * scale) v, k_r and q_r being projections of the table at the distance of each pair (eq. 4)."""

    def __init__(self, dim: int, heads: int, spec: RelativeSpec, table: RelativeTable):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.spec = heads, heads, dim // heads, spec
        self.mask = Full()
        self.scale = (self.head_dim * spec.products) ** -0.5
        # In a tuple, so that the table is registered once, in the stack that all layers stand in.
        self.source = (table,)
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim, bias=spec.biased)
        self.v = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        if spec.c2p and not spec.shared:
            self.k_position = nn.Linear(dim, dim, bias=spec.biased)
        if spec.p2c and not spec.shared:
            self.q_position = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b t d"], ctx: Context) -> Float[Tensor, "b t d"]:
        q, k, v = (split(project(x), self.heads) for project in (self.q, self.k, self.v))
        mask, bias = ctx.bind(self.mask, k.shape[2]), self.bias(q, k, ctx)
        peek(self, "weights", partial(weights, q, k, mask=mask, scale=self.scale, bias=bias))
        y = attend(tap(self, "q", q), tap(self, "k", k), tap(self, "v", v), mask=mask, scale=self.scale, bias=bias)
        return self.out(merge(tap(self, "heads", y)))

    def bias(self, q: Float[Tensor, "b h t e"], k: Float[Tensor, "b h s e"], ctx: Context) -> Float[Tensor, "b h t s"]:
        """The scaled products of content with position."""
        table = ctx.once("relative table", lambda: self.source[0]())[None]
        where = ctx.positions.index
        row = ctx.once("relative rows", lambda: distance(where, where, self.spec))[:, None]
        total = q.new_zeros(())
        if self.spec.c2p:
            k_r = split((self.k if self.spec.shared else self.k_position)(table), self.heads)
            total = total + _pick(q @ k_r.transpose(-1, -2), row)
        if self.spec.p2c:
            # Looked up by key, so the rows are read from the other end.
            q_r = split((self.q if self.spec.shared else self.q_position)(table), self.heads)
            total = total + _pick(k @ q_r.transpose(-1, -2), row.transpose(-1, -2)).transpose(-1, -2)
        return total * self.scale

    def extra_repr(self) -> str:
        return f"heads={self.heads}, head_dim={self.head_dim}, {self.spec}"


def _pick(scores: Float[Tensor, "b h t r"], row: Int[Tensor, "#b 1 t s"]) -> Float[Tensor, "b h t s"]:
    return scores.gather(-1, row.expand(scores.shape[0], scores.shape[1], -1, -1))


class LocalConv(nn.Module):
    """norm(y + act(conv(x))): a convolution over neighbouring tokens beside the first layer (He et al. 2021, v2)."""

    def __init__(self, dim: int, kernel: int, act: Act, eps: float):
        super().__init__()
        self.act = act
        self.conv = nn.Conv1d(dim, dim, kernel, padding=(kernel - 1) // 2)
        self.norm = LayerNorm(dim, eps)

    def forward(self, x: Float[Tensor, "b t d"], y: Float[Tensor, "b t d"], ctx: Context) -> Float[Tensor, "b t d"]:
        real = (ctx.positions.index != PAD)[..., None]
        near = self.act(self.conv(x.transpose(1, 2)).transpose(1, 2) * real)
        return self.norm(y + near) * real


class RelativeStack(Stack):
    """Layers that share one table of relative positions; where there is a convolution, it joins the first layer's output."""

    def __init__(self, layers: Sequence[Block], table: RelativeTable, conv: LocalConv | None = None):
        super().__init__(layers, NoNorm())
        self.table, self.conv = table, conv

    def forward(self, x: Float[Tensor, "b t d"], ctx: Context, cache: Cache | None = None) -> Float[Tensor, "b t d"]:
        for i, layer in enumerate(self.layers):
            y = layer(x, ctx)
            x = self.conv(x, y, ctx) if i == 0 and self.conv is not None else y
        return tap(self, "hidden", x)
