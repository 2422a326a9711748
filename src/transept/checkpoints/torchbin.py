"""State dicts that torch.save wrote (.bin, .pt, .pth), read without running them.

The container is an uncompressed zip of `data.pkl` and one record per storage. The pickle is walked by an interpreter of our own that knows
the two dozen opcodes of a plain state dict and a closed list of names; a name stands for a fixed rule here and is never looked up anywhere.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from transept.checkpoints.safetensors import KINDS
from transept.checkpoints.statepickle import Storage, View, walk
from transept.checkpoints.tensorfile import MappedFile, TensorInfo, lookup, refuse

MAX_RECORDS = 1 << 20
MAX_PICKLE = 64_000_000
MAX_DEPTH = 8

_LOCAL, _CENTRAL, _END, _END64, _LOCATOR64 = b"PK\3\4", b"PK\1\2", b"PK\5\6", b"PK\6\6", b"PK\6\7"
# Small records beside the data that each hold one number.
NUMERALS = ("version", ".format_version", ".storage_alignment", ".data/serialization_id")
_ALLOWED_FLAGS = 0x0808  # bit 3: sizes follow the data; bit 11: UTF-8 names. Encryption and patches are others.


@dataclass(frozen=True)
class Record:
    """One file of the zip: where its bytes lie and their CRC-32."""

    name: str
    at: int
    size: int
    crc: int


class TorchBinFile:
    """An open state dict. Nested tables are flattened with dots; numbers and texts beside the tensors are in `metadata`."""

    def __init__(self, path: str | Path) -> None:
        self._file = MappedFile(path)
        self.path = self._file.path
        self._records, self._folder = _records(self._file)
        self._sound: set[str] = set()
        self._check_notes()
        program = self._records[f"{self._folder}/data.pkl"]
        if program.size > MAX_PICKLE:
            refuse(self.path, "size of data.pkl", program.size, f"at most {MAX_PICKLE}")
        self.metadata: dict[str, Any] = {}
        self._views: dict[str, View] = {}
        root = walk(self.path, bytes(self._bytes(program)))
        if not isinstance(root, dict):
            refuse(self.path, "data.pkl", f"a {type(root).__name__}", "a state dict (names to tensors)")
        self._flatten("", root, 0, set())
        for name, view in self._views.items():
            self._check_storage(name, view.storage)

    def _check_notes(self) -> None:
        """CheckpointError for a record that no state dict has (TorchScript's code, say) or a damaged small one."""
        if f"{self._folder}/version" not in self._records:
            refuse(self.path, "the zip", "without a record 'version'", "the records that torch.save writes")
        for record in self._records.values():
            name = record.name.removeprefix(self._folder + "/")
            if name == "data.pkl" or (name.startswith("data/") and name[5:].isalnum()):
                continue
            if name not in (*NUMERALS, "byteorder") or record.size > 64:
                found = f"holding the record {record.name!r} of {record.size} bytes"
                refuse(self.path, "the zip", found, "the records of a plain state dict")
            found = bytes(self._bytes(record))
            if name == "byteorder" and found != b"little":
                refuse(self.path, "byteorder", found, "b'little'")
            if name != "byteorder" and not found.strip().isdigit():
                refuse(self.path, f"record {record.name!r}", found, "a decimal number")

    def keys(self) -> list[str]:
        """All tensor names, in the order of the file."""
        return list(self._views)

    def info(self, key: str) -> TensorInfo:
        """Shape and dtype of one tensor; CheckpointError with the nearest name where it is absent."""
        view = lookup(self.path, self._views, key)
        return TensorInfo(key, view.shape, view.dtype, KINDS[view.dtype])

    def read(self, key: str) -> torch.Tensor:
        """One tensor, mapped and not copied; its storage's CRC is checked when it is first touched."""
        view: View = lookup(self.path, self._views, key)
        record = self._records[f"{self._folder}/data/{view.storage.key}"]
        self._bytes(record)
        storage = self._file.tensor(view.dtype, (record.size // view.dtype.itemsize,), record.at, f"storage {view.storage.key!r}")
        return storage.as_strided(view.shape, view.stride, view.offset)

    def close(self) -> None:
        """Lets go of the file."""
        self._file.close()

    def _bytes(self, record: Record) -> memoryview:
        """The bytes of a record, after its CRC was found right."""
        data = self._file.view(record.at, record.size, f"record {record.name!r}")
        if record.name not in self._sound:
            found = zlib.crc32(data)
            if found != record.crc:
                refuse(self.path, f"CRC-32 of record {record.name!r}", f"{found:08x}", f"{record.crc:08x}: the file is damaged")
            self._sound.add(record.name)
        return data

    def _check_storage(self, name: str, storage: Storage) -> None:
        record = self._records.get(f"{self._folder}/data/{storage.key}")
        if record is None:
            refuse(self.path, f"storage of tensor {name!r}", f"{storage.key!r}, which is no record of the file", "one of its data/ records")
        if record.size != storage.nbytes:
            refuse(self.path, f"size of storage {storage.key!r}", storage.nbytes, f"the {record.size} bytes of its record")

    def _flatten(self, prefix: str, table: dict[Any, Any], depth: int, seen: set[int]) -> None:
        """Sorts the leaves of nested tables into tensors and plain values."""
        self._enter(prefix, table, depth, seen)
        for key, value in table.items():
            name = f"{prefix}{key}"
            if name in self._views or name in self.metadata:
                refuse(self.path, f"the name {name!r}", "given twice by nested tables", "each name once")
            if isinstance(value, View):
                self._views[name] = value
            elif isinstance(value, dict) and value:
                self._flatten(name + ".", value, depth + 1, seen)
            else:
                self.metadata[name] = self._plain(name, value, depth + 1, seen)

    def _plain(self, name: str, value: Any, depth: int, seen: set[int]) -> Any:
        if isinstance(value, (list, tuple, dict)):
            if not value:
                return type(value)()
            self._enter(name, value, depth, seen)
            if isinstance(value, dict):
                return {str(key): self._plain(name, item, depth + 1, seen) for key, item in value.items()}
            return [self._plain(name, item, depth + 1, seen) for item in value]
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        refuse(self.path, f"the entry {name!r}", f"a {type(value).__name__.lower()}", "a tensor, a table of them, a number or a text")

    def _enter(self, name: str, value: Any, depth: int, seen: set[int]) -> None:
        # A container met twice is how a kilobyte describes a tree without end.
        if depth > MAX_DEPTH or id(value) in seen:
            expected = f"tables at most {MAX_DEPTH} deep, each used once"
            refuse(self.path, f"the entry {name[:80]!r}", "nested without end or shared between entries", expected)
        seen.add(id(value))


def open_torchbin(path: str | Path) -> TorchBinFile:
    """Opens a state dict written by torch.save since torch 1.6; CheckpointError for other pickles, damage and false sizes."""
    return TorchBinFile(path)


def _records(file: MappedFile) -> tuple[dict[str, Record], str]:
    """The zip's records by name, and the one folder that they share."""
    head = file.bytes(0, min(4, file.size), "magic")
    if head != _LOCAL:
        old = head[:1] == b"\x80" or b"ustar" in file.bytes(0, min(300, file.size), "magic")
        found = "a pickle or tar of torch before 1.6" if old else repr(head)
        refuse(file.path, "magic", found, "a zip written by torch.save; convert an older file to safetensors first")
    count, size, at, behind = _directory(file)
    records: dict[str, Record] = {}
    spans: list[tuple[int, int]] = []
    cursor, end = at, at + size
    for number in range(count):
        record, start, cursor = _central(file, cursor, end, number)
        if record.name in records:
            refuse(file.path, f"record {record.name!r}", "in the zip twice", "each record once")
        records[record.name] = record
        spans.append((start, record.at + record.size))
    if cursor != end or end != behind:
        refuse(file.path, "the zip directory", f"{cursor - at} bytes of entries at {at}", f"{size} bytes up to the end record")
    floor = 0
    for start, stop in sorted(spans):
        if start < floor or stop > at:
            refuse(file.path, "the zip records", f"overlapping at byte {start}", "one behind the other, before the directory")
        floor = stop
    folders = [name.removesuffix("/data.pkl") for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(folders) != 1:
        refuse(file.path, "the zip", f"holding {len(folders)} records <folder>/data.pkl", "exactly one")
    stray = next((name for name in records if not name.startswith(folders[0] + "/")), None)
    if stray is not None:
        refuse(file.path, "the zip", f"holding the record {stray!r}", f"records of the folder {folders[0]!r} only")
    return records, folders[0]


def _directory(file: MappedFile) -> tuple[int, int, int, int]:
    """(entries, bytes, offset, offset of the end records) of the central directory; the end record must be the file's last 22 bytes."""
    at = file.size - 22
    tail = file.bytes(max(at, 0), min(22, file.size), "the zip end record")
    if tail[:4] != _END or len(tail) < 22:
        expected = "the last 22 bytes of the file: it is cut off or carries something behind the zip"
        refuse(file.path, "the zip end record", "absent", expected)
    disk, first, here, count, size, offset, comment = struct.unpack("<4H2LH", tail[4:])
    if disk or first or here != count or comment:
        found = f"disks {disk}/{first}, {here} of {count} entries, comment {comment}"
        refuse(file.path, "the zip end record", found, "one disk and no comment")
    behind = at
    if at >= 76 and file.bytes(at - 20, 4, "the zip64 locator") == _LOCATOR64:
        disk, behind, disks = struct.unpack("<LQL", file.bytes(at - 16, 16, "the zip64 locator"))
        if disk or disks != 1 or behind != at - 76 or file.bytes(behind, 4, "the zip64 end record") != _END64:
            refuse(file.path, "the zip64 locator", f"pointing at byte {behind}", f"the zip64 end record at {at - 76}")
        long = struct.unpack("<Q2H2L4Q", file.bytes(behind + 4, 52, "the zip64 end record"))
        small = (count, size, offset)
        count, size, offset = long[6:]
        agree = all(s in (n, w) for s, n, w in zip(small, (count, size, offset), (0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF), strict=True))
        if long[0] != 44 or long[3] or long[4] or long[5] != count or not agree:
            refuse(file.path, "the zip64 end record", f"{long[5]} of {count} entries", "one disk and the figures of the end record")
    file.check(offset, size, "the zip directory")
    if count > MAX_RECORDS or count * 46 > size:
        refuse(file.path, "the number of zip records", count, f"at most {min(MAX_RECORDS, size // 46)}")
    return count, size, offset, behind


def _central(file: MappedFile, at: int, end: int, number: int) -> tuple[Record, int, int]:
    """Entry `number` of the directory as (record, offset of its local header, offset of the next entry)."""
    field = f"zip directory entry {number}"
    if at + 46 > end:
        refuse(file.path, field, f"at byte {at}", f"46 bytes before the directory's end at {end}")
    entry = file.bytes(at, 46, field)
    flags, method, crc, packed, size = struct.unpack("<2H4x3L", entry[8:28])
    name_size, extra_size, comment, disk, attributes, start = struct.unpack("<4H2xLL", entry[28:46])
    behind = at + 46 + name_size + extra_size + comment
    # Attribute 0x10 calls a record a folder; a reader that believes it may hand out memory that was never written.
    if entry[:4] != _CENTRAL or comment or disk or behind > end or flags & ~_ALLOWED_FLAGS or attributes & 0x10:
        found = f"signature {entry[:4]!r}, flags {flags:#x}, attributes {attributes:#x}"
        refuse(file.path, field, found, "a plain entry: a file, not encrypted, no comment, inside the directory")
    try:
        name = file.bytes(at + 46, name_size, field).decode("utf-8")
    except UnicodeDecodeError:
        refuse(file.path, f"name of {field}", "no UTF-8", "UTF-8 text")
    extra = file.bytes(at + 46 + name_size, extra_size, field)
    packed, size, start = _wide(file.path, name, extra, [packed, size, start])
    if method or packed != size:
        found = f"compressed (method {method}, {packed} of {size} bytes)"
        refuse(file.path, f"record {name!r}", found, "stored as it is, the way torch.save writes")
    return Record(name, _local(file, name, start, (crc, size)), size, crc), start, behind


def _wide(path: Path, name: str, extra: bytes, numbers: list[int]) -> list[int]:
    """Sizes and offset with those of the zip64 extra field in place of the 32-bit mark."""
    missing = numbers.count(0xFFFFFFFF)
    while len(extra) >= 4 and missing:
        tag, size = struct.unpack("<2H", extra[:4])
        if tag == 1:
            if size != 8 * missing or len(extra) < 4 + size:
                refuse(path, f"zip64 field of record {name!r}", f"{size} bytes", f"{8 * missing} bytes")
            wide = iter(struct.unpack(f"<{missing}Q", extra[4 : 4 + size]))
            return [next(wide) if number == 0xFFFFFFFF else number for number in numbers]
        extra = extra[4 + size :]
    return numbers


def _local(file: MappedFile, name: str, start: int, promised: tuple[int, int]) -> int:
    """Where the bytes of a record begin, after its local header was found to agree with the directory; promised = (crc, size)."""
    field = f"local header of record {name!r}"
    head = file.bytes(start, 30, field)
    flags, method, crc, packed, size, name_size, extra_size = struct.unpack("<2H4x3L2H", head[6:30])
    same_name = file.bytes(start + 30, name_size, field) == name.encode()
    later = flags & 8 and (crc, packed, size) in ((0, 0, 0), (0, 0xFFFFFFFF, 0xFFFFFFFF))
    told = later or (crc, size) in (promised, (promised[0], 0xFFFFFFFF))
    if head[:4] != _LOCAL or method or flags & ~_ALLOWED_FLAGS or not same_name or not told:
        refuse(file.path, field, f"{head[:4]!r}, flags {flags:#x}, crc {crc:08x}, {size} bytes", "what the directory says of the record")
    at = start + 30 + name_size + extra_size
    file.check(at, promised[1], f"record {name!r}")
    return at


