"""The one door in: a folder, a GGUF file, a bundled name or a hub id becomes a family, a Spec and, when asked, a model with its weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from transept.checkpoints.find import Progress, find
from transept.checkpoints.gguf import open_gguf
from transept.checkpoints.quantized import open_quantized, split
from transept.checkpoints.safetensors import open_safetensors
from transept.checkpoints.shards import open_sharded
from transept.checkpoints.tensorfile import TensorFile, strict_json
from transept.checkpoints.torchbin import open_torchbin
from transept.core.errors import CheckpointError, ConfigError, NumericsError, SourceError
from transept.core.registry import Family, Published, by_architecture
from transept.core.shapes import Tensor
from transept.core.spec import Spec
from transept.mapping.own import OwnNames, declared

_WEIGHTS = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
_MAX_CONFIG = 16 << 20


@dataclass(frozen=True)
class Source:
    """A checkpoint described from its configuration alone: nothing of its weights has been read."""

    path: Path
    family: Family
    form: Published
    spec: Spec
    config: Mapping[str, Any]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    kinds: Mapping[str, str] | None = None

    @property
    def stored(self) -> bool:
        """Whether its matrices may lie in stored forms that a plan runs as they are: a GGUF file, or a folder of our own."""
        return self.path.suffix == ".gguf" or self.kinds is not None

    @property
    def names(self) -> Any:
        """The weight map of its file."""
        return OwnNames(self.form.build or self.family.build) if self.kinds is not None else self.form.names

    def empty(self) -> nn.Module:
        """The model without numbers, on the meta device."""
        with torch.device("meta"):
            return (self.form.build or self.family.build)(self.spec)

    def open(self) -> TensorFile:
        """The weight file or its shards."""
        if self.kinds is not None:
            return open_quantized(self.path, self.kinds)
        return open_gguf(self.path) if self.path.suffix == ".gguf" else _open_weights(self.path)


def check(source: Source) -> None:
    """Holds the file's names and shapes to the family's map without reading a number. Raises MappingError."""
    shapes = {name: tuple(t.shape) for name, t in source.empty().state_dict().items()}
    file = source.open()
    try:
        for _ in source.names.load(_Shapes(file), source.spec, shapes):
            pass
    finally:
        file.close()


def describe(source: str | Path, ignore: Sequence[str] = (), progress: Progress | None = None) -> Source:
    """The family, form and Spec that a checkpoint declares, before a weight is read (law 7).

    `ignore` names configuration fields that the user knows to change nothing. Raises SourceError, ConfigError, CheckpointError.
    """
    path = find(source, progress)
    if path.is_dir():
        config, kinds = split(path / "config.json", read_json(path / "config.json"))
        names = config.get("architectures") or []
        if not isinstance(names, list) or len(names) != 1:
            raise ConfigError(f"{path / 'config.json'} should declare one architecture in 'architectures', found {names!r}")
        family, form = declared(str(names[0])) or by_architecture(str(names[0]))
        return Source(path, family, form, _spec(path / "config.json", family, form, config, ignore), config, kinds=kinds)
    if path.suffix != ".gguf":
        raise SourceError(f"{path} is neither a folder with config.json nor a .gguf file")
    file = open_gguf(path)
    metadata = dict(file.metadata)
    arch = metadata.get("general.architecture")
    family, form = by_architecture(f"gguf:{arch}")
    config = {key.removeprefix(f"{arch}."): value for key, value in metadata.items() if key.startswith(f"{arch}.")}
    embedding = next((file.info(key) for key in file.keys() if key == "token_embd.weight"), None)
    if embedding is None:
        raise CheckpointError(f"{path} has no tensor 'token_embd.weight', which every GGUF language model has")
    config |= {"vocab_size": embedding.shape[0], "tied": "output.weight" not in file.keys()}
    file.close()
    return Source(path, family, form, _spec(path, family, form, config, ignore), config, metadata)


# Whoever asks first may stand in inference mode, and tensors made there could never be trained.
@torch.inference_mode(False)
def load(
    source: Source, dtype: torch.dtype | None = None, device: torch.device | str | None = None, progress: Progress | None = None
) -> nn.Module:
    """The model with its weights, in evaluation mode.

    `dtype` None keeps the type of the largest stored tensor (float32 for quantised files, and for float16 on a CPU, where it is very
    slow). Every tensor is checked to be finite. `progress(done, total)` counts tensors.
    """
    model = source.empty()
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    where = torch.device(device or "cpu")
    file = source.open()
    try:
        kind = dtype or _dtype(file, where)
        for done, (name, tensor) in enumerate(source.names.load(_Guarded(file), source.spec, shapes), 1):
            _assign(model, name, tensor, kind, where)
            if progress is not None:
                progress(done, len(shapes))
    finally:
        file.close()
    return model.eval()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size; duplicates and damage are refused."""
    if not path.is_file():
        raise SourceError(f"there is no {path.name} in {path.parent}")
    if path.stat().st_size > _MAX_CONFIG:
        raise CheckpointError(f"{path} is {path.stat().st_size} bytes long; a configuration has at most {_MAX_CONFIG}")
    return strict_json(path, "the file", path.read_bytes())


class _Shapes:
    """A file's tensors without their numbers."""

    def __init__(self, file: TensorFile):
        self.file = file

    def keys(self) -> list[str]:
        return self.file.keys()

    def read(self, key: str, /) -> Tensor:
        info = self.file.info(key)
        return torch.empty(info.shape, dtype=info.dtype, device="meta")


class _Guarded:
    """A file whose tensors are finite numbers."""

    def __init__(self, file: TensorFile):
        self.file = file

    def keys(self) -> list[str]:
        return self.file.keys()

    def read(self, key: str, /) -> Tensor:
        tensor = self.file.read(key)
        if tensor.is_floating_point() and not tensor.is_meta and not torch.isfinite(tensor.sum(dtype=torch.float32)):
            bad = int((~torch.isfinite(tensor.float())).sum())
            if bad:
                raise NumericsError(f"{self.file.path}: the tensor {key!r} has {bad} numbers that are not finite (NaN or infinite)")
        return tensor


def _spec(path: Path, family: Family, form: Published, config: Mapping[str, Any], ignore: Sequence[str]) -> Spec:
    try:
        return family.spec.checked(form.fields.read(config, ignore))
    except ConfigError as e:
        raise ConfigError(f"{path}: {e}") from e


def _open_weights(folder: Path) -> TensorFile:
    for name in _WEIGHTS:
        path = folder / name
        if path.exists():
            if name.endswith(".index.json"):
                return open_sharded(path)
            return open_safetensors(path) if path.suffix == ".safetensors" else open_torchbin(path)
    raise CheckpointError(f"{folder} holds no weights: expected one of {', '.join(_WEIGHTS)}")


def _dtype(file: TensorFile, device: torch.device) -> torch.dtype:
    floats = [info for info in map(file.info, file.keys()) if info.dtype.is_floating_point]
    if not floats:
        raise CheckpointError(f"{file.path} holds no floating-point tensor")
    kind = max(floats, key=lambda info: info.numel).dtype
    return torch.float32 if kind is torch.float16 and device.type == "cpu" else kind


def _assign(model: nn.Module, name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    # A copy, since the file's pages are read-only and shared.
    value = tensor.detach().to(device=device, dtype=dtype if tensor.is_floating_point() else None, copy=True).contiguous()
    if leaf in owner._parameters:
        setattr(owner, leaf, nn.Parameter(value, requires_grad=tensor.is_floating_point()))
    else:
        setattr(owner, leaf, value)


def tensors(source: Source) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """(name, shape, stored type) of every tensor in the file."""
    file = source.open()
    try:
        for key in file.keys():
            info = file.info(key)
            yield key, info.shape, info.kind
    finally:
        file.close()


def dumps(config: Mapping[str, Any]) -> str:
    """A configuration as the text of config.json."""
    return json.dumps(config, indent=2, sort_keys=True) + "\n"
