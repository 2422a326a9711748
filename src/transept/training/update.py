"""One update: gradients of sums over micro-batches and processes, divided once by the global count, checked, clipped, applied."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from transept.core.batch import Batch, Draw, mixed
from transept.core.errors import InputError
from transept.core.shapes import Tensor
from transept.training.objective import Objective, Sum
from transept.training.ranks import Ranks, sharded, whole
from transept.training.run import Number, Precision

Piece = tuple[Draw, int]


@dataclass
class Tally:
    """Sums over micro-batches: the loss, its count, and each metric's own pair; kept on the device until they are read."""

    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, found: Sum) -> None:
        """Takes one micro-batch in."""
        pairs = {"loss": (found.loss, found.count)} | {k: m if isinstance(m, tuple) else (m, found.count) for k, m in found.metrics.items()}
        for name, (total, count) in pairs.items():
            pair = torch.stack([torch.as_tensor(x, device=found.loss.device).detach().double() for x in (total, count)])
            self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def means(self, ranks: Ranks, device: torch.device) -> tuple[dict[str, float], float]:
        """(the mean of each by its global count, the global count of the loss)."""
        # Of a batch with fewer samples than processes some see nothing, and so do not know the metrics' names.
        if ranks.agree(float(not self.sums), device):
            self.sums = {"loss": self.sums.get("loss", torch.zeros(2, dtype=torch.float64, device=device))}
        ranks.sum_(self.sums.values())
        pairs = {name: pair.tolist() for name, pair in self.sums.items()}
        # What was counted nowhere has no mean; a loss that counts nothing is 0 and moves nothing.
        means = {name: total / count if count else (0.0 if name == "loss" else math.nan) for name, (total, count) in pairs.items()}
        return means, pairs["loss"][1]


@dataclass(frozen=True)
class Step:
    """What one update did: the means of loss and metrics, what it counted, the gradient's norm, and whether it was applied."""

    means: dict[str, float]
    count: float
    norm: float
    applied: bool


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """The forward pass in bfloat16 where that is asked for; weights and gradients stay float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision is Precision.BF16)


def moved(batch: Batch, device: torch.device) -> Batch:
    """The batch on the device."""
    return batch if device.type == "cpu" else {name: t.to(device, non_blocking=True) for name, t in batch.items()}


def called(objective: Objective, model: nn.Module, batch: Batch) -> Sum:
    """The objective's sum, in float32. Errors: InputError for a loss that is not one number."""
    found = objective(model, batch)
    if found.loss.ndim != 0:
        raise InputError(f"an objective's loss should be one number, found the shape {tuple(found.loss.shape)}")
    return found if found.loss.dtype == torch.float32 else Sum(found.loss.float(), found.count, found.metrics)


@dataclass
class Updater:
    """Makes updates of `named` parameters by `optimisers`."""

    model: nn.Module
    objective: Objective
    named: dict[str, nn.Parameter]
    optimisers: list[torch.optim.Optimizer]
    clip: Number
    precision: Precision
    ranks: Ranks
    device: torch.device
    compute: Callable[[Objective, nn.Module, Batch], Sum] = called
    """The forward pass: `called`, or `called` compiled with the model inside."""

    def gradients(self, pieces: list[Piece], take: Callable[[Piece], Batch], seed: int) -> Tally:
        """Adds up the gradients of the summed loss over this process's pieces; dropout depends on `seed` and the piece alone."""
        tally = Tally()
        for optimiser in self.optimisers:
            optimiser.zero_grad(set_to_none=True)
        for piece in pieces:
            torch.manual_seed(mixed("dropout", seed, *piece[0]))
            with autocast(self.device, self.precision):
                found = self.compute(self.objective, self.model, moved(take(piece), self.device))
            if found.loss.requires_grad:
                found.loss.backward()
            tally.add(found)
        return tally

    @torch.no_grad()
    def apply(self, tally: Tally, factor: Number) -> Step:
        """Divides by the global count, clips, and steps with the base rates times `factor`; nothing moves where a number is not finite."""
        means, count = tally.means(self.ranks, self.device)
        grads = self._reduced()
        norm = _norm(grads) / max(count, 1e-12)
        finite = math.isfinite(means["loss"]) and math.isfinite(norm)
        if finite and count > 0 and grads:
            scale = 1.0 / count
            if 0 < self.clip < norm:
                scale *= self.clip / norm
            for alike in _kinds(grads):
                torch._foreach_mul_(alike, scale)  # pyright: ignore[reportPrivateImportUsage]
            for optimiser in self.optimisers:
                for group in optimiser.param_groups:
                    group["lr"] = group["base"] * factor
                optimiser.step()
        return Step(means, count, norm, finite)

    def _reduced(self) -> list[Tensor]:
        """The gradients summed over all processes."""
        grads = [p.grad for p in self.named.values() if p.grad is not None]
        if self.ranks.world > 1:
            # Every process must add the same tensors, also where its own share did not reach a parameter.
            for p in self.named.values():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            grads = [p.grad for p in self.named.values() if p.grad is not None]
            self.ranks.sum_([g for g in grads if not sharded(g)])
            # fully_shard has averaged where this loop adds.
            apart = [g for g in grads if sharded(g)]
            if apart:
                torch._foreach_mul_(apart, float(self.ranks.world))  # pyright: ignore[reportPrivateImportUsage]
        return grads


def _kinds(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Whole tensors and sharded ones apart, since one call cannot take both; empty lists are left out."""
    halves = [t for t in tensors if not sharded(t)], [t for t in tensors if sharded(t)]
    return [half for half in halves if half]


def _norm(grads: list[Tensor]) -> float:
    """The norm of all gradients together, over all processes that hold parts of them."""
    return math.hypot(*(float(whole(torch.nn.utils.get_total_norm(alike))) for alike in _kinds(grads)))


def out_of_memory(error: BaseException) -> bool:
    """True for the errors by which torch and Python say that memory is exhausted."""
    said = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "not enough memory" in said or "can't allocate memory" in said


def plain(value: Any) -> Any:
    """A number that JSON can hold; those that are not finite as text."""
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)
