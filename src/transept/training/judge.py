"""Looking at held-out data: what is measured, what is best, and when to give up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from transept.core.batch import Batch, Draw, Source
from transept.core.errors import ConfigError, nearest
from transept.training.objective import Objective
from transept.training.ranks import Ranks
from transept.training.run import Run
from transept.training.update import Precision, Tally, autocast, called, moved


class Judge:
    """Measures the held-out sources of a run and keeps what was best."""

    def __init__(self, run: Run, ranks: Ranks, device: torch.device):
        self.run, self.ranks, self.device, self.settings = run, ranks, device, run.settings.judging
        self.figures: dict[str, float] = {}
        self.best: float | None = None
        self.best_step, self.looked, self.worse = -1, -1, 0

    def look(self, step: int) -> dict[str, float]:
        """Every figure by "source.metric"; the measure's under its own names."""
        model = self.run.model
        objective = self.run.eval_objective or self.run.objective
        modules = [m for m in (model, objective) if isinstance(m, nn.Module)]
        before = [m.training for m in modules]
        for m in modules:
            m.eval()
        figures: dict[str, float] = {}
        try:
            for name, source in self.run.eval.items():
                found = measure(objective, model, source, self.settings.batch, ranks=self.ranks, device=self.device,
                                precision=self.run.settings.precision)  # fmt: skip
                figures |= {f"{name}.{key}": value for key, value in found.items()}
            if self.run.measure is not None:
                figures |= self.run.measure(model)
        finally:
            for m, was in zip(modules, before, strict=True):
                m.train(was)
        self.looked, self.figures = step, figures
        if figures:
            self._compare(step, figures)
        return figures

    def _compare(self, step: int, figures: dict[str, float]) -> None:
        key = self.settings.metric if self.settings.metric in figures else f"{self.settings.source}.{self.settings.metric}"
        if key not in figures:
            raise ConfigError(f"settings.judging asks for {key!r}, which is not measured{nearest(key, figures)}; there is {list(figures)}")
        value = figures[key]
        better = self.best is None or (value > self.best if self.settings.higher else value < self.best)
        if better:
            self.best, self.best_step, self.worse = value, step, 0
        else:
            self.worse += 1

    def tired(self) -> bool:
        """True after `patience` looks without a better one."""
        return 0 < self.settings.patience <= self.worse

    def facts(self) -> dict[str, Any]:
        """What a resumed run must know, as JSON."""
        return {"figures": self.figures, "best": self.best, "best_step": self.best_step, "looked": self.looked, "worse": self.worse}

    def restore(self, facts: dict[str, Any]) -> None:
        """Takes `facts` back."""
        for name, value in facts.items():
            setattr(self, name, value)


def _batches(source: Source, size: int, ranks: Ranks) -> Iterator[Batch]:
    """This process's share of a source in its own order, always with the same draws."""
    low, high = len(source) * ranks.rank // ranks.world, len(source) * (ranks.rank + 1) // ranks.world
    for at in range(low, high, size):
        many = min(size, high - at)
        yield source.collate([source[at + i] for i in range(many)], Draw(0, 0, at))


@torch.no_grad()
def measure(objective: Objective, model: nn.Module, source: Source, batch: int = 64, *, ranks: Ranks | None = None,
            device: torch.device | None = None, precision: Precision = Precision.FP32) -> dict[str, float]:  # fmt: skip
    """The mean loss and metrics of an objective over a whole source, each divided once by its count."""
    ranks = ranks or Ranks()
    device = device or next(model.parameters()).device
    tally = Tally()
    for one in _batches(source, batch, ranks):
        with autocast(device, precision):
            tally.add(called(objective, model, moved(one, device)))
    return tally.means(ranks, device)[0]
