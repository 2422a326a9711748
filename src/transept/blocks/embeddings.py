"""From tokens to vectors (row 30)."""

from __future__ import annotations

import torch
from torch import nn

from transept.blocks.dropout import Dropout
from transept.blocks.traits import Traits
from transept.core.errors import InputError
from transept.core.shapes import Float, Int, Tensor
from transept.core.tap import tap


class TokenEmbedding(Traits, nn.Module):
    """A learned vector for each of `vocab` tokens, looked up by id (equal to a one-hot vector times the table)."""

    def __init__(self, vocab: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab, dim).normal_(std=0.02))

    def forward(self, ids: Int[Tensor, "b t"]) -> Float[Tensor, "b t d"]:
        """The vectors of the ids; an id outside the vocabulary is refused with both numbers."""
        # Compiled code cannot stop to look at a number; it checks the bounds of each lookup itself.
        seen = not ids.is_meta and not torch.compiler.is_compiling() and ids.numel()
        if seen and not 0 <= int(ids.min()) <= int(ids.max()) < self.weight.shape[0]:
            bad = int(ids.max()) if int(ids.max()) >= self.weight.shape[0] else int(ids.min())
            raise InputError(f"token id {bad} is outside the vocabulary of {self.weight.shape[0]} tokens")
        return nn.functional.embedding(ids, self.weight)

    def traits(self) -> dict[str, object]:
        return {"vocab": self.weight.shape[0], "dim": self.weight.shape[1]}


class SharedTokens(nn.Module):
    """The token table of another part of the model, which owns it."""

    def __init__(self, owner: TokenEmbedding):
        super().__init__()
        # In a tuple, so that the table is registered once, under its own name.
        self.source = (owner,)

    def forward(self, ids: Int[Tensor, "b t"]) -> Float[Tensor, "b t d"]:
        return self.source[0](ids)


class Scale(nn.Module):
    """factor * x: the token vectors of the 2017 transformer are multiplied by sqrt(d) (Vaswani et al. 2017, section 3.4)."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        return x * self.factor

    def extra_repr(self) -> str:
        return f"{self.factor:g}"


class Embedding(nn.Module):
    """Tokens, then a projection (to the model's width where the table is narrower, or a scale), positions, a norm, dropout: each a slot."""

    def __init__(
        self,
        tokens: nn.Module,
        position: nn.Module | None = None,
        project: nn.Module | None = None,
        norm: nn.Module | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.tokens, self.project, self.position, self.norm = tokens, project, position, norm
        self.dropout = Dropout(dropout)

    def forward(self, ids: Int[Tensor, "b t"], positions: Int[Tensor, "#b t"]) -> Float[Tensor, "b t d"]:
        x = self.tokens(ids)
        if self.project is not None:
            x = self.project(x)
        if self.position is not None:
            x = self.position(x, positions)
        if self.norm is not None:
            x = self.norm(x)
        return tap(self, "embed", self.dropout(x))
