"""Encoders: every token sees every other, and a head in a slot says what is read off the last states (rows 37, 52-60)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from transept.blocks.block import Block
from transept.blocks.cache import Cache, Room
from transept.blocks.context import Context
from transept.blocks.dropout import Dropout
from transept.blocks.embeddings import TokenEmbedding
from transept.blocks.heads import Head, TiedHead
from transept.blocks.norms import LayerNorm, NoNorm
from transept.blocks.stack import Output, Stack, context
from transept.core.errors import InputError
from transept.core.shapes import Bool, Float, Int, Tensor
from transept.core.tap import tap
from transept.ops.activations import Act
from transept.ops.masks import PAD


@dataclass
class States:
    """What an encoder without a head returns: every token's last state."""

    hidden: Float[Tensor, "b t d"]


@dataclass
class PooledStates(States):
    """Last states, and each row's summary, read at its first token."""

    pooled: Float[Tensor, "b d"]


@dataclass
class PairOutput(Output):
    """`nsp` scores whether the second text follows the first: column 0 says that it does (Devlin et al. 2018, section 3.1, task 2)."""

    nsp: Float[Tensor, "b 2"]


@dataclass
class SpanOutput(States):
    """Scores of each token as the first and as the last of the answer."""

    start: Float[Tensor, "b t"]
    end: Float[Tensor, "b t"]


class EncoderEmbedding(nn.Module):
    """Tokens, segments and positions added, normed, dropped out, then brought to the model's width: each but the tokens a slot (row 53)."""

    def __init__(
        self,
        tokens: TokenEmbedding,
        norm: nn.Module,
        *,
        segments: TokenEmbedding | None = None,
        position: nn.Module | None = None,
        project: nn.Module | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.tokens, self.segments, self.position, self.norm, self.project = tokens, segments, position, norm, project
        self.dropout = Dropout(dropout)

    def forward(
        self, ids: Int[Tensor, "b t"], segments: Int[Tensor, "b t"] | None, positions: Int[Tensor, "#b t"]
    ) -> Float[Tensor, "b t d"]:
        """The first states; without `segments` every token belongs to segment 0. A model without segments refuses a second one."""
        x = self.tokens(ids)
        if segments is not None and segments.shape != ids.shape:
            raise InputError(f"the segments have the shape {tuple(segments.shape)}, but the input has {tuple(ids.shape)}")
        if self.segments is not None:
            x = x + self.segments(torch.zeros_like(ids) if segments is None else segments)
        elif segments is not None and not segments.is_meta and segments.any():
            raise InputError("the input has a second segment, but this model has no segments")
        if self.position is not None:
            x = self.position(x, positions)
        x = self.dropout(self.norm(x))
        return tap(self, "embed", x if self.project is None else self.project(x))


class MaskedEmbedding(EncoderEmbedding):
    """The same, with zeros where there is no token (He et al. 2020, as published)."""

    def forward(
        self, ids: Int[Tensor, "b t"], segments: Int[Tensor, "b t"] | None, positions: Int[Tensor, "#b t"]
    ) -> Float[Tensor, "b t d"]:
        x = super().forward(ids, segments, positions)
        return x * (positions != PAD)[..., None]


class SharedStack(Stack):
    """`order` names the groups of layers to apply, the same ones again and again (Lan et al. 2019, section 3.1; row 66)."""

    def __init__(self, groups: Sequence[Sequence[Block]], order: Sequence[int]):
        super().__init__([nn.ModuleList(group) for group in groups], NoNorm())
        self.order = tuple(order)

    def forward(self, x: Float[Tensor, "b t d"], ctx: Context, cache: Cache | None = None) -> Float[Tensor, "b t d"]:
        for group in self.order:
            for layer in self.layers[group].children():
                x = layer(x, ctx)
        return tap(self, "hidden", self.norm(x))

    def extra_repr(self) -> str:
        return f"order={self.order}"


class Encoder(nn.Module):
    """embed, stack, head: reads a whole text at once, in both directions (row 37)."""

    def __init__(self, embed: nn.Module, stack: Stack, head: nn.Module):
        super().__init__()
        self.embed, self.stack, self.head = embed, stack, head

    def forward(
        self, ids: Int[Tensor, "b t"], *, mask: Bool[Tensor, "b t"] | None = None, segments: Int[Tensor, "b t"] | None = None
    ) -> Output | States:
        """What the head makes of the last states; `mask` is True at real tokens, `segments` counts the texts of a pair."""
        return self.head(self.states(ids, mask=mask, segments=segments))

    def states(
        self, ids: Int[Tensor, "b t"], *, mask: Bool[Tensor, "b t"] | None = None, segments: Int[Tensor, "b t"] | None = None
    ) -> Float[Tensor, "b t d"]:
        """The last states, before the head."""
        ctx = context(ids, mask, None)
        return self.stack(self.embed(ids, segments, ctx.positions.index), ctx)


class LeftToRight(nn.Module):
    """An encoder's diagram under a causal mask, which writes token by token."""

    def __init__(self, embed: EncoderEmbedding, stack: Stack, head: NextWordHead):
        super().__init__()
        self.embed, self.stack, self.head = embed, stack, head

    def forward(
        self,
        ids: Int[Tensor, "b t"],
        *,
        mask: Bool[Tensor, "b t"] | None = None,
        segments: Int[Tensor, "b t"] | None = None,
        cache: Cache | None = None,
    ) -> Output:
        """Logits and last states of every token; `mask` is True at real tokens, `cache` remembers what came before."""
        hidden = self.hidden(ids, mask=mask, segments=segments, cache=cache)
        return Output(logits=self.head(hidden), hidden=hidden)

    def hidden(
        self,
        ids: Int[Tensor, "b t"],
        *,
        mask: Bool[Tensor, "b t"] | None = None,
        segments: Int[Tensor, "b t"] | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "b t d"]:
        """The last states, before the head."""
        ctx = context(ids, mask, cache)
        return self.stack(self.embed(ids, segments, ctx.positions.index), ctx, cache)

    def cache(self, batch: int, capacity: int = 64) -> Cache:
        """An empty cache for `batch` rows, with room for `capacity` columns before it must grow."""
        weight = next(self.parameters())
        return self.stack.cache(Room(batch, capacity, weight.dtype, weight.device))


class Bare(nn.Module):
    """The slot left empty: last states only."""

    def forward(self, x: Float[Tensor, "b t d"]) -> States:
        return States(hidden=x)


class Pool(nn.Linear):
    """act(W x_0 + b): a row's summary is made of its first token's state."""

    def __init__(self, dim: int, act: Act):
        super().__init__(dim, dim)
        self.act = act

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b d"]:
        return tap(self, "pooled", self.act(super().forward(x[:, 0])))


class First(nn.Module):
    """A row's summary is its first token's state as it is."""

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b d"]:
        return x[:, 0]


class Last(nn.Module):
    """A row's summary is the state in its last column: padding stands on the left."""

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b d"]:
        return x[:, -1]


class Pooled(nn.Module):
    """Last states and the summary of each row."""

    def __init__(self, pool: nn.Module):
        super().__init__()
        self.pool = pool

    def forward(self, x: Float[Tensor, "b t d"]) -> PooledStates:
        return PooledStates(hidden=x, pooled=self.pool(x))


class RowHead(nn.Module):
    """Classes of a whole row from its summary (row 58)."""

    def __init__(self, dim: int, classes: int, pool: nn.Module, dropout: float = 0.0):
        super().__init__()
        self.pool = pool
        self.dropout = Dropout(dropout)
        self.out = Head(dim, classes, bias=True)

    def forward(self, x: Float[Tensor, "b t d"]) -> Output:
        return Output(logits=self.out(self.dropout(self.pool(x))), hidden=x)


class NextHead(RowHead):
    """Does the second text follow the first (row 55), or stand in the right order (ALBERT's SOP): two classes, also named nsp."""

    def __init__(self, dim: int, pool: nn.Module):
        super().__init__(dim, 2, pool)

    def forward(self, x: Float[Tensor, "b t d"]) -> PairOutput:
        logits = super().forward(x).logits
        return PairOutput(logits=logits, hidden=x, nsp=logits)


class TokenHead(nn.Module):
    """Classes of each token (row 60)."""

    def __init__(self, dim: int, classes: int, dropout: float = 0.0):
        super().__init__()
        self.dropout = Dropout(dropout)
        self.out = Head(dim, classes, bias=True)

    def forward(self, x: Float[Tensor, "b t d"]) -> Output:
        return Output(logits=self.out(self.dropout(x)), hidden=x)


class SpanHead(nn.Module):
    """Two vectors, whose products with each state say where an answer starts and ends (row 59)."""

    def __init__(self, dim: int):
        super().__init__()
        self.out = Head(dim, 2, bias=True)

    def forward(self, x: Float[Tensor, "b t d"]) -> SpanOutput:
        start, end = self.out(x).unbind(-1)
        return SpanOutput(hidden=x, start=start, end=end)


class Words(nn.Module):
    """norm(act(dense(x))) times the token table, plus a bias for each token of the vocabulary (row 54)."""

    def __init__(self, dim: int, tokens: TokenEmbedding, act: Act, eps: float):
        super().__init__()
        vocab, width = tokens.weight.shape
        self.act = act
        self.dense = nn.Linear(dim, width)
        self.norm = LayerNorm(width, eps)
        self.out = TiedHead(tokens)
        self.bias = nn.Parameter(torch.zeros(vocab))

    def scores(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... v"]:
        """Scores of the vocabulary at every token."""
        return self.out(self.norm(self.act(self.dense(x)))) + self.bias


class MaskedHead(Words):
    """The words that stand where the masks are."""

    def forward(self, x: Float[Tensor, "b t d"]) -> Output:
        return Output(logits=self.scores(x), hidden=x)


class NextWordHead(Words):
    """The word that follows each."""

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... v"]:
        return self.scores(x)


class PretrainHead(nn.Module):
    """Both of BERT's objectives on the same states (row 56)."""

    def __init__(self, mlm: MaskedHead, next: NextHead):
        super().__init__()
        self.mlm, self.next = mlm, next

    def forward(self, x: Float[Tensor, "b t d"]) -> PairOutput:
        return PairOutput(logits=self.mlm.scores(x), hidden=x, nsp=self.next(x).nsp)


class ReplacedHead(nn.Module):
    """Was this token replaced? One score for each, out(act(dense(x))) (Clark et al. 2020, eq. 1; row 67)."""

    def __init__(self, dim: int, act: Act):
        super().__init__()
        self.act = act
        self.dense = nn.Linear(dim, dim)
        self.out = Head(dim, 1, bias=True)

    def forward(self, x: Float[Tensor, "b t d"]) -> Output:
        return Output(logits=self.out(self.act(self.dense(x)))[..., 0], hidden=x)
