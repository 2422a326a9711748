"""A number for a text or a pair (STS-B, row 62), from a pair read together or from two texts read apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import nn

from transept.core.batch import Batch
from transept.core.errors import InputError
from transept.core.shapes import Bool, Float, Tensor
from transept.training.objective import Sum
from transept.training.objectives.losses import call, given


@dataclass(frozen=True)
class Regression:
    """Squared distance of the model's one score to `scores` [b]."""

    def __call__(self, model: nn.Module, batch: Batch, /) -> Sum:
        logits, scores = call(model, batch).logits, given(batch, "scores")
        if logits.shape != (len(scores), 1):
            raise InputError(f"the model gives {tuple(logits.shape)} scores for {len(scores)} rows; one for each was expected")
        return Sum(F.mse_loss(logits[:, 0].float(), scores.float(), reduction="sum"), len(scores))


@dataclass(frozen=True)
class Alike:
    """Squared distance of the cosine of two texts' mean states to `scores` [n] (Reimers and Gurevych 2019, arXiv 1908.10084, section 3).

    The texts of pair i stand in the rows 2i and 2i + 1 of `ids`.
    """

    def __call__(self, model: nn.Module, batch: Batch, /) -> Sum:
        scores = given(batch, "scores")
        vectors = mean_state(call(model, batch).hidden, batch.get("mask"))
        found = F.cosine_similarity(vectors[::2].float(), vectors[1::2].float())
        return Sum(F.mse_loss(found, scores.float(), reduction="sum"), len(scores))


def mean_state(x: Float[Tensor, "b t d"], mask: Bool[Tensor, "b t"] | None) -> Float[Tensor, "b d"]:
    """The mean over real tokens."""
    return x.mean(1) if mask is None else (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
