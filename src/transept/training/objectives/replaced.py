"""Replaced-token detection (Clark et al. 2020, arXiv 2003.10555, section 2; row 67)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from transept.core.batch import Batch
from transept.core.shapes import Float, Int, Tensor
from transept.training.objective import Sum
from transept.training.objectives.losses import IGNORE, call, given, negative_log, right, row_means


class Replaced(nn.Module):
    """A small `generator` fills masks; the model finds which tokens it replaced: L_MLM(generator) + `weight` L_Disc(model) (eq. 3).

    Both losses are means of each row, counted by rows. The batch is that of masked words, with `noise` [b t], uniform in [0, 1), by which
    the generator's words are drawn: so the same batch always has the same replacements. The generator is trained and saved with the run.
    """

    def __init__(self, generator: nn.Module, weight: float = 50.0):
        super().__init__()
        self.generator, self.weight = generator, weight

    def forward(self, model: nn.Module, batch: Batch, /) -> Sum:
        labels, mask = given(batch, "labels"), batch.get("mask")
        guess = call(self.generator, batch).logits
        read, replaced = filled(guess.detach(), given(batch, "ids"), labels, given(batch, "noise"))
        scores = call(model, {**batch, "ids": read}).logits
        real = torch.ones_like(replaced) if mask is None else mask
        words = row_means(negative_log(guess, labels), labels != IGNORE)
        found = row_means(detection(scores, replaced), real)
        figures = {
            "mlm": words.sum().detach(),
            "detection": found.sum().detach(),
            "mlm_accuracy": right(guess, labels),
            "accuracy": ((((scores > 0) == replaced) & real).sum(), real.sum()),
            "replaced": ((replaced & real).sum(), real.sum()),
        }
        return Sum((words + self.weight * found).sum(), len(labels), figures)


def detection(scores: Float[Tensor, "b t"], replaced: Tensor) -> Float[Tensor, "b t"]:
    """Of each token -log P(replaced or not) in float32 (eq. 2)."""
    return F.binary_cross_entropy_with_logits(scores.float(), replaced.float(), reduction="none")


def filled(
    guess: Float[Tensor, "b t v"], ids: Int[Tensor, "b t"], labels: Int[Tensor, "b t"], noise: Float[Tensor, "b t"]
) -> tuple[Int[Tensor, "b t"], Tensor]:
    """The text with the generator's words at masked places, and where it is not the true one: a word guessed right is not replaced."""
    masked = labels != IGNORE
    sums = guess[masked].float().softmax(-1).cumsum(-1)
    drawn = torch.searchsorted(sums, noise[masked][:, None] * sums[:, -1:]).clamp(max=sums.shape[-1] - 1)[:, 0]
    true = torch.where(masked, labels, ids)
    read = true.masked_scatter(masked, drawn)
    return read, read != true
