"""A target given its source, with label smoothing (Vaswani et al. 2017, sections 3.1 and 5.4; rows 7, 39, 123)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from transept.core.batch import Batch, Sample
from transept.training.objective import Sum
from transept.training.objectives.losses import given, right, smoothed


@dataclass(frozen=True)
class Seq2Seq:
    """Each token of the target given the earlier ones and the source, all at once. The batch has `source` [b s], `ids` and `labels` [b t],
    and the masks `source_mask` and `mask` where they are padded. The metric `nll` is the loss without smoothing."""

    smoothing: float = 0.1

    def __call__(self, model: nn.Module, batch: Batch, /) -> Sum:
        labels = given(batch, "labels")
        source, mask = given(batch, "source"), batch.get("mask")
        logits = model(given(batch, "ids"), source=source, source_mask=batch.get("source_mask"), mask=mask).logits
        loss, plain = smoothed(logits, labels, self.smoothing)
        return Sum(loss.loss, loss.count, {"nll": plain, "accuracy": right(logits, labels)})


def shifted(source: Sequence[int], target: Sequence[int], start: int, end: int) -> Sample:
    """A sample: the decoder reads `start` and the target, and writes the target and `end`; "outputs (shifted right)" in figure 1."""
    return {"source": [*source], "ids": [start, *target], "labels": [*target, end]}
