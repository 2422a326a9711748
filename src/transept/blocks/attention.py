"""Multi-head attention over separate projections, with as many key/value heads as the paper has (MHA, GQA, MQA; rows 13, 15, 17, 82a)."""

from __future__ import annotations

from enum import Enum
from functools import partial

from torch import nn

from transept.blocks.cache import Dense, Ring, Room, Slot
from transept.blocks.context import Context
from transept.blocks.positions import NoPosition
from transept.blocks.traits import Traits
from transept.core.shapes import Float, Tensor
from transept.core.tap import peek, tap
from transept.ops.attention import attend, weights
from transept.ops.masks import Mask


class Bias(Enum):
    """Which projections carry a bias."""

    NONE = (False, False)
    ALL = (True, True)
    QKV = (True, False)
    OUT = (False, True)


class Attention(Traits, nn.Module):
    """softmax(q k^T * scale) v for `heads` query heads that share `kv_heads` key/value heads of width `head_dim`.

    `mask` says who may see whom, `position` how attention knows where tokens stand. The same code serves training, prefill, chunked
    prefill and decoding: the cache comes in the context.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        mask: Mask,
        position: NoPosition | None = None,
        bias: Bias = Bias.NONE,
        scale: float | None = None,
    ):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.mask = mask
        self.scale = head_dim**-0.5 if scale is None else scale
        self.position = NoPosition() if position is None else position
        in_bias, out_bias = bias.value
        self.q = nn.Linear(dim, heads * head_dim, bias=in_bias)
        self.k = nn.Linear(dim, kv_heads * head_dim, bias=in_bias)
        self.v = nn.Linear(dim, kv_heads * head_dim, bias=in_bias)
        self.out = nn.Linear(heads * head_dim, dim, bias=out_bias)

    def forward(self, x: Float[Tensor, "b t d"], ctx: Context) -> Float[Tensor, "b t d"]:
        q, k, v = split(self.q(x), self.heads), split(self.k(x), self.kv_heads), split(self.v(x), self.kv_heads)
        q, k = self.position(q, k, ctx)
        if ctx.slot is not None:
            k, v = ctx.slot.append(k, v, ctx.positions)
        mask, bias = ctx.bind(self.mask, k.shape[2]), self.position.bias(ctx, k.shape[2])
        peek(self, "weights", partial(weights, q, k, mask=mask, scale=self.scale, bias=bias))
        y = attend(tap(self, "q", q), tap(self, "k", k), tap(self, "v", v), mask=mask, scale=self.scale, bias=bias)
        return self.out(merge(tap(self, "heads", y)))

    def slot(self, room: Room) -> Slot:
        """What this layer needs of a cache: a ring where the mask cannot look back further."""
        window = self.mask.reach()
        if window is not None:
            return Ring(room, self.kv_heads, self.head_dim, self.head_dim, window)
        return Dense(room, self.kv_heads, self.head_dim, self.head_dim)

    def traits(self) -> dict[str, object]:
        biased = " ".join(name for name in ("q", "k", "v", "out") if self.get_submodule(name).bias is not None)
        scale = {} if self.scale == self.head_dim**-0.5 else {"scale": f"{self.scale:g}"}
        sizes = {"heads": self.heads, "kv_heads": self.kv_heads, "head_dim": self.head_dim}
        return {**sizes, "mask": self.mask, "bias": biased or "none", **scale}


def split(x: Float[Tensor, "b t he"], heads: int) -> Float[Tensor, "b h t e"]:
    """The heads of a projection, side by side."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge(x: Float[Tensor, "b h t e"]) -> Float[Tensor, "b t he"]:
    """The heads joined again."""
    return x.transpose(1, 2).flatten(2)
