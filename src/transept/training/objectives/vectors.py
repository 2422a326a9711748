"""Word vectors: skip-gram and CBOW with negative sampling (Mikolov et al. 2013, arXiv 1310.4546, eq. 4), GloVe (Pennington et al. 2014, eq.
8). Rows 9, 10. The models' pages hold the equations."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from transept.core.batch import Batch
from transept.training.objective import Sum
from transept.training.objectives.losses import given


@dataclass(frozen=True)
class Negatives:
    """Counted by true pairs: `centre` [b], `near` and `real` [b w], `negatives` [b n], whatever the model predicts from which."""

    def __call__(self, model: nn.Module, batch: Batch, /) -> Sum:
        loss = model(*(given(batch, name) for name in ("centre", "near", "real", "negatives")))
        return Sum(loss.float(), batch["real"].sum())


@dataclass(frozen=True)
class Cooccurrence:
    """Counted by cells of the table: words `i` and `j` [b], how often they stand near each other `times` [b]."""

    def __call__(self, model: nn.Module, batch: Batch, /) -> Sum:
        loss = model(*(given(batch, name) for name in ("i", "j", "times")))
        return Sum(loss.float(), len(batch["i"]))
