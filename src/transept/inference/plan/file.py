"""A lowered, packed plan in one file: written once, mapped at every later start, believed only after it was checked. Never needs torch.

Layout, little-endian: magic (16 bytes), version (4), length of the header (4), zeros (8), sha256 of the header (32), the header as JSON,
zeros up to a multiple of 4096, the payload. The header names the machine and the code that made the plan, size and sha256 of every source
file, where each section lies in the payload, and the sha256 of each piece of the payload. Every byte is covered by one of these.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import os
import platform
import struct
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transept import __version__, native
from transept.checkpoints.atomic import atomic
from transept.core.errors import ConfigError, TranseptError
from transept.core.spec import Spec
from transept.native.binding import CRecord, packed_bytes
from transept.native.build import source_hash

MAGIC = b"transept plan\0\0\0"
VERSION = 1
ROWS = 64
"""Rows of a step at most: enough to work at the speed of the arithmetic, while the logits of all rows stay small in memory."""
PAGE = 4096
PIECE = 8 << 20
_HEAD = struct.Struct("<16sII8s32s")
_MOST_HEADER = 64 << 20


class PlanRefused(TranseptError):
    """A plan file that cannot be used as it is: the sentence says why, so that it is made again and the user is told."""


@dataclass(frozen=True, kw_only=True)
class SourceFile(Spec):
    """A file that the plan was made from."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Section(Spec):
    """A part of the payload."""

    at: int
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class Packed(Spec):
    """A weight and where it lies."""

    form: str
    n: int
    k: int
    data: Section


@dataclass(frozen=True, kw_only=True)
class Pages(Spec):
    """A cache to be made; its pages are not stored."""

    kv_heads: int
    head: int
    pages: int
    vhead: int
    form: str
    latent: bool
    space: int


@dataclass(frozen=True, kw_only=True)
class Header(Spec):
    """All that a plan file says besides its numbers; `context` 0 is no limit, `extra` whatever its maker needs to answer."""

    machine: str
    code: str
    fast: bool
    family: str
    context: int
    sources: tuple[SourceFile, ...]
    max_rows: int
    widths: tuple[int, ...]
    out: tuple[int, int, int]
    labels: tuple[str, ...]
    weights: tuple[Packed, ...]
    caches: tuple[Pages, ...]
    records: Section
    extra: Section
    pieces: tuple[str, ...]
    size: int


@cache
def machine() -> str:
    """What decides how numbers are packed here: processor, instruction set, byte order."""
    return f"{platform.machine().lower()} {native.isa()} {sys.byteorder}-endian"


@cache
def code() -> str:
    """Names the code that makes and reads plans: it changes with every change of the core, of the lowering or of the records."""
    digest = hashlib.sha256(f"{__version__} {VERSION} {source_hash()}".encode())
    here = Path(__file__).parent
    for path in (*sorted(here.glob("*.py")), here.parents[1] / "native" / "binding.py"):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return f"{__version__}-{digest.hexdigest()[:16]}"


def digest(path: Path) -> str:
    """sha256 of a file's content, in hex."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def describe(paths: Sequence[Path]) -> tuple[SourceFile, ...]:
    """Name, size and content hash of the files that a plan is made from."""
    with ThreadPoolExecutor(2) as pool:
        return tuple(
            SourceFile(name=path.name, size=path.stat().st_size, sha256=found)
            for path, found in zip(paths, pool.map(digest, paths), strict=True)
        )


@dataclass(frozen=True)
class Maker:
    """Who made a plan, from what, and what it needs to answer (`extra`, plain JSON data)."""

    family: str
    context: int | None
    fast: bool
    sources: tuple[SourceFile, ...]
    extra: Mapping[str, Any]


def write(path: Path, program: native.Program, out: native.View, made: Maker) -> int:
    """Writes a program, whole or not at all; returns the file's size."""
    payload = _Payload()
    records = (CRecord * len(program.records))(*program.records)
    at_records = payload.add(np.frombuffer(bytes(records), np.uint8))
    extra = payload.add(np.frombuffer(json.dumps(made.extra, ensure_ascii=False).encode(), np.uint8))
    weights = tuple(Packed(form=w.kind, n=w.n, k=w.k, data=payload.add(w.data.reshape(-1).view(np.uint8))) for w in program.weights)
    caches = tuple(
        Pages(kv_heads=c.kv_heads, head=c.head, pages=c.pages, vhead=c.vhead, form=c.kind, latent=c.latent, space=c.space)
        for c in program.caches
    )
    header = Header(
        machine=machine(), code=code(), fast=made.fast, family=made.family, context=made.context or 0, sources=made.sources,
        max_rows=program.max_rows, widths=tuple(program.widths), out=(out.buffer, out.at, out.width), labels=tuple(program.labels),
        weights=weights, caches=caches, records=at_records, extra=extra, pieces=payload.digests(), size=payload.at,
    )  # fmt: skip
    text = json.dumps(header.json(), ensure_ascii=False).encode()
    with atomic(path) as file:
        file.write(_HEAD.pack(MAGIC, VERSION, len(text), bytes(8), hashlib.sha256(text).digest()) + text)
        file.write(bytes(-(_HEAD.size + len(text)) % PAGE))
        for part in payload.parts:
            file.write(part)
        return file.tell()


class _Payload:
    """Sections one behind the other, each at a multiple of 64 bytes, large ones at a page."""

    def __init__(self) -> None:
        self.parts: list[memoryview | bytes] = []
        self.known: dict[bytes, Section] = {}
        self.at = 0

    def add(self, data: NDArray[np.uint8]) -> Section:
        # A matrix that is both the embedding and the head is stored once.
        name = hashlib.sha256(data.data).digest()
        if name in self.known:
            return self.known[name]
        gap = -self.at % (PAGE if data.nbytes >= PAGE else 64)
        self.parts += [bytes(gap), np.ascontiguousarray(data).data]
        section = Section(at=self.at + gap, nbytes=data.nbytes)
        self.at = section.at + data.nbytes
        self.known[name] = section
        return section

    def digests(self) -> tuple[str, ...]:
        """sha256 of each piece of the payload."""
        found, current, room = [], hashlib.sha256(), PIECE
        for part in self.parts:
            at = 0
            while at < len(part):
                taken = part[at : at + room]
                current.update(taken)
                at, room = at + len(taken), room - len(taken)
                if not room:
                    found.append(current.hexdigest())
                    current, room = hashlib.sha256(), PIECE
        return (*found, *([current.hexdigest()] if room < PIECE else []))


@dataclass
class PlanFile:
    """A checked plan file, mapped: its header, its program ready to build, the view of the logits, and what its maker put beside it."""

    path: Path
    header: Header
    program: native.Program
    out: native.View
    extra: dict[str, Any]

    @property
    def context(self) -> int | None:
        """The longest input in tokens; None where there is no limit."""
        return self.header.context or None


def open_plan(path: Path, sources: Sequence[Path], *, fast: bool) -> PlanFile:
    """Maps a plan file after checking all of it: version, machine, code, source files by content, and every byte of its own.

    Raises PlanRefused with the reason; nothing of a refused file is used.
    """
    try:
        data = _map(path)
        header, start = _header(path, data)
        _fits(path, header, fast)
        with ThreadPoolExecutor(2) as pool:
            begins = range(start, start + header.size, PIECE)
            pieces = pool.map(lambda at: hashlib.sha256(data[at : at + PIECE].data).hexdigest(), begins)
            _same(path, header, sources)
            if tuple(pieces) != header.pieces:
                raise PlanRefused(f"the plan file {path} is damaged: its numbers do not have the sha256 that it declares")
        return _program(path, header, data[start:])
    except (ConfigError, ValueError, OverflowError, RecursionError, OSError, MemoryError, TypeError) as error:
        raise PlanRefused(f"the plan file {path} is damaged: {str(error)[:200]}") from error


def _map(path: Path) -> NDArray[np.uint8]:
    with open(path, "rb") as handle:
        size = os.fstat(handle.fileno()).st_size
        if size < _HEAD.size:
            raise PlanRefused(f"the plan file {path} is {size} bytes long, expected at least {_HEAD.size}")
        return np.frombuffer(mmap.mmap(handle.fileno(), size, access=mmap.ACCESS_READ), np.uint8)


def _header(path: Path, data: NDArray[np.uint8]) -> tuple[Header, int]:
    """The header and where the payload begins."""
    magic, version, length, zeros, found = _HEAD.unpack(data[: _HEAD.size].tobytes())
    if magic != MAGIC:
        raise PlanRefused(f"the plan file {path} begins with {magic!r}, expected {MAGIC!r}")
    if version != VERSION:
        raise PlanRefused(f"the plan file {path} is of version {version}, expected {VERSION}")
    if length > min(_MOST_HEADER, len(data) - _HEAD.size) or zeros.strip(b"\0"):
        raise PlanRefused(f"the plan file {path} is damaged: its header has {length} bytes, but the file {len(data)}")
    text = data[_HEAD.size : _HEAD.size + length].tobytes()
    if hashlib.sha256(text).digest() != found:
        raise PlanRefused(f"the plan file {path} is damaged: its header does not have the sha256 that it declares")
    header = Header.from_json(json.loads(text))
    start = _HEAD.size + length + -(_HEAD.size + length) % PAGE
    if header.size < 0 or len(data) != start + header.size or data[_HEAD.size + length : start].any():
        raise PlanRefused(f"the plan file {path} is {len(data)} bytes long, expected {start + header.size}")
    return header, start


def _fits(path: Path, header: Header, fast: bool) -> None:
    """Whether this machine, this code and this way of running are those of the plan."""
    for what, found, expected in (
        ("for the machine", header.machine, machine()),
        ("by the code", header.code, code()),
        ("with int8 activations", header.fast, fast),
    ):
        if found != expected:
            raise PlanRefused(f"the plan file {path} was made {what} {found}, expected {expected}")


def _same(path: Path, header: Header, sources: Sequence[Path]) -> None:
    """Whether the source files are those that the plan was made from, to the bit."""
    names, known = [p.name for p in sources], [s.name for s in header.sources]
    if names != known:
        raise PlanRefused(f"the plan file {path} was made from {', '.join(known)}, found {', '.join(names)}")
    for source, declared in zip(sources, header.sources, strict=True):
        if source.stat().st_size != declared.size or digest(source) != declared.sha256:
            raise PlanRefused(f"the plan file {path} was made from another {source.name}: the file has changed since")


def _program(path: Path, header: Header, payload: NDArray[np.uint8]) -> PlanFile:
    """The program over the mapped numbers; the core checks every record when it is built."""

    def part(section: Section, nbytes: int) -> NDArray[np.uint8]:
        if section.nbytes != nbytes or section.at % 64 or not 0 <= section.at <= header.size - nbytes:
            raise PlanRefused(f"the plan file {path} is damaged: {section.nbytes} bytes at {section.at}, expected {nbytes}")
        return payload[section.at : section.at + nbytes]

    buffer, at, width = header.out
    if any(not 1 <= n < 1 << 24 for n in (*header.widths, header.max_rows)) or not 0 <= buffer < len(header.widths):
        raise PlanRefused(f"the plan file {path} is damaged: buffers of {header.max_rows} rows do not hold its output {header.out}")
    if at < 0 or width < 1 or at + width > header.widths[buffer]:
        raise PlanRefused(f"the plan file {path} is damaged: columns {at} to {at + width} of a buffer of {header.widths[buffer]}")
    program = native.Program(min(header.max_rows, ROWS), labels=[*header.labels], widths=[*header.widths])
    records = part(header.records, len(header.labels) * ctypes.sizeof(CRecord))
    program.records = [*(CRecord * len(header.labels)).from_buffer_copy(records.tobytes())]
    for weight in header.weights:
        if weight.n < 1 or weight.k < 1:
            raise PlanRefused(f"the plan file {path} is damaged: a weight of {weight.n} x {weight.k}")
        plain = weight.form == "VECTOR"
        data = part(weight.data, 4 * weight.n * weight.k if plain else packed_bytes(weight.form, weight.n, weight.k))
        table = data.view(np.float32).reshape(weight.n, weight.k) if plain else data
        program.weights.append(native.Weight(weight.form, weight.n, weight.k, table))
    for c in header.caches:
        program.caches.append(native.Cache(c.kv_heads, c.head, c.pages, vhead=c.vhead, kind=c.form, latent=c.latent, space=c.space))
    extra = json.loads(part(header.extra, header.extra.nbytes).tobytes())
    if not isinstance(extra, dict):
        raise PlanRefused(f"the plan file {path} is damaged: what lies beside its program is a {type(extra).__name__}")
    return PlanFile(path, header, program, native.View(*header.out), extra)
