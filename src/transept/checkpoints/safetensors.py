"""The safetensors container, read strictly and written atomically.

Layout (safetensors README, "Format"): 8 bytes little-endian header size, a JSON header of name -> dtype, shape, data_offsets, then
the bytes, with no holes and no overlap.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from transept.checkpoints.atomic import atomic
from transept.checkpoints.tensorfile import MAX_DIMS, MappedFile, TensorFile, TensorInfo, declare, lookup, refuse, strict_json
from transept.core.errors import nearest

MAX_HEADER = 100_000_000

# In the format's own order of alignment: the writer lays tensors out from the last kind to the first.
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
KINDS = {dtype: kind for kind, dtype in DTYPES.items()}
ORDER = {kind: place for place, kind in enumerate(DTYPES)}


class SafetensorsFile:
    """An open safetensors file; `metadata` is its table of strings."""

    def __init__(self, path: str | Path) -> None:
        self._file = MappedFile(path)
        self.path = self._file.path
        header, self._start = _header(self._file)
        self.metadata = _metadata(self.path, header.pop("__metadata__", {}))
        self._infos: dict[str, TensorInfo] = {}
        self._begins: dict[str, int] = {}
        spans: list[tuple[int, int, str]] = []
        for name, entry in header.items():
            self._infos[name], begin, end = _entry(self.path, name, entry)
            self._begins[name] = self._start + begin
            spans.append((begin, end, name))
        _check_spans(self.path, spans, self._file.size - self._start)

    def keys(self) -> list[str]:
        """All tensor names, in the order of the header."""
        return list(self._infos)

    def info(self, key: str) -> TensorInfo:
        """Shape and dtype of one tensor; CheckpointError with the nearest name where it is absent."""
        return lookup(self.path, self._infos, key)

    def read(self, key: str) -> torch.Tensor:
        """One tensor in its stored dtype, mapped and not copied where it is aligned; it stays valid after close()."""
        info = self.info(key)
        return self._file.tensor(info.dtype, info.shape, self._begins[key], f"tensor {key!r}")

    def close(self) -> None:
        """Lets go of the file."""
        self._file.close()


def open_safetensors(path: str | Path) -> SafetensorsFile:
    """Opens one safetensors file after checking its whole header against the file's length; CheckpointError for any lie."""
    return SafetensorsFile(path)


def _header(file: MappedFile) -> tuple[dict[str, Any], int]:
    size = int.from_bytes(file.bytes(0, 8, "header size"), "little")
    if size > MAX_HEADER:
        refuse(file.path, "header size", size, f"at most {MAX_HEADER} bytes")
    text = file.bytes(8, size, "header")
    if text[:1] != b"{":
        refuse(file.path, "header", f"beginning with {text[:8]!r}", "a JSON object")
    return strict_json(file.path, "header", text), 8 + size


def _metadata(path: Path, found: Any) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        refuse(path, "__metadata__", found, "an object of strings")
    return found


def _numbers(path: Path, field: str, found: Any, most: int) -> tuple[int, ...]:
    good = isinstance(found, list) and len(found) <= most and all(type(n) is int and 0 <= n < 2**63 for n in found)
    if not good:
        refuse(path, field, found, f"a list of at most {most} whole numbers from 0 to 2^63 - 1")
    return tuple(found)


def _entry(path: Path, name: str, entry: Any) -> tuple[TensorInfo, int, int]:
    """One header entry as (info, begin, end), with begin..end proved to hold exactly shape x dtype."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        refuse(path, f"header of tensor {name!r}", entry, "an object of dtype, shape and data_offsets")
    kind = entry["dtype"]
    if not isinstance(kind, str) or kind not in DTYPES:
        refuse(path, f"dtype of tensor {name!r}", kind, f"one of {', '.join(DTYPES)}{nearest(str(kind)[:40], DTYPES)}")
    shape = _numbers(path, f"shape of tensor {name!r}", entry["shape"], MAX_DIMS)
    # torch counts strides even where one dimension is 0, and its own count must not overflow.
    if math.prod(max(n, 1) for n in shape) >= 1 << 60:
        refuse(path, f"shape of tensor {name!r}", list(shape), "fewer than 2^60 elements, dimensions of 0 left aside")
    offsets = _numbers(path, f"data_offsets of tensor {name!r}", entry["data_offsets"], 2)
    need = math.prod(shape) * DTYPES[kind].itemsize
    if len(offsets) != 2 or offsets[1] - offsets[0] != need:
        refuse(path, f"data_offsets of tensor {name!r}", list(offsets), f"two offsets {need} bytes apart for {kind} {list(shape)}")
    return TensorInfo(name, shape, DTYPES[kind], kind), offsets[0], offsets[1]


def _check_spans(path: Path, spans: list[tuple[int, int, str]], size: int) -> None:
    """CheckpointError unless the tensors tile the data bytes exactly: no hole, no overlap, nothing behind."""
    at = 0
    for begin, end, name in sorted(spans):
        if begin != at:
            refuse(path, f"data_offsets of tensor {name!r}", [begin, end], f"to begin at {at}, where the tensor before it ends")
        at = end
    if at != size:
        refuse(path, "the file", f"{size} bytes of data", f"{at} bytes, as the header declares")


def write_safetensors(
    path: str | Path, tensors: Mapping[str, torch.Tensor] | TensorFile, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes one file, whole or not at all: a temporary sibling, fsync, rename.

    `tensors` is a mapping, or a TensorFile whose tensors are read one by one as they are written. The layout is that of the safetensors
    package: widest dtype first, then by name; the same tensors always give the same bytes.
    """
    with atomic(Path(path)) as out:
        for piece in pieces(path, tensors, metadata):
            out.write(piece)


def pieces(
    path: str | Path, tensors: Mapping[str, torch.Tensor] | TensorFile, metadata: Mapping[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    """The bytes of one file, in order: its head, then each tensor; `path` only names it in errors."""
    path = Path(path)
    source = declare(tensors, KINDS) if isinstance(tensors, Mapping) else tensors
    infos = [source.info(key) for key in source.keys()]
    for info in infos:
        if info.dtype not in KINDS:
            refuse(path, f"dtype of tensor {info.name!r}", str(info.dtype), f"one of {', '.join(map(str, KINDS))}")
        if info.name == "__metadata__":
            refuse(path, "the tensor name", "'__metadata__'", "a name that the format does not keep for itself")
    infos.sort(key=lambda info: (-ORDER[KINDS[info.dtype]], info.name.encode()))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    at = 0
    for info in infos:
        header[info.name] = {"dtype": KINDS[info.dtype], "shape": list(info.shape), "data_offsets": [at, at + info.nbytes]}
        at += info.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        refuse(path, "the header", f"{len(text)} bytes", f"at most {MAX_HEADER}")
    yield len(text).to_bytes(8, "little") + text
    for info in infos:
        tensor = source.read(info.name)
        if tuple(tensor.shape) != info.shape or tensor.dtype != info.dtype:
            refuse(path, f"tensor {info.name!r}", f"{tuple(tensor.shape)} {tensor.dtype}", f"the declared {info.shape} {info.dtype}")
        yield tensor_bytes(tensor)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The little-endian bytes of a tensor, row-major; copied only where it is not contiguous or not on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.dtype == torch.bool:
        flat = flat.to(torch.uint8)
    return flat.view(torch.uint8).numpy().data
