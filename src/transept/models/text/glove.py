"""GloVe (Pennington et al. 2014): word vectors by weighted least squares on the logarithms of co-occurrence counts. Row 10."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from transept.blocks.embeddings import TokenEmbedding
from transept.core.registry import Family
from transept.core.shapes import Float, Int, Tensor
from transept.core.spec import Spec


@dataclass(frozen=True, kw_only=True)
class GloveSpec(Spec):
    """Size of the vocabulary and the vectors, how far a window reaches, and the weight f(x) = min(1, (x/most)^power) of a count (eq. 9)."""

    vocab: int
    dim: int
    window: int = 10
    most: float = 100.0
    power: float = 0.75


class Glove(nn.Module):
    """Two tables and two biases, alike by symmetry: their sum is the word's vector (section 4.2)."""

    def __init__(self, s: GloveSpec):
        super().__init__()
        self.most, self.power = s.most, s.power
        self.words, self.context = TokenEmbedding(s.vocab, s.dim), TokenEmbedding(s.vocab, s.dim)
        self.bias, self.context_bias = nn.Parameter(torch.zeros(s.vocab)), nn.Parameter(torch.zeros(s.vocab))
        for table in (self.words, self.context):
            nn.init.uniform_(table.weight, -0.5 / s.dim, 0.5 / s.dim)

    def forward(self, i: Int[Tensor, "b"], j: Int[Tensor, "b"], count: Float[Tensor, "b"]) -> Float[Tensor, ""]:
        """sum f(x) (w_i w_j + b_i + b_j - log x)^2 over the given cells (eq. 8)."""
        fit = (self.words.weight[i] * self.context.weight[j]).sum(1) + self.bias[i] + self.context_bias[j]
        weight = (count / self.most).clamp(max=1.0) ** self.power
        return (weight * (fit - count.log()).square()).sum()

    @property
    def vectors(self) -> Float[Tensor, "v d"]:
        """The sum of both tables."""
        return self.words.weight + self.context.weight


def build(s: GloveSpec) -> Glove:
    """The model of the paper's equation 8."""
    return Glove(s)


SIZES = {"glove-6b-300d": GloveSpec(vocab=400_000, dim=300)}
TINY = {"one": GloveSpec(vocab=40, dim=12)}

FAMILY = Family(name="glove", spec=GloveSpec, build=build, sizes=SIZES, tiny=TINY, source="https://nlp.stanford.edu/pubs/glove.pdf")
