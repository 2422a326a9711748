"""The class of a text or of a pair, L2 (Radford et al. 2018, eq. 4; Devlin et al. 2018, section 4.1; row 58)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from transept.core.batch import Batch
from transept.training.objective import Sum
from transept.training.objectives.losses import call, cross_entropy, given, right


@dataclass(frozen=True)
class Classification:
    """`labels` [b] number the class of each row; a pair is a row with `segments`."""

    smoothing: float = 0.0

    def __call__(self, model: nn.Module, batch: Batch, /) -> Sum:
        logits, labels = call(model, batch).logits, given(batch, "labels")
        loss = cross_entropy(logits, labels, self.smoothing)
        return Sum(loss.loss, loss.count, {"accuracy": right(logits, labels)})


@dataclass(frozen=True)
class Tokens(Classification):
    """`labels` [b t] number the class of each token, IGNORE where none is asked (row 60): the same sum, over tokens."""


@dataclass(frozen=True)
class Choice:
    """`labels` [n] say which of the alternatives of question n is right; they stand in adjacent rows of `ids` [n * choices t], and the
    model scores each row once (Radford et al. 2018, section 3.3)."""

    def __call__(self, model: nn.Module, batch: Batch, /) -> Sum:
        labels = given(batch, "labels")
        scores = call(model, batch).logits.view(len(labels), -1)
        loss = cross_entropy(scores, labels)
        return Sum(loss.loss, loss.count, {"accuracy": right(scores, labels)})
