"""Buckets of relative distance (Raffel et al. 2019, arXiv 1910.10683, section 2.1; row 35): near ones exact, far ones by their
logarithm."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from transept.core.shapes import Int, Tensor
from transept.core.spec import Spec


@dataclass(frozen=True, kw_only=True)
class BucketSpec(Spec):
    """How many buckets, the distance from which on all share the last, and whether keys on both sides are told apart."""

    buckets: int
    distance: int
    both: bool


def buckets(distance: Int[Tensor, "..."], spec: BucketSpec) -> Int[Tensor, "..."]:
    """The bucket of each distance key - query.

    Half of one side's buckets are exact; the others grow by a constant factor up to `spec.distance`. Keys to the right use the upper half
    of the table where both sides count, and bucket 0 where they do not.
    """
    per_side = spec.buckets // 2 if spec.both else spec.buckets
    first = (distance > 0).long() * per_side if spec.both else torch.zeros_like(distance)
    far = distance.abs() if spec.both else (-distance).clamp(min=0)
    exact = per_side // 2
    # In float32, as the published tables were trained: at the edges of buckets another precision chooses otherwise.
    grown = exact + (torch.log(far.clamp(min=1).float() / exact) / math.log(spec.distance / exact) * (per_side - exact)).long()
    return first + torch.where(far < exact, far, grown.clamp(max=per_side - 1))
