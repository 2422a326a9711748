"""L3 = L2 + lambda L1: the language model's loss kept while a task is learnt (Radford et al. 2018, eq. 5; row 73)."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from transept.core.batch import Batch
from transept.core.shapes import Tensor
from transept.training.objective import Sum
from transept.training.objectives.causal import targets
from transept.training.objectives.losses import IGNORE, call, given, negative_log, right, row_means


class Auxiliary(nn.Module):
    """Of each row the loss of its class `labels` [b] plus `weight` times the mean loss of its next tokens, as the paper's own code counts.

    `words` makes scores of the vocabulary from the last states, such as the `TiedHead` of the model's token table.
    """

    def __init__(self, words: Callable[[Tensor], Tensor], weight: float = 0.5):
        super().__init__()
        self.words, self.weight = words, weight

    def forward(self, model: nn.Module, batch: Batch, /) -> Sum:
        out, labels = call(model, batch), given(batch, "labels")
        following = targets({name: value for name, value in batch.items() if name != "labels"})[:, 1:]
        task = negative_log(out.logits, labels)
        text = row_means(negative_log(self.words(out.hidden[:, :-1]), following), following != IGNORE)
        figures = {"task": task.sum().detach(), "lm": text.sum().detach(), "accuracy": right(out.logits, labels)}
        return Sum((task + self.weight * text).sum(), len(labels), figures)
