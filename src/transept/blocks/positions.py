"""How a model knows where a token stands (rows 31-36): in its attention (Rotary, or NoPosition) or in its embedding (Learned, Sinusoidal)."""

from __future__ import annotations

import torch
from torch import nn

from transept.blocks.context import Context
from transept.blocks.traits import Traits
from transept.core.errors import InputError
from transept.core.shapes import Float, Int, Tensor
from transept.ops import rotary
from transept.ops.rotary import RopeSpec


class NoPosition(Traits, nn.Module):
    """Attention that does not know where tokens stand; the base of every scheme that tells it.

    `forward` may turn q and k; `bias` may add to the scores.
    """

    def forward(self, q: Float[Tensor, "b h t e"], k: Float[Tensor, "b k t e"], ctx: Context) -> tuple[Tensor, Tensor]:
        """q and k with their positions in them."""
        return q, k

    def bias(self, ctx: Context, length: int) -> Float[Tensor, "#b h t s"] | None:
        """What is added to the scores of this call's queries with the latest `length` keys; None for nothing."""
        return None


class Rotary(NoPosition):
    """Turns q and k by their positions (row 36)."""

    def __init__(self, spec: RopeSpec):
        super().__init__()
        self.spec = spec

    def forward(self, q: Float[Tensor, "b h t e"], k: Float[Tensor, "b k t e"], ctx: Context) -> tuple[Tensor, Tensor]:
        cos, sin = ctx.once(("rotary", self.spec, q.dtype), lambda: self._angles(ctx, q.dtype))
        return rotary.rotate(q, cos, sin, self.spec.layout), rotary.rotate(k, cos, sin, self.spec.layout)

    def _angles(self, ctx: Context, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        where = ctx.positions
        length = where.first + len(where) if where.first is not None else int(where.index.max()) + 1
        return rotary.angles(where.index, self.spec, length, dtype)

    def traits(self) -> dict[str, object]:
        scaling = {} if self.spec.scaling is None else {"scaling": type(self.spec.scaling).__name__}
        return {"rope": f"{self.spec.dims} dims, theta {self.spec.theta:g}", "layout": self.spec.layout.name, **scaling}


class Learned(Traits, nn.Module):
    """One learned vector for each of `context` positions (row 33), `offset` rows of the table left unused at its start."""

    def __init__(self, context: int, dim: int, offset: int = 0):
        super().__init__()
        self.context, self.offset = context, offset
        self.weight = nn.Parameter(torch.empty(context + offset, dim).normal_(std=0.02))

    def forward(self, x: Float[Tensor, "b t d"], positions: Int[Tensor, "#b t"]) -> Float[Tensor, "b t d"]:
        """x plus its positions' vectors; a position beyond the table is refused."""
        longest = self.context if positions.is_meta else int(positions.max()) + 1
        if longest > self.context:
            raise InputError(f"the input reaches position {longest}, but the model's table of positions ends at {self.context}")
        return x + self.weight[positions.clamp(min=0) + self.offset]

    def traits(self) -> dict[str, object]:
        return {"context": self.context}


class Sinusoidal(nn.Module):
    """sin and cos of pos / 10000^(2i/d) added to the input (Vaswani et al. 2017, section 3.5; row 32); neighbours 2i, 2i+1 share a frequency."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(self, x: Float[Tensor, "b t d"], positions: Int[Tensor, "#b t"]) -> Float[Tensor, "b t d"]:
        rate = 10000.0 ** (-torch.arange(0, self.dim, 2, device=x.device).float() / self.dim)
        angle = positions[..., None].float() * rate
        return x + torch.stack((angle.sin(), angle.cos()), -1).flatten(-2).to(x.dtype)
