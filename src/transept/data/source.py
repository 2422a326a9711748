"""Sources of samples: the protocol, and the plainest ones."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from transept.core.batch import Batch, Draw, Sample, Source
from transept.core.errors import InputError, SourceError
from transept.core.shapes import Int, Tensor

__all__ = ["Batch", "Draw", "Sample", "Samples", "Source", "Windows", "find"]


def find(name: str, about: str = "") -> Path:
    """A data file by its name below $TRANSEPT_DATA, ./data or the folder shared/data beside the checkout.

    Errors: SourceError where it is in none of them; `about` says where it can be had.
    """
    beside = Path(__file__).parents[4] / "shared" / "data"
    places = [Path(p) for p in (os.environ.get("TRANSEPT_DATA", ""), "data", str(beside)) if p]
    for place in places:
        if (place / name).exists():
            return place / name
    looked = ", ".join(str(p) for p in places)
    raise SourceError(f"there is no {name} in {looked}; set TRANSEPT_DATA to the folder that holds it{f' ({about})' if about else ''}")


class Windows:
    """Windows of `length` + 1 tokens over one long text, one beginning at every `stride`-th token: the batch has `ids` [b length+1].

    A text too short for one window is refused, and one with an id outside `vocab`.
    """

    def __init__(self, ids: Int[Tensor, "n"], length: int, stride: int = 1, vocab: int | None = None):
        if len(ids) < length + 1:
            raise InputError(f"the text has {len(ids)} tokens, a window of {length} needs {length + 1}")
        if vocab is not None and int(ids.max()) >= vocab:
            raise InputError(f"the text holds token {int(ids.max())}, the model's vocabulary has {vocab}")
        self.ids, self.length, self.stride = ids, length, stride

    def __len__(self) -> int:
        return (len(self.ids) - 1 - self.length) // self.stride + 1

    def __getitem__(self, index: int) -> Sample:
        at = index * self.stride
        return {"ids": self.ids[at : at + self.length + 1]}

    def collate(self, samples: Sequence[Sample], draw: Draw) -> Batch:
        """The windows one above the other."""
        return {"ids": torch.stack([sample["ids"] for sample in samples]).long()}


class Samples:
    """Samples kept in memory; `collate` makes a batch of several. `lengths` lets an epoch be bucketed."""

    def __init__(
        self, samples: Sequence[Mapping[str, Any]], collate: Callable[[Sequence[Sample], Draw], Batch], lengths: Sequence[int] | None = None
    ):
        self.samples, self._collate = samples, collate
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    def collate(self, samples: Sequence[Sample], draw: Draw) -> Batch:
        """What the given function makes of them."""
        return self._collate(samples, draw)
