"""What may happen to tensors between a published file and a model: moves of bits, each with its inverse beside it (laws 4 and 5).

`load` takes the foreign tensors of one row and gives the native ones; `save` goes back. Sizes are functions of the Spec, never read
from the keys. Ops that work on the first dimension hold for packed quantised rows too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from transept.core.shapes import Tensor

Sizes = Callable[[Any], Sequence[int]]


@runtime_checkable
class Op(Protocol):
    """A move of bits and its inverse."""

    def load(self, parts: list[Tensor], spec: Any) -> list[Tensor]:
        """Foreign tensors to native ones."""
        ...

    def save(self, parts: list[Tensor], spec: Any) -> list[Tensor]:
        """Native tensors to foreign ones; `save(load(x))` is x, bit for bit."""
        ...


@dataclass(frozen=True)
class T:
    """Transpose each (published matrices that are stored [in, out])."""

    def load(self, parts: list[Tensor], spec: Any) -> list[Tensor]:
        return [p.transpose(-1, -2) for p in parts]

    save = load


@dataclass(frozen=True)
class Cat:
    """The published tensor is several native ones, of the given sizes, joined along `dim`."""

    sizes: Sizes
    dim: int = 0

    def load(self, parts: list[Tensor], spec: Any) -> list[Tensor]:
        (whole,) = parts
        return list(whole.split(list(self.sizes(spec)), self.dim))

    def save(self, parts: list[Tensor], spec: Any) -> list[Tensor]:
        return [torch.cat(parts, self.dim)]


@dataclass(frozen=True)
class SplitHeads:
    """Within each of `heads` groups of rows the published matrix has several native ones, of the given sizes, one below the other."""

    heads: Callable[[Any], int]
    sizes: Sizes

    def load(self, parts: list[Tensor], spec: Any) -> list[Tensor]:
        (whole,) = parts
        by_head = whole.unflatten(0, (self.heads(spec), -1))
        return [p.flatten(0, 1) for p in by_head.split(list(self.sizes(spec)), 1)]

    def save(self, parts: list[Tensor], spec: Any) -> list[Tensor]:
        return [torch.cat([p.unflatten(0, (self.heads(spec), -1)) for p in parts], 1).flatten(0, 1)]


@dataclass(frozen=True)
class Stack:
    """The published tensors, one per value of an index that the native name lacks, stacked along a new first dimension."""

    def load(self, parts: list[Tensor], spec: Any) -> list[Tensor]:
        return [torch.stack(parts)]

    def save(self, parts: list[Tensor], spec: Any) -> list[Tensor]:
        return list(parts[0].unbind(0))


@dataclass(frozen=True)
class Unpair:
    """The published rows of each head are in the rotary layout PAIRS, the native ones in HALVES."""

    heads: Callable[[Any], int]

    def load(self, parts: list[Tensor], spec: Any) -> list[Tensor]:
        return [p.unflatten(0, (self.heads(spec), -1, 2)).transpose(1, 2).flatten(0, 2) for p in parts]

    def save(self, parts: list[Tensor], spec: Any) -> list[Tensor]:
        return [p.unflatten(0, (self.heads(spec), 2, -1)).transpose(1, 2).flatten(0, 2) for p in parts]


@dataclass(frozen=True)
class Reshape:
    """The same numbers in the same order under another shape: `native` and `foreign` give the two."""

    native: Sizes
    foreign: Sizes

    def load(self, parts: list[Tensor], spec: Any) -> list[Tensor]:
        return [p.reshape(*self.native(spec)) for p in parts]

    def save(self, parts: list[Tensor], spec: Any) -> list[Tensor]:
        return [p.reshape(*self.foreign(spec)) for p in parts]
