"""The weight map of one published form: rows of (native name, foreign name, ops), expanded over a Spec and held to its laws."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from transept.core.errors import MappingError, nearest
from transept.core.shapes import Tensor
from transept.mapping.ops import Op

Condition = Callable[[Any], bool]
Index = Callable[[Any], Sequence[int]]
_HOLE = re.compile(r"\{(\w+)\}")
ROOT = "root"


@runtime_checkable
class Readable(Protocol):
    """A file of named tensors, read one at a time."""

    def keys(self) -> Iterable[str]:
        """Every name in the file."""
        ...

    def read(self, key: str, /) -> Tensor:
        """One tensor."""
        ...


@dataclass(frozen=True, init=False)
class Row:
    """One fact: which native names are which foreign names, through which ops; `{l}` and the like are indices, `{root}` a prefix of
    the file.
    """

    native: tuple[str, ...]
    foreign: str
    ops: tuple[Op, ...]
    when: Condition | None

    def __init__(self, native: str | tuple[str, ...], foreign: str, *ops: Op, when: Condition | None = None):
        object.__setattr__(self, "native", (native,) if isinstance(native, str) else native)
        object.__setattr__(self, "foreign", foreign)
        object.__setattr__(self, "ops", ops)
        object.__setattr__(self, "when", when)


@dataclass(frozen=True)
class Tied:
    """A foreign name that repeats a native tensor: equal bits if it is there, left out when written (`write` = True writes it all
    the same).

    A file that holds the tensor under this name only is read from it.
    """

    native: str
    foreign: str
    when: Condition | None = None
    write: bool = False


@dataclass(frozen=True)
class Spare:
    """Where a file lacks the tensor of this native name: the foreign name that stands for it, though it belongs to another.

    For writers that leave out a tensor which happens to equal another.
    """

    native: str
    foreign: str
    when: Condition | None = None


@dataclass(frozen=True)
class Drop:
    """A foreign name that holds nothing a model needs; it may be there or not."""

    foreign: str


@dataclass(frozen=True)
class Bond:
    """A row for given values of its indices: whole keys on both sides."""

    native: tuple[str, ...]
    foreign: tuple[str, ...]
    ops: tuple[Op, ...]

    def load(self, parts: list[Tensor], spec: Any) -> list[Tensor]:
        """Foreign to native."""
        for op in self.ops:
            parts = op.load(parts, spec)
        return parts

    def save(self, parts: list[Tensor], spec: Any) -> list[Tensor]:
        """Native to foreign."""
        for op in reversed(self.ops):
            parts = op.save(parts, spec)
        return parts


class Map:
    """The table of one published form. `index` gives the range of each index as a function of the Spec; `roots` are the prefixes
    under which the form is published, the first being the one that is written; `older` are (old, new) ends of keys that early files
    of the form still carry."""

    def __init__(
        self,
        *statements: Row | Tied | Spare | Drop,
        index: Mapping[str, Index],
        roots: tuple[str, ...] = ("",),
        older: tuple[tuple[str, str], ...] = (),
    ):
        self.rows = tuple(s for s in statements if isinstance(s, Row))
        self.ties = tuple(s for s in statements if isinstance(s, Tied))
        self.spares = tuple(s for s in statements if isinstance(s, Spare))
        self.drops = tuple(s for s in statements if isinstance(s, Drop))
        self.index, self.roots, self.older = dict(index), roots, older
        plain = [row for row in self.rows if row.when is None]
        _once("writes the native", (name for row in plain for name in row.native))
        _once("reads the foreign", (row.foreign for row in plain))
        for name in (n for s in statements for n in (*_names(s, "native"), s.foreign)):
            for hole in _HOLE.findall(name):
                if hole != ROOT and hole not in self.index:
                    raise MappingError(f"the map's key {name!r} uses the index {{{hole}}}, which has no range{nearest(hole, self.index)}")

    def bonds(self, spec: Any, root: str | None = None) -> list[Bond]:
        """Every row that holds for this Spec, with whole keys; two rows that touch one key are refused (law 2)."""
        root = self.roots[0] if root is None else root
        bonds = [bond for row in self.rows if row.when is None or row.when(spec) for bond in self._expand(row, spec, root)]
        _once("writes the native", (name for bond in bonds for name in bond.native))
        _once("reads the foreign", (name for bond in bonds for name in bond.foreign))
        return bonds

    def load(self, file: Readable, spec: Any, shapes: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, Tensor]]:
        """The native tensors, one row at a time, never changed in place.

        `shapes` are the native parameters with their shapes: each must be produced, and each foreign key consumed or dropped by
        name (law 1).
        """
        if self.older:
            file = _Respelled(file, self.older)
        keys = set(file.keys())
        root = self.root(keys, spec)
        bonds = self.bonds(spec, root)
        ties = self.tied(spec, root)
        spares = [(spare.foreign, spare.native) for spare in self.spares if spare.when is None or spare.when(spec)]
        bonds = [_stand_in(bond, [*ties.items(), *spares], keys) for bond in bonds]
        self._check_total(bonds, keys, set(ties), set(shapes), spec, root)
        producer = {name: bond for bond in bonds for name in bond.native}
        for foreign in sorted(keys & set(ties)):
            self._check_tie(file, foreign, producer[ties[foreign]], ties[foreign], spec)
        for bond in bonds:
            parts = self._through(bond, [file.read(name) for name in bond.foreign], spec)
            for name, part in zip(bond.native, parts, strict=True):
                if tuple(part.shape) != tuple(shapes[name]):
                    found = f"{', '.join(bond.foreign[:3])} gives {name} the shape {tuple(part.shape)}"
                    raise MappingError(f"{found}, but the model expects {tuple(shapes[name])}")
                yield name, part

    def save(self, native: Mapping[str, Tensor], spec: Any) -> dict[str, Tensor]:
        """The published file's tensors from the native ones."""
        bonds = self.bonds(spec)
        lacking = [name for bond in bonds for name in bond.native if name not in native]
        unknown = sorted(set(native) - {name for bond in bonds for name in bond.native})
        if lacking or unknown:
            what = f"lacks {lacking[0]!r}" if lacking else f"has {unknown[0]!r}, which no row of the map writes"
            raise MappingError(
                f"the model {what}{nearest((lacking or unknown)[0], native if lacking else [n for b in bonds for n in b.native])}"
            )
        out: dict[str, Tensor] = {}
        for bond in bonds:
            out.update(zip(bond.foreign, bond.save([native[name] for name in bond.native], spec), strict=True))
        for tie in self._ties(spec):
            if tie.write:
                out.update({name: native[tie.native] for name in self._fill(tie.foreign, {ROOT: self.roots[0]}, spec)})
        return {name: tensor.contiguous() for name, tensor in out.items()}

    def tied(self, spec: Any, root: str | None = None) -> dict[str, str]:
        """Every foreign name that repeats a native tensor, with the native name."""
        at = {ROOT: self.roots[0] if root is None else root}
        return {name: tie.native for tie in self._ties(spec) for name in self._fill(tie.foreign, at, spec)}

    def root(self, keys: set[str], spec: Any) -> str:
        """The published prefix that most of the file's keys carry."""
        if len(self.roots) == 1:
            return self.roots[0]
        return max(self.roots, key=lambda root: len(keys & {name for bond in self.bonds(spec, root) for name in bond.foreign}))

    def _expand(self, row: Row, spec: Any, root: str) -> Iterator[Bond]:
        outer = sorted({hole for name in row.native for hole in _HOLE.findall(name)})
        for values in itertools.product(*(self.index[hole](spec) for hole in outer)):
            at = {**dict(zip(outer, values, strict=True)), ROOT: root}
            native = tuple(name.format(**at) for name in row.native)
            yield Bond(native, tuple(self._fill(row.foreign, at, spec)), row.ops)

    def _fill(self, name: str, at: Mapping[str, Any], spec: Any) -> Iterator[str]:
        """`name` with its holes filled, for every value of the indices that `at` does not give."""
        free = [hole for hole in dict.fromkeys(_HOLE.findall(name)) if hole not in at]
        for values in itertools.product(*(self.index[hole](spec) for hole in free)):
            yield name.format(**at, **dict(zip(free, values, strict=True)))

    def _ties(self, spec: Any) -> list[Tied]:
        return [tie for tie in self.ties if tie.when is None or tie.when(spec)]

    def _check_total(self, bonds: list[Bond], keys: set[str], ties: set[str], native: set[str], spec: Any, root: str) -> None:
        read = {name for bond in bonds for name in bond.foreign}
        dropped = {name for drop in self.drops for name in self._fill(drop.foreign, {ROOT: root}, spec)}
        written = {name for bond in bonds for name in bond.native}
        for problem, names, others in (
            ("the checkpoint lacks", sorted(read - keys), keys - read),
            ("the checkpoint has the unknown key", sorted(keys - read - dropped - ties), read - keys),
            ("no row of the map fills the model's", sorted(native - written), written),
            ("the map fills what the model does not have:", sorted(written - native), native),
        ):
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise MappingError(f"{problem} {names[0]!r}{more}{nearest(names[0], sorted(others))}")

    def _check_tie(self, file: Readable, foreign: str, bond: Bond, native: str, spec: Any) -> None:
        own = self._through(bond, [file.read(name) for name in bond.foreign], spec)[bond.native.index(native)]
        if not torch.equal(own, file.read(foreign)):
            raise MappingError(f"{foreign!r} should repeat {bond.foreign[0]!r} (the configuration ties them), but its numbers differ")

    def _through(self, bond: Bond, parts: list[Tensor], spec: Any) -> list[Tensor]:
        try:
            return bond.load(parts, spec)
        except (RuntimeError, ValueError, IndexError) as e:
            shapes = ", ".join(f"{name} {tuple(p.shape)}" for name, p in list(zip(bond.foreign, parts, strict=True))[:3])
            raise MappingError(f"{shapes} cannot become {', '.join(bond.native)} at the sizes that the configuration declares") from e


class _Respelled:
    """A file whose keys are read in their present spelling."""

    def __init__(self, file: Readable, older: tuple[tuple[str, str], ...]):
        self.file = file
        self.spelling = {_respell(key, older): key for key in file.keys()}

    def keys(self) -> Iterable[str]:
        return self.spelling

    def read(self, key: str, /) -> Tensor:
        return self.file.read(self.spelling[key])


def _respell(key: str, older: tuple[tuple[str, str], ...]) -> str:
    for old, new in older:
        if key.endswith(old):
            return key.removesuffix(old) + new
    return key


def _stand_in(bond: Bond, others: Sequence[tuple[str, str]], keys: set[str]) -> Bond:
    """The bond reading another name (foreign, native), where the file lacks the tensor's own."""
    if keys.issuperset(bond.foreign) or len(bond.native) > 1 or bond.ops:
        return bond
    found = [foreign for foreign, native in others if (native,) == bond.native and foreign in keys]
    return Bond(bond.native, (found[0],), ()) if found else bond


def _names(statement: Row | Tied | Spare | Drop, side: str) -> tuple[str, ...]:
    found = getattr(statement, side, ())
    return (found,) if isinstance(found, str) else found


def _once(what: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise MappingError(f"more than one row {what} key {name!r}")
        seen.add(name)
