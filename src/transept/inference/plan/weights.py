"""Where a plan takes its numbers from: a module's parameters, or a file's own bytes, repacked and never quantised again."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import nn

from transept import native
from transept.checkpoints.load import Source
from transept.core.errors import CheckpointError, NumericsError
from transept.core.shapes import Tensor


@runtime_checkable
class Weights(Protocol):
    """A model's numbers by their native names."""

    def matrix(self, name: str) -> native.Raw:
        """A matrix [n, k] in the form it is stored in."""
        ...

    def floats(self, name: str) -> np.ndarray:
        """Any parameter as float32."""
        ...


class ModuleWeights:
    """The parameters and buffers of a module; bfloat16 matrices stay bfloat16, all others are float32."""

    def __init__(self, model: nn.Module):
        self.state = model.state_dict()

    def matrix(self, name: str) -> native.Raw:
        value = self.state[name].detach()
        return native.raw(value.float().cpu().numpy(), "BF16" if value.dtype is torch.bfloat16 else "F32")

    def floats(self, name: str) -> np.ndarray:
        return self.state[name].detach().float().cpu().numpy()


class StoredWeights:
    """The rows of a file with stored forms (GGUF, or a folder of our own) as they lie there, under their native names."""

    def __init__(self, source: Source):
        file: Any = source.open()
        if not source.stored:
            raise CheckpointError(f"{source.path} holds no stored forms: its numbers are taken from the loaded module")
        self.source, self.file = source, file
        names = source.names
        self.bonds = {name: bond for bond in names.bonds(source.spec) for name in bond.native}

    def matrix(self, name: str) -> native.Raw:
        bond = self.bonds[name]
        infos = [self.file.info(key) for key in bond.foreign]
        kind, width = infos[0].kind, infos[0].shape[-1]
        if kind in ("F32", "F16", "BF16"):
            return native.raw(self.floats(name), kind)
        for key in bond.foreign:
            finite(self.source, key, self.file.read(key))
        # Maps move whole rows here, so they hold for the packed rows too.
        parts = bond.load([self.file.raw(key) for key in bond.foreign], self.source.spec)
        rows = parts[bond.native.index(name)].contiguous()
        return native.raw(rows.numpy(), kind, width)

    def floats(self, name: str) -> np.ndarray:
        bond = self.bonds[name]
        parts = bond.load([self.file.read(key) for key in bond.foreign], self.source.spec)
        value: Tensor = parts[bond.native.index(name)].float()
        finite(self.source, bond.foreign[0], value)
        return value.numpy()


def finite(source: Source, key: str, value: Tensor) -> None:
    """Refuses a tensor that holds what is not a number."""
    if not torch.isfinite(value.sum(dtype=torch.float32)) and (bad := int((~torch.isfinite(value.float())).sum())):
        raise NumericsError(f"{source.path}: the tensor {key!r} has {bad} numbers that are not finite (NaN or infinite)")


def weights_of(model: nn.Module | None, source: Source | None) -> Weights:
    """The file's own numbers where they lie in stored forms, else the module's."""
    if source is not None and source.stored:
        return StoredWeights(source)
    if model is None:
        raise CheckpointError("there is neither a GGUF file nor a loaded module to take numbers from")
    return ModuleWeights(model)


