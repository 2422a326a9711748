"""Sliding-window attention with tokens that see all and are seen by all through projections of their own (Beltagy et al. 2020; rows 44,
45, 49).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from transept.blocks.attention import merge, split
from transept.blocks.context import Context
from transept.blocks.encoder import Encoder, States
from transept.blocks.stack import Output, Stack, context
from transept.blocks.traits import Traits
from transept.core.errors import InputError
from transept.core.shapes import Bool, Float, Int, Tensor
from transept.core.tap import peek, tap
from transept.ops.attention import attend, weights
from transept.ops.masks import PAD, Bound, Full, Mask, Positions
from transept.ops.patterns import Marked


@dataclass(frozen=True)
class GlobalContext(Context):
    """A context that also says which tokens are global."""

    chosen: Bool[Tensor, "b t"] | None = None


class GlobalAttention(Traits, nn.Module):
    """Local attention under `mask`, where every query also sees the global tokens; those see all, by `q_all`, `k_all` and `v_all`
    (section 3.1).
    """

    def __init__(self, dim: int, heads: int, mask: Mask):
        super().__init__()
        self.heads, self.mask, self.scale = heads, mask, (dim // heads) ** -0.5
        self.q, self.k, self.v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.q_all, self.k_all, self.v_all = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b t d"], ctx: Context) -> Float[Tensor, "b t d"]:
        q, k, v = (split(p(x), self.heads) for p in (self.q, self.k, self.v))
        chosen = ctx.chosen if isinstance(ctx, GlobalContext) else None
        mask = self._mask(ctx, chosen)
        peek(self, "weights", lambda heads=None: self._weights(x, (q, k, mask), chosen, ctx, heads))
        y = attend(tap(self, "q", q), tap(self, "k", k), tap(self, "v", v), mask=mask, scale=self.scale)
        if chosen is not None and (chosen.is_meta or chosen.any()):
            y = self._everywhere(x, y, chosen, ctx)
        return self.out(merge(tap(self, "heads", y)))

    def _mask(self, ctx: Context, chosen: Tensor | None) -> Bound:
        if chosen is None:
            return ctx.bind(self.mask, len(ctx.positions))
        marked = ctx.once("marked", lambda: Marked(_by_position(chosen, ctx.positions.index)))
        return ctx.bind(self.mask | marked, len(ctx.positions))

    def _everywhere(self, x: Tensor, y: Tensor, chosen: Tensor, ctx: Context) -> Tensor:
        """y with the rows of the global tokens replaced by full attention."""
        q, k, mask, columns = self._global(x, chosen, ctx)
        return _rows(y, attend(q, k, split(self.v_all(x), self.heads), mask=mask, scale=self.scale), mask, columns)

    def _global(self, x: Tensor, chosen: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Bound, Tensor]:
        """Queries of the global tokens, keys of all, who sees whom, and the columns of the global tokens."""
        count = int(chosen.sum(1).max())
        # the chosen columns of each row first, then others that PAD keeps out
        columns = chosen.long().argsort(dim=1, descending=True, stable=True)[:, :count]
        where = ctx.positions.index.expand(len(chosen), -1)
        real = where.gather(1, columns).where(chosen.gather(1, columns), PAD)
        picked = x.gather(1, columns[..., None].expand(-1, -1, x.shape[2]))
        mask = Bound(Full(), Positions(real, None), Positions(where, None))
        return split(self.q_all(picked), self.heads), split(self.k_all(x), self.heads), mask, columns

    def _weights(
        self, x: Tensor, local: tuple[Tensor, Tensor, Bound], chosen: Tensor | None, ctx: Context, heads: Sequence[int] | None
    ) -> Float[Tensor, "b g t s"]:
        """The weights of the local tokens and, in the rows of the global ones, of theirs."""
        found = weights(*local[:2], mask=local[2], scale=self.scale, heads=heads)
        if chosen is None or not chosen.any():
            return found
        q, k, mask, columns = self._global(x, chosen, ctx)
        return _rows(found, weights(q, k, mask=mask, scale=self.scale, heads=heads), mask, columns)

    def traits(self) -> dict[str, object]:
        return {"heads": self.heads, "mask": self.mask}


def _rows(y: Tensor, full: Tensor, mask: Bound, columns: Int[Tensor, "b g"]) -> Tensor:
    """y with these columns' rows taken from `full`, where its queries are real."""
    at = columns[:, None, :, None].expand_as(full)
    return y.scatter(2, at, full.where((mask.q.index != PAD)[:, None, :, None], y.gather(2, at)))


def _by_position(chosen: Bool[Tensor, "b t"], positions: Int[Tensor, "#b t"]) -> Bool[Tensor, "b n"]:
    """The flags in the order of positions."""
    where = positions.expand(len(chosen), -1)
    flags = torch.zeros(len(chosen), chosen.shape[1] + 1, dtype=torch.bool, device=chosen.device)
    # what stands nowhere is written behind the end
    return flags.scatter(1, where.where(where != PAD, torch.tensor(chosen.shape[1], device=where.device)), chosen)[:, :-1]


class Nobody(nn.Module):
    """No token is global."""

    def forward(self, ids: Int[Tensor, "b t"]) -> Bool[Tensor, "b t"] | None:
        return None


class FirstToken(nn.Module):
    """The first token is global: what classification reads (section 3.1)."""

    def forward(self, ids: Int[Tensor, "b t"]) -> Bool[Tensor, "b t"]:
        chosen = torch.zeros_like(ids, dtype=torch.bool)
        chosen[:, 0] = True
        return chosen


class Question(nn.Module):
    """The tokens before the first separator are global: the question (section 3.1)."""

    def __init__(self, separator: int):
        super().__init__()
        self.separator = separator

    def forward(self, ids: Int[Tensor, "b t"]) -> Bool[Tensor, "b t"]:
        found = ids == self.separator
        if not ids.is_meta and not found.any(1).all():
            raise InputError(
                f"a question should end with the separator {self.separator}, but row {int((~found.any(1)).nonzero()[0])} has none"
            )
        return found.cumsum(1) == 0

    def extra_repr(self) -> str:
        return f"separator={self.separator}"


class Answers(Question):
    """The tokens after the second of the two separators that follow the question are global: the answer to be chosen."""

    def forward(self, ids: Int[Tensor, "b t"]) -> Bool[Tensor, "b t"]:
        after = ~super().forward(ids)
        return after.cumsum(1) > 2


class LongEncoder(Encoder):
    """An encoder some of whose tokens are global: those that the caller names, or else those that `choose` does."""

    def __init__(self, embed: nn.Module, stack: Stack, head: nn.Module, choose: nn.Module):
        super().__init__(embed, stack, head)
        self.choose = choose

    def forward(
        self,
        ids: Int[Tensor, "b t"],
        *,
        mask: Bool[Tensor, "b t"] | None = None,
        segments: Int[Tensor, "b t"] | None = None,
        everywhere: Bool[Tensor, "b t"] | None = None,
    ) -> Output | States:
        """What the head makes of the last states; `everywhere` is True at tokens that see all and are seen by all."""
        return self.head(self.states(ids, mask=mask, segments=segments, everywhere=everywhere))

    def states(
        self,
        ids: Int[Tensor, "b t"],
        *,
        mask: Bool[Tensor, "b t"] | None = None,
        segments: Int[Tensor, "b t"] | None = None,
        everywhere: Bool[Tensor, "b t"] | None = None,
    ) -> Float[Tensor, "b t d"]:
        """The last states, before the head."""
        if everywhere is not None and everywhere.shape != ids.shape:
            raise InputError(f"the global tokens have the shape {tuple(everywhere.shape)}, but the input has {tuple(ids.shape)}")
        plain = context(ids, mask, None)
        ctx = GlobalContext(plain.positions, plain.seen, chosen=self.choose(ids) if everywhere is None else everywhere)
        return self.stack(self.embed(ids, segments, ctx.positions.index), ctx)


def sliding(windows: Sequence[int]) -> list[int]:
    """The one-sided reach of each layer's window, itself counted, from its published width (which is even and leaves the query out)."""
    for width in windows:
        if width <= 0 or width % 2:
            raise InputError(f"a sliding window should be even and positive, found {width}")
    return [width // 2 + 1 for width in windows]
