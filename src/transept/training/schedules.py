"""The learning rate's factor as a pure function of how far the run is (row 122)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from transept.training.run import Number, Schedule, Shape

_SHAPES: Mapping[Shape, Callable[[Number, Number], Number]] = {
    Shape.CONSTANT: lambda x, decay: 1.0,
    Shape.LINEAR: lambda x, decay: 1.0 - x,
    Shape.COSINE: lambda x, decay: 0.5 * (1.0 + math.cos(math.pi * x)),
    Shape.WSD: lambda x, decay: 1.0 if x <= 1 - decay else (1.0 - x) / decay,
}


def factor(schedule: Schedule, step: int, progress: Number) -> Number:
    """What the base learning rates are multiplied by at update `step` (from 0), `progress` (0 to 1) of the run being over.

    Warm-up rises linearly, (step + 1) / warmup; a warm-up below 1 is a share of the run. After it the shape goes from 1 to `floor` over the
    rest of the run: cosine as Loshchilov and Hutter 2016 (arXiv 1608.03983, eq. 5), linear, constant, or warm-up-stable-decay.
    """
    share = schedule.warmup if schedule.warmup < 1 else _share(schedule.warmup, step, progress)
    if schedule.warmup >= 1 and step < schedule.warmup:
        return (step + 1) / schedule.warmup
    if schedule.warmup < 1 and progress < share:
        return max(progress / share, 1e-3)
    x = min(max((progress - share) / max(1 - share, 1e-9), 0.0), 1.0)
    return schedule.floor + (1 - schedule.floor) * _SHAPES[schedule.shape](x, schedule.decay)


def _share(warmup: Number, step: int, progress: Number) -> Number:
    """The share of the run that a warm-up counted in steps takes: known from the pace so far."""
    return min(warmup * progress / step, 1.0) if step > 0 else 0.0
