"""Where an answer starts and ends (Devlin et al. 2018, section 4.2; row 59)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from transept.core.batch import Batch
from transept.core.shapes import Float, Tensor
from transept.training.objective import Sum
from transept.training.objectives.losses import IGNORE, call, given, negative_log


@dataclass(frozen=True)
class Span:
    """Half of the cross-entropies of `start` and `end` [b], columns of the row; a column beyond it, or IGNORE, is not counted.

    A row whose answer lies elsewhere has both at column 0.
    """

    def __call__(self, model: nn.Module, batch: Batch, /) -> Sum:
        out = call(model, batch)
        start, end = given(batch, "start"), given(batch, "end")
        exact = (out.start.argmax(1) == start) & (out.end.argmax(1) == end)
        return Sum((self.side(out.start, start) + self.side(out.end, end)) / 2, len(start), {"exact": exact.sum()})

    def side(self, scores: Float[Tensor, "b t"], column: Tensor) -> Tensor:
        """The summed cross-entropy of one end."""
        return negative_log(scores, column.masked_fill(column >= scores.shape[1], IGNORE)).sum()
