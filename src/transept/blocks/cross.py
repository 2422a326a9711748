"""Cross-attention: the query comes from one sequence, key and value from another (row 18)."""

from __future__ import annotations

from functools import partial

from torch import nn

from transept.blocks.attention import Bias, merge, split
from transept.blocks.cache import Cross, Room
from transept.blocks.context import Context
from transept.core.errors import InputError
from transept.core.shapes import Float, Tensor
from transept.core.tap import peek, tap
from transept.ops.attention import attend, weights
from transept.ops.masks import Full, Mask


class CrossAttention(nn.Module):
    """softmax(q k^T * scale) v with q of the input and k, v of the memory in the context, which is `memory_dim` wide.

    With a cache the keys and values of the memory are worked out once and kept. A memory of one row serves every row of the input.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int,
        *,
        memory_dim: int | None = None,
        mask: Mask | None = None,
        bias: Bias = Bias.NONE,
        scale: float | None = None,
    ):
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.mask = Full() if mask is None else mask
        self.scale = head_dim**-0.5 if scale is None else scale
        in_bias, out_bias = bias.value
        self.q = nn.Linear(dim, heads * head_dim, bias=in_bias)
        self.k = nn.Linear(dim if memory_dim is None else memory_dim, heads * head_dim, bias=in_bias)
        self.v = nn.Linear(dim if memory_dim is None else memory_dim, heads * head_dim, bias=in_bias)
        self.out = nn.Linear(heads * head_dim, dim, bias=out_bias)

    def forward(self, x: Float[Tensor, "b t d"], ctx: Context) -> Float[Tensor, "b t d"]:
        mask = ctx.bind_memory(self.mask)
        q, (k, v) = split(self.q(x), self.heads), self._memory(ctx)
        k, v = k.expand(len(q), -1, -1, -1), v.expand(len(q), -1, -1, -1)
        peek(self, "weights", partial(weights, q, k, mask=mask, scale=self.scale))
        y = attend(tap(self, "q", q), tap(self, "k", k), tap(self, "v", v), mask=mask, scale=self.scale)
        return self.out(merge(tap(self, "heads", y)))

    def _memory(self, ctx: Context) -> tuple[Float[Tensor, "#b h s e"], Float[Tensor, "#b h s e"]]:
        slot = ctx.slot
        if isinstance(slot, Cross) and not slot.empty:
            return slot.k, slot.v
        if ctx.memory is None or ctx.memory_positions is None:
            raise InputError("this model reads a source beside its input: give source=, or a cache that holds one")
        k, v = split(self.k(ctx.memory), self.heads), split(self.v(ctx.memory), self.heads)
        return (k, v) if slot is None else slot.append(k, v, ctx.memory_positions)

    def slot(self, room: Room) -> Cross:
        """Room for the keys and values of a memory."""
        return Cross(room, self.heads, self.head_dim, self.head_dim)

    def extra_repr(self) -> str:
        bias = [n for n in ("q", "k", "v", "out") if getattr(self, n).bias is not None]
        scale = "" if self.scale == self.head_dim**-0.5 else f", scale={self.scale:g}"
        return f"heads={self.heads}, head_dim={self.head_dim}, bias={' '.join(bias) or 'none'}{scale}"
