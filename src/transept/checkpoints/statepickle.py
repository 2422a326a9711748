"""An interpreter for the pickles of plain state dicts that runs nothing: closed opcodes, closed names, counted memory.

Source of the opcodes' meaning: PEP 307 (protocol 2) and CPython's pickletools. Every other opcode and every other name is refused.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from transept.checkpoints.tensorfile import MAX_DIMS, refuse
from transept.core.errors import nearest

MAX_STACK = 1 << 16

STORAGES: dict[str, torch.dtype] = {
    "torch FloatStorage": torch.float32,
    "torch DoubleStorage": torch.float64,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16,
    "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
    "torch.storage UntypedStorage": torch.uint8,
}
UNTYPED = "torch.storage UntypedStorage"
DTYPES: dict[str, torch.dtype] = {
    f"torch {name}": getattr(torch, name) for name in ("float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64")
}
ORDERED, SIZE, PARAMETER = "collections OrderedDict", "torch Size", "torch._utils _rebuild_parameter"
REBUILD2, REBUILD3 = "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3"
NAMES = frozenset([*STORAGES, *DTYPES, ORDERED, SIZE, PARAMETER, REBUILD2, REBUILD3])


@dataclass(frozen=True, eq=False)
class Name:
    """An allowed global: a word that selects a rule of this file."""

    name: str


@dataclass(frozen=True, eq=False)
class Storage:
    """A run of bytes in the container: its record's key, the type that declared it, and its size."""

    key: str
    type: str
    nbytes: int


@dataclass(frozen=True, eq=False)
class View:
    """A tensor that is still a description: which elements of which storage."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Mark:
    """The place on the stack that a later opcode pops back to."""


MARK = _Mark()


def walk(path: Path, program: bytes) -> Any:
    """The value that a pickle describes, made of dicts, lists, tuples, numbers, texts and Views; CheckpointError for all else."""
    return _Machine(path, program).run()


class _Machine:
    def __init__(self, path: Path, program: bytes) -> None:
        self.path = path
        self.program = program
        self.at = 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}
        # Some 20 bytes of a real pickle make one container; one that makes more would outgrow its file in memory.
        self.containers = 1024 + len(program) // 12

    def run(self) -> Any:
        if self.program[:2] != b"\x80\x02":
            self.lie("protocol", f"{self.program[:2]!r}", "2, which torch.save uses; save the file again with torch or as safetensors")
        self.at = 2
        while True:
            code = self.take(1)[0]
            if code == 0x2E:
                break
            if code not in RULES:
                self.lie("the opcode", f"{chr(code)!r} ({code:#04x}) at byte {self.at - 1}", "one of a plain state dict")
            RULES[code](self)
            if len(self.stack) > MAX_STACK:
                self.lie("the stack", f"{len(self.stack)} deep", f"at most {MAX_STACK}")
        if len(self.stack) != 1 or self.at != len(self.program):
            self.lie("the end", f"{len(self.stack)} values, {len(self.program) - self.at} bytes left", "one value and no bytes")
        return self.pop()

    def lie(self, field: str, found: object, expected: str) -> NoReturn:
        refuse(self.path, f"{field} in data.pkl", found, expected)

    def take(self, count: int) -> bytes:
        if self.at + count > len(self.program):
            self.lie("the pickle", f"ended at byte {len(self.program)}", f"{count} bytes more at {self.at}")
        found = self.program[self.at : self.at + count]
        self.at += count
        return found

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def line(self) -> str:
        end = self.program.find(b"\n", self.at, self.at + 200)
        if end < 0:
            self.lie("a name", "no line of at most 200 bytes", "a module and a name, a line each")
        found = self.program[self.at : end]
        self.at = end + 1
        return found.decode("utf-8", "replace")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is MARK:
            self.lie("the stack", f"empty at byte {self.at}", "a value")
        return self.stack.pop()

    def top(self, kind: type) -> Any:
        """The value on top of the stack, which must be of `kind`."""
        if not self.stack or not isinstance(self.stack[-1], kind):
            found = type(self.stack[-1]).__name__ if self.stack else "nothing"
            self.lie("the stack's top", f"{found} at byte {self.at}", f"a {kind.__name__}")
        return self.stack[-1]

    def popped(self) -> list[Any]:
        """All values above the last mark, which goes too."""
        place = len(self.stack) - 1
        while place >= 0 and self.stack[place] is not MARK:
            place -= 1
        if place < 0:
            self.lie("the stack", f"without a mark at byte {self.at}", "a mark")
        values = self.stack[place + 1 :]
        del self.stack[place:]
        return values

    def contain(self, value: Any) -> None:
        """Pushes a new container, which is counted."""
        self.containers -= 1
        if self.containers < 0:
            self.lie("the pickle", f"all but nothing but containers ({len(self.program)} bytes)", "names and tensors")
        self.push(value)

    def text(self) -> None:
        raw = self.take(self.number("<I"))
        try:
            self.push(raw.decode("utf-8"))
        except UnicodeDecodeError:
            self.lie("a text", raw[:40], "UTF-8")

    def long(self) -> None:
        size = self.number("<B")
        if size > 9:
            self.lie("a number", f"{size} bytes long", "at most 64 bits")
        self.push(int.from_bytes(self.take(size), "little", signed=True))

    def name(self) -> None:
        found = f"{self.line()} {self.line()}"
        if found not in NAMES:
            asked = found.replace(" ", ".")
            self.lie("the name", f"{asked!r}", f"one of the {len(NAMES)} that a plain state dict needs{nearest(found, NAMES)}")
        self.push(Name(found))

    def tuple_of(self, count: int) -> None:
        values = [self.pop() for _ in range(count)]
        self.contain(tuple(reversed(values)))

    def put(self, index: int) -> None:
        if not self.stack or self.stack[-1] is MARK:
            self.lie("the memo", f"asked to keep nothing at byte {self.at}", "a value")
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        if index not in self.memo:
            self.lie("the memo", f"entry {index}, which was never kept", f"one of {len(self.memo)} kept")
        self.push(self.memo[index])

    def set_items(self, items: list[Any]) -> None:
        table = self.top(dict)
        if len(items) % 2:
            self.lie("a table", f"{len(items)} keys and values", "pairs")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int) or key in table:
                self.lie("a table's key", key if isinstance(key, str) else type(key).__name__, "a new text or number")
            table[key] = value

    def set_item(self) -> None:
        value, key = self.pop(), self.pop()
        self.set_items([key, value])

    def append(self) -> None:
        value = self.pop()
        self.extend([value])

    def extend(self, values: list[Any]) -> None:
        self.top(list).extend(values)

    def build(self) -> None:
        # torch hangs `_metadata` (module versions) on the table itself; it tells nothing of the tensors.
        state = self.pop()
        if not isinstance(state, dict) or set(state) - {"_metadata"}:
            found = ", ".join(map(str, state)) if isinstance(state, dict) else type(state).__name__
            self.lie("a table's attributes", found, "_metadata alone")
        self.top(dict)

    def persistent(self) -> None:
        found = self.pop()
        good = isinstance(found, tuple) and len(found) == 5 and found[0] == "storage"
        good = good and isinstance(found[1], Name) and found[1].name in STORAGES
        if not good or not isinstance(found[2], str) or not isinstance(found[3], str) or not whole(found[4]):
            self.lie("a persistent id", type(found).__name__, "('storage', type, key, device, length)")
        key, kind = found[2], found[1].name
        known = self.storages.setdefault(key, Storage(key, kind, found[4] * STORAGES[kind].itemsize))
        if known.type != kind or known.nbytes != found[4] * STORAGES[kind].itemsize:
            self.lie(f"storage {key!r}", f"{kind} of {found[4]}", f"{known.type} of {known.nbytes} bytes, as before")
        self.push(known)

    def reduce(self) -> None:
        found, called = self.pop(), self.pop()
        if not isinstance(called, Name) or not isinstance(found, tuple):
            self.lie("a call", f"of a {type(called).__name__}", "of an allowed name with a tuple")
        arguments = list(found)
        if called.name == ORDERED and not arguments:
            self.contain({})
        elif called.name == SIZE and len(arguments) == 1 and sizes(arguments[0]):
            self.contain(arguments[0])
        elif called.name == PARAMETER and len(arguments) == 3 and isinstance(arguments[0], View) and isinstance(arguments[1], bool):
            self.push(arguments[0])
        elif called.name == REBUILD2 and len(arguments) in (6, 7) and isinstance(arguments[0], Storage) and arguments[0].type != UNTYPED:
            self.view(arguments, STORAGES[arguments[0].type])
        elif called.name == REBUILD3 and len(arguments) in (7, 8) and isinstance(arguments[6], Name) and arguments[6].name in DTYPES:
            self.view(arguments[:6] + arguments[7:], DTYPES[arguments[6].name])
        else:
            self.lie("a call", f"{called.name!r} with {len(arguments)} arguments", "a name that may be called, with its own arguments")

    def view(self, arguments: list[Any], dtype: torch.dtype) -> None:
        """Pushes a tensor's description after proving that every element lies inside its storage."""
        storage, offset, shape, stride = arguments[:4]
        plain = isinstance(arguments[4], bool) and arguments[5] == {} and all(isinstance(a, dict) for a in arguments[5:])
        lengths = sizes(shape) and isinstance(stride, tuple) and len(shape) == len(stride) and all(map(whole, stride))
        if not isinstance(storage, Storage) or not whole(offset) or not lengths or not plain:
            self.lie("a tensor", "without whole, non-negative offset, shape and strides", f"a storage and at most {MAX_DIMS} dimensions")
        room, odd = divmod(storage.nbytes, dtype.itemsize)
        count = math.prod(shape)
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) if count else offset
        if odd or count > room or (count and last >= room) or offset > room:
            self.lie("a tensor", f"{list(shape)} with strides {list(stride)} from {offset}", f"inside its storage of {room} elements")
        self.push(View(storage, dtype, offset, shape, stride))


def whole(value: Any) -> bool:
    """Whether `value` is an integer from 0 to 2^63 - 1."""
    return type(value) is int and 0 <= value < 1 << 63


def sizes(value: Any) -> bool:
    """Whether `value` is a tuple of at most MAX_DIMS whole numbers whose product, zeros left aside, torch can count."""
    good = isinstance(value, tuple) and len(value) <= MAX_DIMS and all(map(whole, value))
    return good and math.prod(max(n, 1) for n in value) < 1 << 60


RULES: dict[int, Callable[[_Machine], None]] = {
    ord("("): lambda m: m.push(MARK),
    ord("}"): lambda m: m.contain({}),
    ord("]"): lambda m: m.contain([]),
    ord(")"): lambda m: m.push(()),
    ord("t"): lambda m: m.contain(tuple(m.popped())),
    0x85: lambda m: m.tuple_of(1),
    0x86: lambda m: m.tuple_of(2),
    0x87: lambda m: m.tuple_of(3),
    ord("X"): lambda m: m.text(),
    ord("K"): lambda m: m.push(m.number("<B")),
    ord("M"): lambda m: m.push(m.number("<H")),
    ord("J"): lambda m: m.push(m.number("<i")),
    ord("G"): lambda m: m.push(m.number(">d")),
    0x8A: lambda m: m.long(),
    ord("N"): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    ord("q"): lambda m: m.put(m.number("<B")),
    ord("r"): lambda m: m.put(m.number("<I")),
    ord("h"): lambda m: m.get(m.number("<B")),
    ord("j"): lambda m: m.get(m.number("<I")),
    ord("c"): lambda m: m.name(),
    ord("Q"): lambda m: m.persistent(),
    ord("R"): lambda m: m.reduce(),
    ord("b"): lambda m: m.build(),
    ord("s"): lambda m: m.set_item(),
    ord("u"): lambda m: m.set_items(m.popped()),
    ord("a"): lambda m: m.append(),
    ord("e"): lambda m: m.extend(m.popped()),
}
