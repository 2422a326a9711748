"""What flows from data to objectives: named tensors, and the sources that they are drawn from.

Everything random about a sample comes from three integers (seed, epoch, place), so a stopped run goes on with the same data, and any split
of a batch over micro-batches or processes holds the same numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch

from transept.core.shapes import Tensor

Batch = dict[str, Tensor]
"""Named tensors; the leading axis counts samples, or packed rows."""

Sample = Mapping[str, Any]
"""One sample as its source holds it: tensors, lists of numbers, numbers."""


class Draw(NamedTuple):
    """Where a sample stands: the run's seed, the epoch, and its place in that epoch's order."""

    seed: int
    epoch: int
    index: int

    def at(self, offset: int) -> Draw:
        """The draw of the sample that stands `offset` places later."""
        return Draw(self.seed, self.epoch, self.index + offset)

    def generator(self, purpose: str = "") -> torch.Generator:
        """A generator of its own for this sample and purpose; the global one is never touched."""
        return torch.Generator().manual_seed(mixed(purpose, *self))


def mixed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part: equal parts give equal seeds, on every machine."""
    text = "\0".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


@runtime_checkable
class Source(Protocol):
    """Samples by number, and how several become one batch."""

    def __len__(self) -> int:
        """How many samples there are."""
        ...

    def __getitem__(self, index: int, /) -> Sample:
        """Sample `index`, the same at every asking."""
        ...

    def collate(self, samples: Sequence[Sample], draw: Draw) -> Batch:
        """One batch. What is random in the j-th sample is drawn from `draw.at(j).generator()`, never from a global generator."""
        ...
