"""Layer norm and RMS norm (Ba et al. 2016; Zhang and Sennrich 2019; rows 26, 27): torch's own, under the house's names."""

from __future__ import annotations

from torch import nn

from transept.blocks.traits import Traits


class LayerNorm(Traits, nn.LayerNorm):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension; no running statistics, so a sample never depends on its
    batch.
    """

    def __init__(self, dim: int, eps: float = 1e-5, bias: bool = True):
        super().__init__(dim, eps=eps, bias=bias)

    def traits(self) -> dict[str, object]:
        return {"bias": self.bias is not None}


class RMSNorm(Traits, nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__(dim, eps=eps)


class NoNorm(nn.Identity):
    """The slot left empty."""
