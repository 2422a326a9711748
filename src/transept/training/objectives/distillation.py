"""A student learns a teacher's scores (Hinton et al. 2015, arXiv 1503.02531; DistilBERT, Sanh et al. 2019, arXiv 1910.01108; row 64)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from transept.core.batch import Batch
from transept.core.shapes import Float, Tensor
from transept.training.objective import Sum
from transept.training.objectives.losses import call, given, negative_log, right, row_means


class Distillation(nn.Module):
    """`soft` T^2 KL(teacher || student) at temperature T, plus `hard` times the cross-entropy of the labels, plus `states` (1 - cosine of
    the last states).

    `labels` are [b] where the models score rows, [b t] where they score tokens; then each row counts its mean over real tokens (and over
    labelled ones for the hard loss). The teacher is neither trained nor saved: the recipe brings it again.
    """

    def __init__(self, teacher: nn.Module, temperature: float = 2.0, *, soft: float = 5.0, hard: float = 2.0, states: float = 1.0):
        super().__init__()
        # In a tuple, so that its numbers are no part of the run.
        self.teacher = (teacher.eval().requires_grad_(False),)
        self.temperature, self.soft, self.hard, self.states = temperature, soft, hard, states

    def forward(self, model: nn.Module, batch: Batch, /) -> Sum:
        labels = given(batch, "labels")
        with torch.no_grad():
            master = call(self.teacher[0], batch)
        out = call(model, batch)
        real = batch.get("mask")
        real = torch.ones(batch["ids"].shape, dtype=torch.bool, device=labels.device) if real is None else real
        apart = divergence(out.logits, master.logits, self.temperature)
        wrong = negative_log(out.logits, labels)
        if labels.dim() == 2:
            apart, wrong = row_means(apart, real), row_means(wrong, labels >= 0)
        loss = self.soft * apart + self.hard * wrong
        figures = {"soft": apart.sum().detach(), "hard": wrong.sum().detach(), "accuracy": right(out.logits, labels)}
        if self.states:
            turned = row_means(1 - F.cosine_similarity(out.hidden.float(), master.hidden.float(), dim=-1), real)
            loss, figures = loss + self.states * turned, {**figures, "states": turned.sum().detach()}
        return Sum(loss.sum(), len(labels), figures)


def divergence(student: Float[Tensor, "*n v"], teacher: Float[Tensor, "*n v"], temperature: float) -> Float[Tensor, "*n"]:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) in float32."""
    p, q = (teacher.float() / temperature).log_softmax(-1), (student.float() / temperature).log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1) * temperature**2
