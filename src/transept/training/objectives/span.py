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

    A row whose answer lies elsewhere has both at column 0. Padding is no candidate, so a row's loss does not depend on those beside it.
    """

    def __call__(self, model: nn.Module, batch: Batch, /) -> Sum:
        out = call(model, batch)
        start, end = given(batch, "start"), given(batch, "end")
        starts, ends = (x if "mask" not in batch else x.float().masked_fill(~batch["mask"], float("-inf")) for x in (out.start, out.end))
        exact = (starts.argmax(1) == start) & (ends.argmax(1) == end)
        return Sum((self.side(starts, start) + self.side(ends, end)) / 2, len(start), {"exact": exact.sum()})

    def side(self, scores: Float[Tensor, "b t"], column: Tensor) -> Tensor:
        """The summed cross-entropy of one end."""
        return negative_log(scores, column.masked_fill(column >= scores.shape[1], IGNORE)).sum()
