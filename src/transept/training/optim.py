"""Optimisers: AdamW with decay groups, Muon for the matrices of the layers (row 121), and the mean of the weights."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from transept.core.errors import ConfigError
from transept.core.shapes import Float, Tensor
from transept.training.run import Number, Optim

QUINTIC = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is brought to the nearest half-orthogonal matrix (Jordan et al. 2024, "Muon: an optimizer for hidden layers").

    The step of torch.optim.Muon, with two differences: the Newton-Schulz iteration runs in `dtype` (float32 where bfloat16 products are
    slow, as on a CPU without instructions for them), and matrices of one shape go through it together.
    """

    def __init__(self, params: Iterable[Any], lr: Number, momentum: Number = 0.95, decay: Number = 0.0, steps: int = 5,
                 dtype: torch.dtype | None = None):  # fmt: skip
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": decay, "ns_steps": steps})
        self.dtype = dtype
        for p in self._all():
            if p.ndim != 2:
                raise ConfigError(f"Muon is for matrices, found a parameter of shape {tuple(p.shape)}")

    def _all(self) -> Iterator[Tensor]:
        return (p for group in self.param_groups for p in group["params"])

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update from the gradients; parameters without one stay."""
        for group in self.param_groups:
            alike: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    alike[(p.shape, p.device)].append(p)
            for params in alike.values():
                self._update(params, group)

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        grads = [p.grad for p in params if p.grad is not None]
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])  # pyright: ignore[reportPrivateImportUsage]
        update = torch.stack(torch._foreach_lerp(grads, buffers, group["momentum"]))  # pyright: ignore[reportPrivateImportUsage]
        update = orthogonal(update, group["ns_steps"], self.dtype or _quick(update.device)).to(params[0].dtype)
        rows, columns = params[0].shape
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_add_(params, list(update), alpha=-group["lr"] * math.sqrt(max(1, rows / columns)))  # pyright: ignore[reportPrivateImportUsage]


def _quick(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def orthogonal(x: Float[Tensor, "n i o"], steps: int, dtype: torch.dtype) -> Float[Tensor, "n i o"]:
    """Each matrix with its singular values brought near 1 by the quintic Newton-Schulz iteration of Muon's authors.

    Its factors are polynomials of x x^T and commute: in float32 a wide matrix meets their product once, at the end, which is half the work
    where it is four times as wide as high. (In bfloat16 the product's rounding would show.)
    """
    a, b, c = QUINTIC
    tall = x.shape[1] > x.shape[2]
    y = x.to(dtype)
    y = y.mT if tall else y
    y = y / torch.linalg.matrix_norm(y, keepdim=True).clamp(min=1e-7)
    wide, gram, product = dtype is torch.float32 and y.shape[2] >= 2 * y.shape[1], y @ y.mT, None
    for step in range(steps):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        if wide:
            factor.diagonal(dim1=1, dim2=2).add_(a)
            product = factor if product is None else factor @ product
            gram = factor @ (gram @ factor) if step < steps - 1 else gram
        else:
            y = torch.baddbmm(y, factor, y, beta=a)
            gram = y @ y.mT if step < steps - 1 else gram
    y = y if product is None else product @ y
    return y.mT if tall else y


def parameters(*modules: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, by name, each once: the model's, then the objective's under "objective."."""
    found: dict[str, nn.Parameter] = {}
    for module, prefix in zip(modules, ("", "objective."), strict=False):
        known = {id(p) for p in found.values()}
        found.update({prefix + name: p for name, p in module.named_parameters() if p.requires_grad and id(p) not in known})
    if not found:
        raise ConfigError("nothing is to be trained: no parameter asks for a gradient")
    return found


def groups(named: dict[str, nn.Parameter], matrices: set[int], settings: Optim) -> tuple[list[dict[str, Any]], list[nn.Parameter]]:
    """AdamW's groups (with decay: whatever has two dimensions or more; without: norms and biases), and what is Muon's."""
    muon = [p for p in named.values() if settings.muon > 0 and id(p) in matrices]
    taken = {id(p) for p in muon}
    rest = [p for p in named.values() if id(p) not in taken]
    halves = ([p for p in rest if p.ndim >= 2], settings.decay), ([p for p in rest if p.ndim < 2], 0.0)
    return [{"params": ps, "weight_decay": decay} for ps, decay in halves if ps], muon


def layer_matrices(*modules: nn.Module) -> set[int]:
    """The ids of the weights of linear maps that stand inside a list of layers: not embeddings, not heads."""
    return {id(linear.weight) for module in modules for stack in module.modules() if isinstance(stack, nn.ModuleList)
            for linear in stack.modules() if isinstance(linear, nn.Linear) and linear.weight.ndim == 2}  # fmt: skip


def optimisers(named: dict[str, nn.Parameter], settings: Optim, *modules: nn.Module) -> list[torch.optim.Optimizer]:
    """AdamW, fused where the device has it, and Muon if its rate is above 0; each group remembers its base rate as `base`."""
    adam, muon = groups(named, layer_matrices(*modules), settings)
    made: list[torch.optim.Optimizer] = []
    if adam:
        made.append(torch.optim.AdamW(adam, settings.lr, settings.betas, settings.eps, fused=_fused(named.values())))
    if muon:
        made.append(Muon(muon, settings.muon, settings.momentum, settings.muon_decay, settings.newton_schulz))
    for optimiser in made:
        for group in optimiser.param_groups:
            group["base"] = group["lr"]
    return made


def _fused(params: Iterable[Tensor]) -> bool:
    return all(p.device.type in ("cpu", "cuda") and p.is_floating_point() and type(p) is nn.Parameter for p in params)


class Mean:
    """A second set of weights: their exponential mean (`decay` above 0) or their plain mean since it began.

    Sources: Polyak and Juditsky 1992; Izmailov et al. 2018, arXiv 1803.05407.
    """

    def __init__(self, named: dict[str, nn.Parameter], decay: Number):
        self.named, self.decay, self.count = named, decay, 0
        self.weights: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self) -> None:
        """Takes the present weights in."""
        if not self.weights:
            self.weights = {name: p.detach().clone() for name, p in self.named.items()}
        self.count += 1
        # An exponential mean begins as a plain one, so that the first weights do not linger in it.
        share = 1 / self.count if self.decay == 0 else max(1 - self.decay, 1 / self.count)
        for name, mean in self.weights.items():
            mean.lerp_(self.named[name].detach(), share)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges the mean with the weights that are trained; twice changes nothing."""
        for name, mean in self.weights.items():
            kept = mean.clone()
            mean.copy_(self.named[name].detach())
            self.named[name].detach().copy_(kept)


@contextmanager
def averaged(means: Iterable[Mean]) -> Iterator[None]:
    """Within this block the model holds the mean of its weights, where one is kept and has begun."""
    kept = list(means)
    for mean in kept:
        mean.swap()
    try:
        yield
    finally:
        for mean in kept:
            mean.swap()
