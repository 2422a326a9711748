"""Checkpoints cut into several files under one index (model.safetensors.index.json, pytorch_model.bin.index.json)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from transept.checkpoints.atomic import atomic
from transept.checkpoints.safetensors import KINDS, open_safetensors, write_safetensors
from transept.checkpoints.tensorfile import MappedFile, TensorFile, TensorInfo, Tensors, declare, lookup, refuse, strict_json
from transept.checkpoints.torchbin import open_torchbin
from transept.core.errors import CheckpointError

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
MAX_INDEX = 100_000_000
MAX_SHARDS = 4096


class ShardedFile:
    """Several weight files seen as one; `metadata` is the index's own table."""

    def __init__(self, index: Path) -> None:
        self.path = index
        table = _read_index(index)
        self.metadata: dict[str, Any] = table.get("metadata") or {}
        self._shards: dict[str, TensorFile] = {}
        self._where = _weight_map(index, table)
        try:
            for name in dict.fromkeys(self._where.values()):
                self._shards[name] = _open_shard(index, name)
            _check_promises(index, self._where, self._shards)
        except BaseException:
            self.close()
            raise

    def keys(self) -> list[str]:
        """All tensor names, in the order of the index."""
        return list(self._where)

    def info(self, key: str) -> TensorInfo:
        """Shape and dtype of one tensor; CheckpointError with the nearest name where it is absent."""
        return self._shards[lookup(self.path, self._where, key)].info(key)

    def read(self, key: str) -> torch.Tensor:
        """One tensor from the shard that holds it."""
        return self._shards[lookup(self.path, self._where, key)].read(key)

    def close(self) -> None:
        """Closes every shard."""
        for shard in self._shards.values():
            shard.close()


def open_sharded(folder_or_index: str | Path) -> ShardedFile:
    """Opens all shards that an index names and proves that index and shards tell of the same tensors; CheckpointError otherwise."""
    path = Path(folder_or_index)
    if not path.is_dir():
        return ShardedFile(path)
    for name in INDEXES:
        if (path / name).is_file():
            return ShardedFile(path / name)
    raise CheckpointError(f"{path}: the folder holds no index, expected {' or '.join(INDEXES)}")


def _read_index(index: Path) -> dict[str, Any]:
    file = MappedFile(index)
    if file.size > MAX_INDEX:
        refuse(index, "the index", f"{file.size} bytes", f"at most {MAX_INDEX}")
    table = strict_json(index, "the index", file.bytes(0, file.size, "the index"))
    file.close()
    if not isinstance(table.get("metadata") or {}, dict):
        refuse(index, "metadata", table["metadata"], "an object")
    return table


def _weight_map(index: Path, table: dict[str, Any]) -> dict[str, str]:
    where = table.get("weight_map")
    if not isinstance(where, dict) or not where:
        refuse(index, "weight_map", where, "an object of tensor name -> file name")
    for key, name in where.items():
        # One plain name, so that no index reaches outside its own folder on any system.
        plain = isinstance(name, str) and 0 < len(name) <= 255 and not name.startswith(".") and not set(name) & set('/\\:\0')
        if not plain or not name.endswith((".safetensors", ".bin", ".pt", ".pth")):
            refuse(index, f"weight_map of {key!r}", name, "the plain name of a .safetensors or .bin file in the same folder")
    shards = len(set(where.values()))
    if shards > MAX_SHARDS:
        refuse(index, "weight_map", f"{shards} files", f"at most {MAX_SHARDS}")
    return where


def _open_shard(index: Path, name: str) -> TensorFile:
    path = index.parent / name
    if not path.is_file():
        raise CheckpointError(f"{index}: weight_map names the shard {name!r}, which is missing from the folder")
    return open_safetensors(path) if name.endswith(".safetensors") else open_torchbin(path)


def _check_promises(index: Path, where: dict[str, str], shards: dict[str, TensorFile]) -> None:
    """CheckpointError unless every promised key is in its shard and no shard holds a key promised elsewhere or nowhere."""
    held: dict[str, str] = {}
    for name, shard in shards.items():
        for key in shard.keys():
            if key in held:
                refuse(index, f"tensor {key!r}", f"in two shards, {held[key]!r} and {name!r}", "in one")
            if key not in where:
                refuse(index, f"tensor {key!r}", f"in the shard {name!r} and not in weight_map", "every tensor of a shard in weight_map")
            held[key] = name
    for key, name in where.items():
        if held.get(key) != name:
            found = f"in {held[key]!r}" if key in held else "absent"
            refuse(index, f"tensor {key!r}", found, f"in the shard {name!r}, as weight_map promises")


def write_sharded(
    folder: str | Path,
    tensors: Mapping[str, torch.Tensor] | TensorFile,
    max_bytes: int = 5_000_000_000,
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """Writes model.safetensors, or as many numbered shards of at most `max_bytes` (a larger tensor has its own) with an index written last.

    Returns the paths written. The names are those that transformers reads.
    """
    folder = Path(folder)
    source = declare(tensors, KINDS) if isinstance(tensors, Mapping) else tensors
    groups: list[dict[str, TensorInfo]] = [{}]
    room = max_bytes
    for key in source.keys():
        info = source.info(key)
        if groups[-1] and info.nbytes > room:
            groups.append({})
            room = max_bytes
        groups[-1][key] = info
        room -= info.nbytes
    if len(groups) == 1:
        write_safetensors(folder / "model.safetensors", source, metadata)
        return [folder / "model.safetensors"]
    paths: list[Path] = []
    where: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        write_safetensors(folder / name, Tensors(group, source.read, source.path), metadata)
        paths.append(folder / name)
        where.update(dict.fromkeys(group, name))
    total = sum(info.nbytes for group in groups for info in group.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    with atomic(folder / INDEXES[0]) as out:
        out.write((json.dumps(index, indent=2) + "\n").encode())
    return [*paths, folder / INDEXES[0]]
