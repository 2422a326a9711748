"""How a model knows where a token stands (rows 31-36): in its attention (Rotary, or NoPosition) or in its embedding (Learned,
Sinusoidal)."""

from __future__ import annotations

import torch
from torch import nn

from transept.blocks.context import Context, last
from transept.blocks.traits import Traits
from transept.core.errors import InputError
from transept.core.shapes import Float, Int, Tensor
from transept.ops import rotary
from transept.ops.relative import BucketSpec, buckets
from transept.ops.rotary import Layout, RopeSpec


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


class Normed(NoPosition):
    """q and k brought to a root mean square of 1 before another scheme turns them (Henry et al. 2020, arXiv 2010.04245, no factor)."""

    def __init__(self, inner: NoPosition, eps: float = 1e-6):
        super().__init__()
        self.inner, self.eps = inner, eps

    def forward(self, q: Float[Tensor, "b h t e"], k: Float[Tensor, "b k t e"], ctx: Context) -> tuple[Tensor, Tensor]:
        width = (q.shape[-1],)
        return self.inner(nn.functional.rms_norm(q, width, eps=self.eps), nn.functional.rms_norm(k, width, eps=self.eps), ctx)

    def bias(self, ctx: Context, length: int) -> Float[Tensor, "#b h t s"] | None:
        return self.inner.bias(ctx, length)


class Relative(NoPosition):
    """One learned number per head and bucket of distance, added to the scores (Raffel et al. 2019, arXiv 1910.10683, section 2.1; row 35).

    The bias of a call is worked out once for all layers that share it, from positions alone: so it is the same with a cache.
    """

    def __init__(self, heads: int, spec: BucketSpec):
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(spec.buckets, heads).normal_(std=0.02))

    def bias(self, ctx: Context, length: int) -> Float[Tensor, "#b h t s"]:
        return ctx.once(("relative", self, length), lambda: self._bias(ctx, length))

    def _bias(self, ctx: Context, length: int) -> Tensor:
        q, k = ctx.positions.index, last(ctx.seen, length).index
        distance = k[:, None, :] - q[:, :, None]
        return nn.functional.embedding(buckets(distance, self.spec), self.weight).permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in vars(self.spec).items())


class Shared(NoPosition):
    """The scheme of another layer, which owns its weights."""

    def __init__(self, owner: NoPosition):
        super().__init__()
        # In a tuple, so that the weights are registered once, where their owner stands.
        self.owner = (owner,)

    def forward(self, q: Float[Tensor, "b h t e"], k: Float[Tensor, "b k t e"], ctx: Context) -> tuple[Tensor, Tensor]:
        return self.owner[0](q, k, ctx)

    def bias(self, ctx: Context, length: int) -> Float[Tensor, "#b h t s"] | None:
        return self.owner[0].bias(ctx, length)


class Learned(Traits, nn.Module):
    """One learned vector for each of `context` positions (row 33), `offset` rows of the table left unused at its start."""

    def __init__(self, context: int, dim: int, offset: int = 0):
        super().__init__()
        self.context, self.offset = context, offset
        self.weight = nn.Parameter(torch.empty(context + offset, dim).normal_(std=0.02))

    def forward(self, x: Float[Tensor, "b t d"], positions: Int[Tensor, "#b t"]) -> Float[Tensor, "b t d"]:
        """x plus its positions' vectors; a position beyond the table is refused."""
        # Compiled code cannot stop to look at a number; it checks the bounds of each lookup itself.
        unseen = positions.is_meta or torch.compiler.is_compiling()
        longest = self.context if unseen else int(positions.max()) + 1
        if longest > self.context:
            raise InputError(f"the input reaches position {longest}, but the model's table of positions ends at {self.context}")
        return x + self.weight[positions.clamp(min=0) + self.offset]

    def traits(self) -> dict[str, object]:
        return {"context": self.context}


class Sinusoidal(nn.Module):
    """sin and cos of pos / 10000^(2i/d) added to the input (Vaswani et al. 2017, section 3.5; row 32).

    In the layout PAIRS the neighbours 2i and 2i+1 share a frequency, as in the paper; in HALVES all sines come first, as in Marian's files.
    """

    def __init__(self, dim: int, layout: Layout = Layout.PAIRS):
        super().__init__()
        self.dim, self.layout = dim, layout

    def forward(self, x: Float[Tensor, "b t d"], positions: Int[Tensor, "#b t"]) -> Float[Tensor, "b t d"]:
        # In float64: at position 1000 an angle in float32 is off by more than 1e-5.
        rate = 10000.0 ** (-torch.arange(0, self.dim, 2, device=x.device).double() / self.dim)
        angle = positions[..., None].double() * rate
        waves = (angle.sin(), angle.cos())
        return x + (torch.cat(waves, -1) if self.layout is Layout.HALVES else torch.stack(waves, -1).flatten(-2)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, {self.layout.name}"
