"""A folder of our own for weights in blocks: config.json that says so, and a safetensors file of native names whose quantised tensors are
stored as the bytes of their blocks.

config.json has `quantization_config`: {"quant_method": "transept", "version": 1, "kinds": {name: kind}}; a tensor named there is uint8
[..., bytes of a row], its kind one of `quants`. Other tensors are plain.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from transept.checkpoints.quants import QUANTS, dequantize, quant
from transept.checkpoints.safetensors import SafetensorsFile, open_safetensors, write_safetensors
from transept.checkpoints.tensorfile import TensorInfo, refuse
from transept.core.errors import CheckpointError, ConfigError
from transept.core.shapes import Tensor

METHOD, VERSION = "transept", 1
FIELD = "quantization_config"


@runtime_checkable
class Stored(Protocol):
    """A tensor in a stored form."""

    @property
    def kind(self) -> str:
        """One of the kinds of `quants`."""
        ...

    @property
    def data(self) -> Tensor:
        """uint8 [..., bytes of a row]."""
        ...


class QuantizedFile:
    """A folder's weights by their native names; what is quantised reads as float32, and `raw` gives its bytes."""

    def __init__(self, path: Path, kinds: Mapping[str, str]):
        self.file: SafetensorsFile = open_safetensors(path)
        self.path, self.kinds = path, dict(kinds)
        for name, kind in self.kinds.items():
            info, form = self.file.info(name), quant(kind)
            if info.dtype is not torch.uint8 or len(info.shape) < 2 or info.shape[-1] % form.nbytes:
                found, expected = f"{info.kind} {list(info.shape)}", f"bytes in rows of a multiple of {form.nbytes} for {kind}"
                refuse(path, f"tensor {name!r}", found, expected)

    def keys(self) -> list[str]:
        """All tensor names."""
        return self.file.keys()

    def info(self, key: str) -> TensorInfo:
        """Shape and kind of the numbers, not of their bytes."""
        info = self.file.info(key)
        if key not in self.kinds:
            return info
        form = QUANTS[self.kinds[key]]
        return TensorInfo(key, (*info.shape[:-1], info.shape[-1] // form.nbytes * form.length), form.dtype, self.kinds[key])

    def raw(self, key: str) -> Tensor:
        """The stored bytes, uint8 [rows, bytes per row]."""
        data = self.file.read(key)
        return data.reshape(-1, data.shape[-1])

    def read(self, key: str) -> Tensor:
        """The numbers."""
        return dequantize(self.kinds[key], self.file.read(key)) if key in self.kinds else self.file.read(key)

    def close(self) -> None:
        """Lets go of the file."""
        self.file.close()


def split(path: Path, config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str] | None]:
    """A configuration without what it says of quantisation, and the kinds by tensor name; None where it is not of this form."""
    said = config.get(FIELD)
    if not isinstance(said, dict) or said.get("quant_method") != METHOD:
        return dict(config), None
    kinds = said.get("kinds")
    if said.get("version") != VERSION or not isinstance(kinds, dict):
        raise ConfigError(f"{path}: {FIELD} is of version {said.get('version')!r}, expected {VERSION} with the kinds of its tensors")
    for name, kind in kinds.items():
        if not isinstance(kind, str):
            raise ConfigError(f"{path}: {FIELD}.kinds.{name} is {kind!r}, expected the name of a stored kind")
        quant(kind)
    return {name: value for name, value in config.items() if name != FIELD}, kinds


def open_quantized(folder: Path, kinds: Mapping[str, str]) -> QuantizedFile:
    """The folder's weights; every stored tensor is held to its declared kind."""
    path = folder / "model.safetensors"
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no model.safetensors, which its config.json declares")
    return QuantizedFile(path, kinds)


def write_quantized(folder: Path, state: Mapping[str, Tensor], coded: Mapping[str, Stored]) -> dict[str, Any]:
    """Writes the weights; returns what config.json has to say of them."""
    tensors = {name: (coded[name].data if name in coded else tensor).contiguous() for name, tensor in state.items()}
    write_safetensors(folder / "model.safetensors", tensors, metadata={"format": "transept"})
    return {FIELD: {"quant_method": METHOD, "version": VERSION, "kinds": {name: coded[name].kind for name in state if name in coded}}}
