"""Every generator of random numbers that a run may touch: taken down, put back, and kept from its caller."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from transept.core.batch import mixed
from transept.core.shapes import Tensor


def state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(torch's generators as tensors, Python's and numpy's as JSON)."""
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        tensors |= {f"cuda:{i}": torch.cuda.get_rng_state(i) for i in range(torch.cuda.device_count())}
    numbers: dict[str, Any] = {"python": random.getstate()}
    if "numpy" in sys.modules:
        kind, keys, *rest = sys.modules["numpy"].random.get_state()
        numbers["numpy"] = [kind, keys.tolist(), *rest]
    return tensors, numbers


def restore(tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
    """Puts back what `state` took down; a device that is not there is left out."""
    torch.set_rng_state(tensors["cpu"].clone())
    for name, value in tensors.items():
        if name.startswith("cuda:") and torch.cuda.is_available() and int(name[5:]) < torch.cuda.device_count():
            torch.cuda.set_rng_state(value.clone(), int(name[5:]))
    version, words, gauss = numbers["python"]
    random.setstate((version, tuple(words), gauss))
    if "numpy" in numbers and "numpy" in sys.modules:
        sys.modules["numpy"].random.set_state(tuple(numbers["numpy"]))


def seed(number: int) -> None:
    """Every generator from one number."""
    torch.manual_seed(mixed("torch", number))
    random.seed(mixed("python", number))
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(mixed("numpy", number) % 2**32)


@contextmanager
def apart(number: int, found: tuple[Mapping[str, Tensor], Mapping[str, Any]] | None) -> Iterator[None]:
    """Within this block the generators begin at the seed `number`, or at `found`; afterwards they stand as their caller left them."""
    kept = state()
    seed(number)
    if found is not None:
        restore(*found)
    try:
        yield
    finally:
        restore(*kept)
