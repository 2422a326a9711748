"""What the loop and an objective agree on: a loss that carries its count."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import nn

from transept.core.batch import Batch, Draw, Sample, Source
from transept.core.shapes import Tensor

__all__ = ["Batch", "Draw", "Metric", "Objective", "Sample", "Source", "Sum"]

Metric = Tensor | tuple[Tensor, Tensor | int]
"""A sum over the same things that the loss counts, or a sum with a count of its own."""


@dataclass(frozen=True)
class Sum:
    """A loss summed (not averaged) over what it counts, in float32, and how many it counts.

    The loop adds sums and counts over micro-batches and processes and divides once, so no split of a batch changes the gradient.
    """

    loss: Tensor
    count: int | Tensor
    metrics: dict[str, Metric] = field(default_factory=dict)


@runtime_checkable
class Objective(Protocol):
    """What is to become small. One with parameters or buffers of its own (heads, teachers, queues) is an nn.Module: the loop trains and
    saves them with the model. One that must follow the model has a method `after_step(model)`, called after each update.
    """

    def __call__(self, model: nn.Module, batch: Batch, /) -> Sum:
        """The loss of one micro-batch, summed, with its count."""
        ...
