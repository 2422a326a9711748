"""The processes that share a batch: started by torchrun, or one alone."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from transept.core.shapes import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process's place among those that each see another share of the data; `group` is their process group.

    `first` is True for the one that writes files and speaks: of processes that share one model and see the same data only one may.
    """

    rank: int = 0
    world: int = 1
    group: Any = None
    first: bool = True

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Adds each tensor over all processes, in place."""
        if self.world > 1:
            for work in [dist.all_reduce(t, group=self.group, async_op=True) for t in tensors]:
                if work is not None:
                    work.wait()

    def agree(self, value: float, device: torch.device) -> float:
        """The largest of all processes' numbers, also of those that share a model: a clock or a signal seen by one is seen by all."""
        if not _together():
            return value
        shared = torch.tensor(value, dtype=torch.float64, device=device if device.type == "cuda" else "cpu")
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return float(shared)

    def wait(self) -> None:
        """Returns when every process has come here."""
        if _together():
            dist.barrier()


def _together() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def joined() -> Iterator[Ranks]:
    """The processes that torchrun started (by its environment variables), joined until the block ends; alone without it."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    began = not dist.is_initialized()
    if began:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), first=dist.get_rank() == 0)
    finally:
        if began:
            dist.destroy_process_group()


def whole(tensor: Tensor) -> Tensor:
    """A tensor that is sharded over processes, gathered; any other as it is. Every process must ask."""
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


def sharded(tensor: Tensor) -> bool:
    """True for a tensor of which this process holds only a part (DTensor)."""
    return hasattr(tensor, "full_tensor")
