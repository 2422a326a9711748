"""Which experts a token goes to (DeepSeek-V3, arXiv 2412.19437, eq. 12-16; row 82b)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from transept.core.shapes import Float, Int, Tensor
from transept.core.spec import Spec


@dataclass(frozen=True, kw_only=True)
class RouteSpec(Spec):
    """`chosen` of `experts` per token, from the best `top_groups` of `groups`; weights normalised to sum to one, times `scale`."""

    experts: int
    chosen: int
    groups: int = 1
    top_groups: int = 1
    normalise: bool = True
    scale: float = 1.0


def route(logits: Float[Tensor, "m n"], correction: Float[Tensor, "n"], s: RouteSpec) -> tuple[Int[Tensor, "m x"], Float[Tensor, "m x"]]:
    """The chosen experts of m tokens and their weights.

    Scores are sigmoid(logits); the correction is added for choosing only (eq. 16), a group's score is the sum of its two best, and the
    weights are the uncorrected scores (eq. 13-15).
    """
    scores = logits.sigmoid()
    biased = scores + correction
    grouped = biased.view(-1, s.groups, s.experts // s.groups)
    best = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1).topk(s.top_groups, dim=-1).indices
    kept = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter(1, best, True)
    biased = grouped.masked_fill(~kept[..., None], float("-inf")).flatten(1)
    chosen = biased.topk(s.chosen, dim=-1).indices
    weight = scores.gather(1, chosen)
    if s.normalise:
        weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)
    return chosen, weight * s.scale
