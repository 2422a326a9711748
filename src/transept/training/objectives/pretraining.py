"""BERT's two objectives together, summed or in turns (Devlin et al. 2018, section 3.1; row 56)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from transept.core.batch import Batch
from transept.core.shapes import Tensor
from transept.training.objective import Sum
from transept.training.objectives.losses import IGNORE, call, given, negative_log, right, row_means
from transept.training.objectives.masked import Masked, states_of, words_at
from transept.training.objectives.pairs import NextSentence


class Summed(nn.Module):
    """Of each row the mean loss of its masked words plus that of its pair.

    Equal to the published sum of two means where all rows have equally many masked words; counted by rows, so that any split of the batch
    gives the same gradient. The batch has `ids`, `segments`, `labels` [b t] and `next` [b]. With `sparse` the vocabulary is scored
    at masked words only.
    """

    def __init__(self, sparse: bool = False):
        super().__init__()
        self.sparse = sparse

    def forward(self, model: nn.Module, batch: Batch, /) -> Sum:
        labels, follows = given(batch, "labels"), given(batch, "next")
        chosen = labels != IGNORE
        scores, pair = _scores(model, batch, chosen) if self.sparse else _all_scores(model, batch, chosen)
        losses = torch.zeros(labels.shape, device=labels.device).masked_scatter(chosen, negative_log(scores, labels[chosen]))
        words, pairs = row_means(losses, chosen), negative_log(pair, follows)
        figures = {
            "mlm": words.sum().detach(),
            "nsp": pairs.sum().detach(),
            "mlm_accuracy": right(scores, labels[chosen]),
            "nsp_accuracy": right(pair, follows),
        }
        return Sum((words + pairs).sum(), len(labels), figures)


def _all_scores(model: nn.Module, batch: Batch, chosen: Tensor) -> tuple[Tensor, Tensor]:
    out = call(model, batch)
    return out.logits[chosen], out.nsp


def _scores(model: Any, batch: Batch, chosen: Tensor) -> tuple[Tensor, Tensor]:
    states = states_of(model, batch)
    return words_at(model, states, chosen), model.head.next(states).nsp


class Turns(nn.Module):
    """One update masked words, the next one pairs, with the same network and heads; which is next is saved with the run."""

    turn: Tensor

    def __init__(self, sparse: bool = False):
        super().__init__()
        self.register_buffer("turn", torch.zeros((), dtype=torch.long))
        self.words, self.pairs = Masked(sparse), NextSentence()

    def forward(self, model: nn.Module, batch: Batch, /) -> Sum:
        return self.pairs(model, batch) if self.turn.item() else self.words(model, batch)

    def after_step(self, model: nn.Module) -> None:
        """The other objective's turn."""
        self.turn.copy_(1 - self.turn)
