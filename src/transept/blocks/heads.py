"""What is read off the last states: tokens, or classes (rows 38, 58)."""

from __future__ import annotations

import torch
from torch import nn

from transept.blocks.embeddings import TokenEmbedding
from transept.core.shapes import Float, Tensor


class Head(nn.Linear):
    """A linear map from the model's width to one score per token of the vocabulary or per class."""

    def __init__(self, dim: int, outputs: int, bias: bool = False):
        super().__init__(dim, outputs, bias=bias)


class TiedHead(nn.Module):
    """Scores by the token table itself (Press and Wolf 2016): it owns no weight."""

    def __init__(self, embedding: TokenEmbedding):
        super().__init__()
        # In a tuple, so that the table is registered once, under its own name.
        self.source = (embedding,)

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... v"]:
        return nn.functional.linear(x, self.source[0].weight)


class Projected(nn.Module):
    """A narrower width first, then the head (OPT-350m)."""

    def __init__(self, project: nn.Module, head: nn.Module):
        super().__init__()
        self.project, self.head = project, head

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... v"]:
        return self.head(self.project(x))


def at(x: Float[Tensor, "b t d"], index: torch.Tensor) -> Float[Tensor, "b d"]:
    """Row i's state at column index[i]."""
    return x[torch.arange(len(x), device=x.device), index]
