"""The sums that the objectives share, and rows of unlike length as one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from transept.core.batch import Batch
from transept.core.errors import InputError, nearest
from transept.core.shapes import Bool, Float, Int, Tensor
from transept.training.objective import Sum

IGNORE = -100
"""The label of what is not counted."""

FILLS: dict[str, Any] = {"ids": 0, "source": 0, "segments": 0, "labels": IGNORE, "noise": 0.0}
"""What stands in the columns behind a short row; a name with no fill holds one number for each row."""


def given(batch: Batch, name: str) -> Tensor:
    """A tensor of the batch; a name that is not there is refused with the nearest."""
    if name not in batch:
        raise InputError(f"the batch has no {name!r}{nearest(name, batch)}; it has {', '.join(batch)}")
    return batch[name]


def call(model: nn.Module, batch: Batch) -> Any:
    """The model on the batch's ids, with the mask and the segments that it carries."""
    return model(given(batch, "ids"), **{name: batch[name] for name in ("mask", "segments") if name in batch})


def negative_log(logits: Float[Tensor, "*n v"], labels: Int[Tensor, "*n"], smoothing: float = 0.0) -> Float[Tensor, "*n"]:
    """Of each label its cross-entropy in float32, 0 where it is IGNORE.

    `smoothing` e puts (1 - e) on the label and e / v on every class (Szegedy et al. 2015, section 7).
    """
    flat = F.cross_entropy(
        logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORE, reduction="none", label_smoothing=smoothing
    )
    return flat.view(labels.shape)


def cross_entropy(logits: Float[Tensor, "*n v"], labels: Int[Tensor, "*n"], smoothing: float = 0.0) -> Sum:
    """The sum over all labels that are not IGNORE, and how many they are."""
    loss = F.cross_entropy(
        logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORE, reduction="sum", label_smoothing=smoothing
    )
    return Sum(loss, (labels != IGNORE).sum())


def smoothed(logits: Float[Tensor, "*n v"], labels: Int[Tensor, "*n"], smoothing: float) -> tuple[Sum, Tensor]:
    """`cross_entropy` with smoothing, and the sum without it, from the same log-probabilities."""
    counted, logs = labels != IGNORE, logits.float().log_softmax(-1)
    plain = F.nll_loss(logs.flatten(0, -2), labels.flatten(), ignore_index=IGNORE, reduction="sum")
    even = -torch.where(counted, logs.sum(-1), 0.0).sum() / logs.shape[-1]
    return Sum(torch.lerp(plain, even, smoothing), counted.sum()), plain.detach()


def right(logits: Float[Tensor, "*n v"], labels: Int[Tensor, "*n"]) -> tuple[Tensor, Tensor]:
    """How many labels are the class with the highest score, and how many there are: the metric `accuracy`."""
    return (logits.detach().argmax(-1) == labels).sum(), (labels != IGNORE).sum()


def row_means(losses: Float[Tensor, "b t"], counted: Bool[Tensor, "b t"]) -> Float[Tensor, "b"]:
    """Each row's mean over what it counts, 0 where that is nothing.

    Objectives that add losses of unlike counts add these, so that any split of a batch gives the same sum.
    """
    return (losses * counted).sum(1) / counted.sum(1).clamp(min=1)


def stacked(samples: Sequence[Mapping[str, Any]], fills: Mapping[str, Any] | None = None) -> Batch:
    """Samples with the same names as one batch: lists and vectors are padded on the right with their name's fill, numbers are stacked.

    `mask` (for `ids`) and `source_mask` (for `source`), True at real tokens, are added where something was padded.
    """
    if not samples:
        raise InputError("a batch needs at least one sample")
    fills = FILLS if fills is None else {**FILLS, **fills}
    batch: Batch = {}
    for name in samples[0]:
        rows = [torch.as_tensor(sample[name]) for sample in samples]
        if rows[0].dim() == 0 or name not in fills:
            batch[name] = torch.stack(rows)
            continue
        longest = max(len(row) for row in rows)
        batch[name] = torch.stack([F.pad(row, (0, longest - len(row)), value=fills[name]) for row in rows])
        mask = {"ids": "mask", "source": "source_mask"}.get(name)
        if mask is not None and any(len(row) != longest for row in rows):
            batch[mask] = torch.arange(longest) < torch.tensor([len(row) for row in rows])[:, None]
    return batch
