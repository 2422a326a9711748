"""How fast a run goes: counted things per second, memory, and the share of what this machine can compute at most."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from transept.core.batch import Batch
from transept.training.objective import Objective
from transept.training.run import Precision
from transept.training.update import autocast, called


def elements(batch: Batch) -> int:
    """The tokens of a batch, or its samples where it has none: the elements of its largest tensor of whole numbers."""
    ids = [t.numel() for t in batch.values() if not t.is_floating_point() and t.dtype != torch.bool]
    return max(ids, default=len(next(iter(batch.values()))))


def peak(device: torch.device, precision: Precision, seconds: float = 0.2) -> float:
    """The most FLOP/s that this machine reached in a product of two square matrices, measured now."""
    size = 8192 if device.type == "cuda" else 1024
    dtype = torch.bfloat16 if precision is Precision.BF16 else torch.float32
    a = torch.ones(size, size, device=device, dtype=dtype)
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end or not best:
        begin = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - begin))
    return best


@torch.no_grad()
def forward_flops(objective: Objective, model: nn.Module, batch: Batch, device: torch.device, precision: Precision) -> int:
    """The FLOPs of one forward pass, counted op by op; a step costs about three times as many."""
    with FlopCounterMode(display=False) as counter, autocast(device, precision):
        called(objective, model, batch)
    return counter.get_total_flops()


def memory(device: torch.device) -> int:
    """The most bytes that this process has held: of the device, or of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@dataclass
class Pace:
    """Things counted over time, without the time that looks and saves take."""

    per_item: float = 0.0
    """FLOPs of a step for each thing counted; 0 where they are not known."""
    most: float = 0.0
    items: int = 0
    seconds: float = 0.0
    recent: list[tuple[int, float]] = field(default_factory=list)

    def add(self, items: int, seconds: float) -> None:
        """Takes one update in."""
        self.items += items
        self.seconds += seconds
        self.recent = [*self.recent[-19:], (items, seconds)]

    @property
    def rate(self) -> float:
        """Things per second over the last 20 updates."""
        seconds = sum(s for _, s in self.recent)
        return sum(n for n, _ in self.recent) / seconds if seconds else 0.0

    @property
    def share(self) -> float:
        """The share of the measured peak; 0 where it is not known."""
        return self.rate * self.per_item / self.most if self.most else 0.0
