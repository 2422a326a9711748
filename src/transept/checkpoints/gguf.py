"""The GGUF container (ggml's docs/gguf.md), versions 2 and 3, little-endian: read strictly, written plainly.

Layout: magic, version, counts, metadata entries, tensor entries, padding to the alignment, tensor bytes, each tensor at an aligned offset.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from transept.checkpoints.atomic import atomic
from transept.checkpoints.quants import KIND_OF_NUMBER, QUANTS, dequantize, quantize
from transept.checkpoints.safetensors import tensor_bytes
from transept.checkpoints.tensorfile import MappedFile, TensorFile, TensorInfo, declare, lookup, refuse

MAX_NAME = 255
MAX_KEY = 65535
MAX_DIMS = 4
MAX_NESTING = 4
# Above the largest published vocabularies with their scores and merges; below what would outgrow the file in memory.
MAX_ELEMENTS = 1 << 21
MAX_ALIGNMENT = 1 << 20

SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 10: "<Q", 11: "<q", 12: "<d"}
BOOL, STRING, ARRAY = 7, 8, 9
UINT32, INT32, FLOAT32, UINT64, INT64 = 4, 5, 6, 10, 11
PLAIN = {form.dtype: kind for kind, form in QUANTS.items() if form.decode is None}
LEAST_BYTES = {**{number: struct.calcsize(form) for number, form in SCALARS.items()}, BOOL: 1, STRING: 8, ARRAY: 12}


class _Cursor:
    """Walks the head of the file; every step is checked against the file's length first."""

    def __init__(self, file: MappedFile) -> None:
        self.file = file
        self.at = 0
        self.elements = 0

    def take(self, count: int, field: str) -> bytes:
        """The next `count` bytes."""
        found = self.file.bytes(self.at, count, field)
        self.at += count
        return found

    def number(self, form: str, field: str) -> Any:
        """The next number of the struct format `form`."""
        return struct.unpack(form, self.take(struct.calcsize(form), field))[0]

    def text(self, field: str, most: int | None = None) -> str:
        """The next length-prefixed UTF-8 string."""
        size = self.number("<Q", f"length of {field}")
        if most is not None and size > most:
            refuse(self.file.path, f"length of {field}", size, f"at most {most}")
        raw = self.take(size, field)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            refuse(self.file.path, field, raw[:40], "UTF-8 text")

    def room(self, count: int, least: int, field: str) -> None:
        """CheckpointError unless `count` things of at least `least` bytes can still follow."""
        left = self.file.size - self.at
        if count * least > left:
            refuse(self.file.path, field, count, f"at most {left // least}, which is what the {left} bytes left can hold")

    def value(self, kind: int, field: str, depth: int = 0) -> Any:
        """The next metadata value of the type numbered `kind`."""
        if kind in SCALARS:
            return self.number(SCALARS[kind], field)
        if kind == BOOL:
            return self._truths(self.take(1, field), field)[0]
        if kind == STRING:
            return self.text(field)
        if kind == ARRAY:
            return self._array(field, depth + 1)
        refuse(self.file.path, f"type of {field}", kind, "a number from 0 to 12")

    def _truths(self, raw: bytes, field: str) -> list[bool]:
        if raw.strip(b"\0\1"):
            refuse(self.file.path, field, f"a truth value of {raw.strip(bytes(2))[0]}", "0 or 1")
        return [byte == 1 for byte in raw]

    def _array(self, field: str, depth: int) -> list[Any]:
        kind = self.number("<I", f"element type of {field}")
        if kind not in LEAST_BYTES:
            refuse(self.file.path, f"element type of {field}", kind, "a number from 0 to 12")
        if depth > MAX_NESTING:
            refuse(self.file.path, field, f"an array nested {depth} deep", f"at most {MAX_NESTING}")
        count = self.number("<Q", f"length of {field}")
        self.room(count, LEAST_BYTES[kind], f"length of {field}")
        self.elements += count
        if self.elements > MAX_ELEMENTS:
            refuse(self.file.path, f"length of {field}", f"{self.elements} with the arrays before it", f"at most {MAX_ELEMENTS}")
        if kind in SCALARS:
            form = f"<{count}{SCALARS[kind][1]}"
            return list(struct.unpack(form, self.take(struct.calcsize(form), field)))
        if kind == BOOL:
            return self._truths(self.take(count, field), field)
        if kind == STRING:
            return [self.text(field) for _ in range(count)]
        return [self.value(kind, field, depth) for _ in range(count)]


class GGUFFile:
    """An open GGUF file; `metadata` maps each key to a number, truth value, text or list of them; `version` is 2 or 3."""

    def __init__(self, path: str | Path) -> None:
        self._file = MappedFile(path)
        self.path = self._file.path
        cursor = _Cursor(self._file)
        self.version, tensors, entries = _preamble(cursor)
        self.metadata: dict[str, Any] = {}
        for number in range(entries):
            key = cursor.text(f"key of metadata entry {number}", MAX_KEY)
            if not key or key in self.metadata:
                refuse(self.path, f"key of metadata entry {number}", f"{key!r}, empty or seen before", "a new name")
            kind = cursor.number("<I", f"type of {key!r}")
            self.metadata[key] = cursor.value(kind, repr(key))
            if key == "general.alignment" and kind != UINT32:
                refuse(self.path, "type of 'general.alignment'", kind, f"{UINT32} (uint32)")
        self._infos: dict[str, TensorInfo] = {}
        self._begins: dict[str, int] = {}
        cursor.room(tensors, 24, "the tensor count")
        for number in range(tensors):
            info, offset = _entry(cursor, number)
            if info.name in self._infos:
                refuse(self.path, f"name of tensor {number}", f"{info.name!r} a second time", "a new name")
            self._infos[info.name], self._begins[info.name] = info, offset
        self._place(cursor.at)

    def _place(self, head: int) -> None:
        """Turns offsets into file positions and proves that the tensors tile the rest of the file up to padding."""
        align = self.metadata.get("general.alignment", 32)
        if not 8 <= align <= MAX_ALIGNMENT or align & (align - 1):
            refuse(self.path, "general.alignment", align, f"a power of two from 8 to {MAX_ALIGNMENT}")
        start = head + -head % align
        at = 0
        for name, offset in sorted(self._begins.items(), key=lambda item: item[1]):
            if offset != at + -at % align:
                expected = f"{at + -at % align}, behind the tensor before it at alignment {align}"
                refuse(self.path, f"offset of tensor {name!r}", offset, expected)
            at = offset + stored_bytes(self._infos[name])
            self._begins[name] = start + offset
        need = start + at if self._begins else head
        most = start + at + -at % align
        if not need <= self._file.size <= most:
            refuse(self.path, "the file", f"{self._file.size} bytes long", f"{most} (or {need} without padding), as its tensors declare")

    def keys(self) -> list[str]:
        """All tensor names, in the order of the file."""
        return list(self._infos)

    def info(self, key: str) -> TensorInfo:
        """Shape (row-major: the reverse of GGUF's own order), kind, and the dtype that read() gives."""
        return lookup(self.path, self._infos, key)

    def raw(self, key: str) -> torch.Tensor:
        """The stored bytes, uint8 [rows, bytes per row], mapped and not copied."""
        info = self.info(key)
        width = info.shape[-1] if info.shape else 1
        row = width // QUANTS[info.kind].length * QUANTS[info.kind].nbytes
        return self._file.tensor(torch.uint8, (info.numel // width, row), self._begins[key], f"tensor {key!r}")

    def read(self, key: str) -> torch.Tensor:
        """The tensor: float32 for block kinds, its own dtype otherwise (then mapped and not copied)."""
        info = self.info(key)
        if QUANTS[info.kind].decode is None:
            return self._file.tensor(info.dtype, info.shape, self._begins[key], f"tensor {key!r}")
        return dequantize(info.kind, self.raw(key), info.shape)

    def close(self) -> None:
        """Lets go of the file."""
        self._file.close()


def open_gguf(path: str | Path) -> GGUFFile:
    """Opens one GGUF file after checking every count, length and offset against the file's length; CheckpointError for any lie."""
    return GGUFFile(path)


def stored_bytes(info: TensorInfo) -> int:
    """The bytes that a tensor occupies as stored."""
    form = QUANTS[info.kind]
    return info.numel // form.length * form.nbytes


def _preamble(cursor: _Cursor) -> tuple[int, int, int]:
    """(version, tensor count, metadata count), with both counts bounded by the file's length."""
    path = cursor.file.path
    magic = cursor.take(4, "magic")
    if magic != b"GGUF":
        refuse(path, "magic", magic, "b'GGUF'")
    version = cursor.number("<I", "version")
    if version not in (2, 3):
        hint = " (a big-endian file: convert it to little-endian)" if version & 0xFFFF == 0 and version else ""
        refuse(path, "version", f"{version}{hint}", "2 or 3")
    tensors = cursor.number("<Q", "the tensor count")
    entries = cursor.number("<Q", "the metadata count")
    cursor.room(tensors, 24, "the tensor count")
    cursor.room(entries, 13, "the metadata count")
    return version, tensors, entries


def _entry(cursor: _Cursor, number: int) -> tuple[TensorInfo, int]:
    """One tensor entry as (info, offset)."""
    path = cursor.file.path
    name = cursor.text(f"name of tensor {number}", MAX_NAME)
    rank = cursor.number("<I", f"rank of tensor {name!r}")
    if rank > MAX_DIMS:
        refuse(path, f"rank of tensor {name!r}", rank, f"at most {MAX_DIMS}")
    dims = struct.unpack(f"<{rank}Q", cursor.take(8 * rank, f"shape of tensor {name!r}"))
    if math.prod(dims) not in range(1, 1 << 63):
        refuse(path, f"shape of tensor {name!r}", list(dims), "from 1 to 2^63 - 1 elements")
    code = cursor.number("<I", f"kind of tensor {name!r}")
    if code not in KIND_OF_NUMBER:
        refuse(path, f"kind of tensor {name!r}", f"number {code}", f"one of {', '.join(f'{n} ({k})' for n, k in KIND_OF_NUMBER.items())}")
    kind = KIND_OF_NUMBER[code]
    form = QUANTS[kind]
    if (dims[0] if dims else 1) % form.length:
        refuse(path, f"shape of tensor {name!r}", list(dims), f"rows of a multiple of {form.length} for {kind}")
    offset = cursor.number("<Q", f"offset of tensor {name!r}")
    return TensorInfo(name, tuple(reversed(dims)), form.dtype, kind), offset


def write_gguf(
    path: str | Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor] | TensorFile,
    kinds: Mapping[str, str] | None = None,
) -> None:
    """Writes a version-3 file, whole or not at all.

    metadata: text, truth values, floats (stored as float32), integers (uint32, else int32, else 64 bits), and lists of one of these
    (integers as int32 where they fit). kinds: the stored kind by tensor name; a name without one keeps its own dtype. Tensors are read
    one by one.
    """
    path = Path(path)
    source = declare(tensors, PLAIN) if isinstance(tensors, Mapping) else tensors
    align = metadata.get("general.alignment", 32)
    infos = [_stored_info(path, source.info(key), (kinds or {}).get(key)) for key in source.keys()]
    head = b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(metadata))
    head += b"".join(_pack_text(key) + _pack_value(path, key, value) for key, value in metadata.items())
    at = 0
    for info in infos:
        dims = info.shape[::-1]
        head += _pack_text(info.name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, QUANTS[info.kind].number, at)
        at += stored_bytes(info)
        at += -at % align
    with atomic(path) as out:
        out.write(head + bytes(-len(head) % align))
        for info in infos:
            tensor = source.read(info.name)
            out.write(tensor_bytes(quantize(info.kind, tensor) if tensor.ndim else tensor.to(info.dtype)))
            out.write(bytes(-stored_bytes(info) % align))


def _stored_info(path: Path, info: TensorInfo, kind: str | None) -> TensorInfo:
    """The info of a tensor as it will be stored; CheckpointError for what GGUF or our encoders cannot hold."""
    kind = kind or PLAIN.get(info.dtype)
    if kind not in QUANTS or (QUANTS[kind].decode and not QUANTS[kind].encode):
        refuse(path, f"kind of tensor {info.name!r}", str(kind or info.dtype), "F32, F16, BF16, Q8_0, Q4_0 or Q4_1")
    if len(info.shape) > MAX_DIMS or not info.numel or (info.shape[-1] if info.shape else 1) % QUANTS[kind].length:
        expected = f"at most {MAX_DIMS} dimensions, none empty, rows of a multiple of {QUANTS[kind].length}"
        refuse(path, f"shape of tensor {info.name!r}", list(info.shape), expected)
    if len(info.name.encode()) > MAX_NAME:
        refuse(path, "a tensor name", info.name, f"at most {MAX_NAME} bytes")
    return TensorInfo(info.name, info.shape, QUANTS[kind].dtype, kind)


def _pack_text(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _number_type(values: list[Any], alone: bool) -> int:
    """The narrowest type of the usual ones that holds all values."""
    if any(isinstance(value, float) for value in values):
        return FLOAT32
    low, high = min(values), max(values)
    if alone and 0 <= low and high < 1 << 32:
        return UINT32
    if -(1 << 31) <= low and high < 1 << 31:
        return INT32
    return INT64 if high < 1 << 63 else UINT64


def _pack_value(path: Path, key: str, value: Any) -> bytes:
    """One metadata value with its type number in front."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    alone = not isinstance(value, (list, tuple))
    try:
        if all(isinstance(v, bool) for v in values) and values:
            kind, body = BOOL, bytes(values)
        elif all(isinstance(v, str) for v in values):
            kind, body = STRING, b"".join(map(_pack_text, values))
        elif all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
            kind = _number_type(values, alone)
            body = struct.pack(f"<{len(values)}{SCALARS[kind][1]}", *values)
        else:
            refuse(path, f"metadata {key!r}", value, "text, numbers or truth values, or a list of one of them")
    except (struct.error, OverflowError):
        refuse(path, f"metadata {key!r}", value, "numbers that fit 64 bits")
    return struct.pack("<I", kind) + body if alone else struct.pack("<IIQ", ARRAY, kind, len(values)) + body
