"""What is read off the last states: tokens, classes, or a choice (rows 38, 58, 71)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from transept.blocks.block import Block
from transept.blocks.cache import Cache
from transept.blocks.embeddings import TokenEmbedding
from transept.blocks.stack import Decoder, Output, Trunk
from transept.core.errors import InputError
from transept.core.shapes import Bool, Float, Int, Tensor


class Head(nn.Linear):
    """A linear map from the model's width to one score per token of the vocabulary or per class."""

    def __init__(self, dim: int, outputs: int, bias: bool = False):
        super().__init__(dim, outputs, bias=bias)


class TiedHead(nn.Module):
    """Scores by the token table itself (Press and Wolf 2016), the states multiplied by `scale` before: it owns no weight."""

    def __init__(self, embedding: TokenEmbedding, scale: float = 1.0):
        super().__init__()
        self.scale = scale
        # In a tuple, so that the table is registered once, under its own name.
        self.source = (embedding,)

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... v"]:
        return nn.functional.linear(x if self.scale == 1.0 else x * self.scale, self.source[0].weight)


class Shifted(nn.Module):
    """A head with a fixed number added to each score (Marian's and BART's bias of the last logits)."""

    def __init__(self, head: nn.Module, outputs: int):
        super().__init__()
        self.head = head
        self.shift = nn.Buffer(torch.zeros(outputs))

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... v"]:
        return self.head(x) + self.shift


class Projected(nn.Module):
    """A narrower width first, then the head (OPT-350m)."""

    def __init__(self, project: nn.Module, head: nn.Module):
        super().__init__()
        self.project, self.head = project, head

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... v"]:
        return self.head(self.project(x))


class Classifier(Trunk):
    """Scores classes by the state of each row's last real token (Radford et al. 2018, eq. 3)."""

    def __init__(self, embed: nn.Module, layers: Sequence[Block], norm: nn.Module, head: nn.Module):
        super().__init__(embed, layers, norm)
        self.head = head

    def forward(self, ids: Int[Tensor, "b t"], *, mask: Bool[Tensor, "b t"] | None = None) -> Output:
        """Logits of each row [b classes], and every token's last state."""
        hidden = self.hidden(ids, mask=mask)
        return Output(logits=self.head(at(hidden, last_real(ids, mask))), hidden=hidden)


@dataclass
class ChoiceOutput(Output):
    """`choice` is the score of each row among its alternatives (Radford et al. 2018, section 3.3)."""

    choice: Float[Tensor, "b"]


class DoubleHead(Decoder):
    """A decoder with a second head: a row's score as one of several answers, read at a token of the caller's choosing."""

    def __init__(self, embed: nn.Module, layers: Sequence[Block], norm: nn.Module, head: nn.Module, choice: nn.Module):
        super().__init__(embed, layers, norm, head)
        self.choice = choice

    def forward(
        self,
        ids: Int[Tensor, "b t"],
        *,
        mask: Bool[Tensor, "b t"] | None = None,
        cache: Cache | None = None,
        column: Int[Tensor, "b"] | None = None,
    ) -> ChoiceOutput:
        """Logits of every token, and each row's score at `column`, its last real token where none is given."""
        hidden = self.hidden(ids, mask=mask, cache=cache)
        where = last_real(ids, mask) if column is None else column
        return ChoiceOutput(logits=self.head(hidden), hidden=hidden, choice=self.choice(at(hidden, where))[:, 0])


def at(x: Float[Tensor, "b t d"], index: Int[Tensor, "b"]) -> Float[Tensor, "b d"]:
    """Row i's state at column index[i]; a column that is not there is refused."""
    if not index.is_meta and not 0 <= int(index.min()) <= int(index.max()) < x.shape[1]:
        raise InputError(f"a head reads column {int(index.max())}, but the input has the columns 0 to {x.shape[1] - 1}")
    return x[torch.arange(len(x), device=x.device), index]


def last_real(ids: Int[Tensor, "b t"], mask: Bool[Tensor, "b t"] | None) -> Int[Tensor, "b"]:
    """The column of each row's last real token."""
    columns = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return columns.amax(1) if mask is None else (columns * mask).amax(1)
