"""What every weight file offers, and the two things every reader needs: a bounded map of the file, and sentences for its lies."""

from __future__ import annotations

import json
import math
import mmap
import os
import stat
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn, Protocol, runtime_checkable

import torch

from transept.core.errors import CheckpointError, nearest

MAX_DIMS = 16


@dataclass(frozen=True)
class TensorInfo:
    """What a file declares of one tensor before its bytes are touched.

    `kind` is the stored type ("F32", "Q4_K"), `dtype` the type that read() gives.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: str

    @property
    def numel(self) -> int:
        """The number of elements, as a Python int that cannot overflow."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes that read() will return."""
        return self.numel * self.dtype.itemsize


@runtime_checkable
class TensorFile(Protocol):
    """A named set of tensors that can be listed and described without reading them."""

    path: Path

    def keys(self) -> list[str]: ...

    def info(self, key: str) -> TensorInfo: ...

    def read(self, key: str) -> torch.Tensor: ...

    def close(self) -> None: ...


class Tensors:
    """Declared tensors that are made one at a time when asked for: what a streaming writer takes."""

    def __init__(self, infos: Mapping[str, TensorInfo], make: Callable[[str], torch.Tensor], path: Path = Path("<memory>")) -> None:
        self.path = path
        self._infos = dict(infos)
        self._make = make

    def keys(self) -> list[str]:
        """All names, in the order given."""
        return list(self._infos)

    def info(self, key: str) -> TensorInfo:
        """What was declared for `key`."""
        return self._infos[key]

    def read(self, key: str) -> torch.Tensor:
        """The tensor; CheckpointError where it differs from its declaration."""
        tensor, info = self._make(key), self._infos[key]
        if tuple(tensor.shape) != info.shape or tensor.dtype != info.dtype:
            found = f"{tuple(tensor.shape)} {tensor.dtype}"
            refuse(self.path, f"tensor {key!r}", found, f"the declared {info.shape} {info.dtype}")
        return tensor

    def close(self) -> None:
        """Nothing to close."""


def declare(tensors: Mapping[str, torch.Tensor], kinds: Mapping[torch.dtype, str]) -> Tensors:
    """Tensors in memory as declared tensors; CheckpointError for a dtype that the format, described by `kinds`, cannot store."""
    infos: dict[str, TensorInfo] = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in kinds:
            refuse("<memory>", f"dtype of tensor {name!r}", str(tensor.dtype), f"one of {', '.join(map(str, kinds))}")
        infos[name] = TensorInfo(name, tuple(tensor.shape), tensor.dtype, kinds[tensor.dtype])
    return Tensors(infos, lambda key: tensors[key])


def refuse(path: Path | str, field: str, found: object, expected: str) -> NoReturn:
    """Raises CheckpointError with file, field, what was found and what was expected; `found` is clipped to 120 characters."""
    text = found if isinstance(found, str) else repr(found)
    text = text if len(text) <= 120 else text[:117] + "..."
    raise CheckpointError(f"{path}: {field} is {text}, expected {expected}")


def lookup(path: Path, table: Mapping[str, Any], key: str) -> Any:
    """`table[key]`; CheckpointError naming the nearest key where it is absent."""
    if key not in table:
        raise CheckpointError(f"{path}: there is no tensor {key!r} among its {len(table)}{nearest(key, islice(table, 5000))}")
    return table[key]


class MappedFile:
    """A regular file mapped privately into memory: nothing is read before it is asked for, writes never reach the file.

    Tensors made from it stay valid after close() and after the file is replaced by rename; a file that another process truncates in
    place meanwhile is outside what a memory map can survive.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            mode = os.stat(self.path).st_mode
            # Before opening, because opening a pipe or a device can wait for ever.
            if not stat.S_ISREG(mode):
                refuse(self.path, "the path", "a folder or a device", "a regular file")
            with open(self.path, "rb") as handle:
                self.size = os.fstat(handle.fileno()).st_size
                if self.size == 0:
                    refuse(self.path, "the file", "empty", "a weight file")
                # A private writable map: a read-only one would hand out tensors whose first in-place change kills the process.
                self._map: mmap.mmap | None = mmap.mmap(handle.fileno(), self.size, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise CheckpointError(f"{str(self.path)!r}: the file cannot be opened ({reason}), expected a readable weight file") from error

    def _open_map(self) -> mmap.mmap:
        if self._map is None:
            refuse(self.path, "the file", "closed", "an open file")
        return self._map

    def check(self, at: int, count: int, field: str) -> None:
        """CheckpointError unless bytes at .. at + count lie inside the file."""
        if at < 0 or count < 0 or at + count > self.size:
            refuse(self.path, field, f"bytes {at} to {at + count}", f"a range inside the file's {self.size} bytes")

    def bytes(self, at: int, count: int, field: str) -> bytes:
        """A copy of `count` bytes from offset `at`."""
        self.check(at, count, field)
        return self._open_map()[at : at + count]

    def view(self, at: int, count: int, field: str) -> memoryview:
        """`count` bytes from offset `at`, not copied."""
        self.check(at, count, field)
        return memoryview(self._open_map())[at : at + count]

    def tensor(self, dtype: torch.dtype, shape: tuple[int, ...], at: int, field: str) -> torch.Tensor:
        """The tensor stored little-endian and contiguous at offset `at`, sharing the map's memory where its address is aligned."""
        count = math.prod(shape)
        self.check(at, count * dtype.itemsize, field)
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        if dtype == torch.bool:
            raw = torch.frombuffer(self._open_map(), dtype=torch.uint8, count=count, offset=at)
            if int(raw.max()) > 1:
                refuse(self.path, field, f"a truth value of {int(raw.max())}", "0 or 1 in each byte")
            return raw.view(torch.bool).reshape(shape)
        if at % dtype.itemsize:
            raw = torch.frombuffer(self._open_map(), dtype=torch.uint8, count=count * dtype.itemsize, offset=at)
            return raw.clone().view(dtype).reshape(shape)
        return torch.frombuffer(self._open_map(), dtype=dtype, count=count, offset=at).reshape(shape)

    def close(self) -> None:
        """Lets go of the map; tensors already read keep their memory."""
        self._map = None


def strict_json(path: Path, field: str, text: bytes) -> dict[str, Any]:
    """A JSON object from `text`; CheckpointError for bad UTF-8, duplicate keys, fractions, absurd depth or anything that is no object."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(items)
        if len(table) != len(items):
            twice = next(name for name, times in Counter(name for name, _ in items).items() if times > 1)
            refuse(path, field, f"naming {twice!r} twice", "each key once")
        for name, value in items:
            # JSON escapes can spell half of a surrogate pair, which no file could be written with again.
            (name + value if isinstance(value, str) else name).encode("utf-8")
        return table

    def constant(word: str) -> NoReturn:
        refuse(path, field, f"holding {word}", "finite numbers")

    def whole(word: str) -> int:
        if word == "-0":
            refuse(path, field, "holding the number -0", "whole numbers as JSON writers spell them")
        return int(word)

    # A bracket costs a container of some 60 bytes: text made of brackets alone would grow twentyfold before the structure is looked at.
    if text.count(b"[") + text.count(b"{") > 64 + len(text) // 12:
        refuse(path, field, "nothing but nested brackets", "a JSON object of names and numbers")
    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant, parse_int=whole)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {field} is not JSON ({str(error)[:120]}), expected a JSON object") from error
    if not isinstance(found, dict):
        refuse(path, field, f"a JSON {type(found).__name__}", "a JSON object")
    return found
