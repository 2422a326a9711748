"""The native core behind the interfaces of the house: a decoder as the engine's Runner, an encoder as its module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from transept import native
from transept.blocks.encoder import Encoder
from transept.core.errors import InputError
from transept.core.shapes import Bool, Float, Int, Tensor
from transept.inference.plan.lower import lower, lower_encoder
from transept.inference.plan.steps import Loop, Steps, cores, pages_of
from transept.inference.plan.weights import Weights
from transept.native.binding import PAGE


class NativeRunner(Steps):
    """The steps of a lowered decoder as the engine wants them."""

    def __init__(
        self, model: nn.Module, weights: Weights, *, pages: int, fast: bool = False, threads: int | None = None, max_rows: int = 256
    ):
        super().__init__(*lower(model, weights, pages=pages, max_rows=max_rows, fast=fast), threads=threads)


class NativeModel(Loop):
    """A decoder, lowered to generate."""

    def __init__(self, model: nn.Module, weights: Weights, *, context: int | None, fast: bool = False, threads: int | None = None):
        program, out = lower(model, weights, pages=pages_of(context) + 1, max_rows=256, fast=fast)
        super().__init__(Steps(program, out, threads=threads), context=context)


class NativeEncoder:
    """A lowered encoder, called as its module is: texts of a batch go through one behind the other, so padding costs nothing.

    The head is the module's own and runs in torch. No text may be longer than `max_rows` tokens.
    """

    def __init__(self, model: Encoder, weights: Weights, *, fast: bool = False, threads: int | None = None, max_rows: int = 1024):
        # Every sequence begins on a page of its own, so a step of single tokens needs the most.
        self.program, self.out = lower_encoder(model, weights, pages=max_rows, max_rows=max_rows, fast=fast)
        self.plan = self.program.build(native.Team(threads or cores()))
        self.max_rows, self.head, self.device = max_rows, model.head, torch.device("cpu")
        self.segments = model.embed.segments is not None

    def __call__(
        self, ids: Int[Tensor, "b t"], *, mask: Bool[Tensor, "b t"] | None = None, segments: Int[Tensor, "b t"] | None = None
    ) -> Any:
        """What the head makes of the last states."""
        return self.head(self.states(ids, mask=mask, segments=segments))

    def states(
        self, ids: Int[Tensor, "b t"], *, mask: Bool[Tensor, "b t"] | None = None, segments: Int[Tensor, "b t"] | None = None
    ) -> Float[Tensor, "b t d"]:
        """The last states; zeros where there is no token."""
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        out = torch.zeros(*ids.shape, self.out.width)
        kinds = torch.zeros_like(ids) if segments is None else segments
        if not self.segments and kinds.any():
            raise InputError("the input has a second segment, but this model has no segments")
        lengths = real.sum(1)
        for some in _fitting(lengths.tolist(), self.max_rows):
            chosen = real[some]
            states = self._run(ids[some][chosen], kinds[some][chosen], lengths[some].numpy())
            out[some] = out[some].masked_scatter(chosen[..., None], states)
        return out

    def _run(self, ids: Tensor, segments: Tensor, lengths: np.ndarray) -> Tensor:
        sizes = -(-lengths // PAGE)
        starts = np.cumsum(sizes) - sizes
        batch = native.Batch(
            ids.numpy(),
            np.repeat(np.arange(len(lengths)), lengths),
            np.arange(len(ids)) - np.repeat(np.cumsum(lengths) - lengths, lengths),
            tables=np.minimum(starts[:, None] + np.arange(sizes.max()), self.max_rows - 1),
            lengths=lengths,
            segments=segments.numpy() if self.segments else None,
        )
        self.plan.step(batch)
        return torch.from_numpy(self.plan.view(self.out, len(ids)))


def _fitting(lengths: Sequence[int], most: int) -> list[list[int]]:
    """The numbers of the sequences in groups of at most `most` tokens together."""
    groups: list[list[int]] = []
    room = -1
    for i, length in enumerate(lengths):
        if length > most:
            raise InputError(f"a text has {length} tokens, but the lowered model reads at most {most}")
        if length > room:
            groups.append([])
            room = most
        groups[-1].append(i)
        room -= length
    return groups
