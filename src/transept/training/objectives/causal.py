"""The next token, L1 (Radford et al. 2018, eq. 1; row 72), on everything or on answers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from transept.core.batch import Batch, Sample
from transept.core.errors import ConfigError, InputError
from transept.core.shapes import Bool, Int, Tensor
from transept.training.objective import Sum
from transept.training.objectives.losses import IGNORE, cross_entropy, given


@dataclass(frozen=True)
class Causal:
    """-sum_i log P(u_i | u_{i-k}, ..., u_{i-1}): every token but the first of each row, given the `window` k tokens before it (all that
    the row holds where it is None).

    The batch has `ids` [b t]; `mask` [b t] where rows are padded; `labels` [b t], the ids to be predicted at their own columns, where some
    are not counted; `document` [b t] where rows are packed, each document's first label not counted.
    """

    window: int | None = None
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ConfigError(f"a window has 1 token or more, found {self.window}")

    def __call__(self, model: nn.Module, batch: Batch, /) -> Sum:
        ids, mask, labels = given(batch, "ids"), batch.get("mask"), targets(batch)
        if ids.shape[1] < 2:
            raise InputError("a row of one token has no next one: rows of two tokens or more were expected")
        if self.window is not None and ids.shape[1] > self.window + 1:
            ids, mask, labels = windows(ids, mask, labels, self.window)
        packed = {"document": batch["document"][:, :-1]} if "document" in batch else {}
        logits = model(ids[:, :-1], mask=None if mask is None else mask[:, :-1], **packed).logits
        return cross_entropy(logits, labels[:, 1:], self.smoothing)


def targets(batch: Batch) -> Int[Tensor, "b t"]:
    """The batch's `labels`, or its ids without the padding."""
    if "labels" in batch:
        return batch["labels"]
    return batch["ids"] if "mask" not in batch else batch["ids"].masked_fill(~batch["mask"], IGNORE)


def windows(
    ids: Int[Tensor, "b t"], mask: Bool[Tensor, "b t"] | None, labels: Int[Tensor, "b t"], reach: int
) -> tuple[Int[Tensor, "n w"], Bool[Tensor, "n w"] | None, Int[Tensor, "n w"]]:
    """Each label with the `reach` tokens before it in a row of its own; those that have fewer share the first row."""
    cut = labels.unfold(1, reach + 1, 1).clone()
    cut[:, 1:, :-1] = IGNORE
    kept = (cut[..., 1:] != IGNORE).any(-1)
    pieces = ids.unfold(1, reach + 1, 1)[kept]
    return pieces, None if mask is None else mask.unfold(1, reach + 1, 1)[kept], cut[kept]


def answer(prompt: Sequence[int], answer: Sequence[int], longest: int | None = None) -> Sample:
    """One sample of supervised fine-tuning: the loss counts the answer only. Of a row longer than `longest` the end is left out.

    Raises InputError where the prompt leaves no room for the answer.
    """
    ids = [*prompt, *answer][:longest]
    if len(prompt) >= len(ids):
        raise InputError(f"the prompt has {len(prompt)} tokens and leaves no room for an answer within {longest}")
    return {"ids": ids, "labels": [*[IGNORE] * len(prompt), *ids[len(prompt) :]]}
