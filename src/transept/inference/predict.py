"""A torch module as a predictor of the next token: what the plain loop and beam search ask of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch

from transept.core.shapes import Float, Tensor
from transept.inference.generation import CHUNK


@runtime_checkable
class Predictor(Protocol):
    """A model that predicts the next token."""

    head: Callable[[Tensor], Tensor]

    def hidden(self, ids: Tensor, *, cache: Any = None) -> Tensor:
        """The last states of some tokens that follow those in the cache."""
        ...

    def cache(self, batch: int, capacity: int = 64) -> Any:
        """An empty cache, of the kind that `hidden` takes."""
        ...


def prefill(model: Predictor, ids: Tensor, cache: Any, chunk: int = CHUNK) -> Float[Tensor, "b v"]:
    """The prompt ids [b t], `chunk` tokens at a time, into the cache; returns the logits that follow the last."""
    states = torch.empty(0)
    for start in range(0, ids.shape[1], chunk):
        states = model.hidden(ids[:, start : start + chunk], cache=cache)
    return model.head(states[:, -1])


def device_of(model: Predictor) -> torch.device | None:
    """Where a predictor computes."""
    return next(model.parameters()).device if isinstance(model, torch.nn.Module) else getattr(model, "device", None)


def advancer(model: Predictor, capacity: int, chunk: int = CHUNK) -> Callable[[Sequence[int]], Tensor]:
    """A function from the next tokens of one sequence to the logits [v] that follow them, in float32 on the CPU."""
    device = device_of(model)
    with torch.inference_mode():
        cache = model.cache(1, capacity)

    def advance(ids: Sequence[int]) -> Tensor:
        with torch.inference_mode():
            return prefill(model, torch.tensor([list(ids)], device=device), cache, chunk)[0].float().cpu()

    return advance
