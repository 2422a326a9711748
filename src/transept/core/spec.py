"""A Spec is one row of a paper's table: frozen numbers, compared, changed, hashed and stored as JSON."""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar, Union, get_args, get_origin

from transept.core.errors import ConfigError, nearest

# A TypeVar and not typing.Self, which the run-time type checker of the tests knows only on whole classes.
S = TypeVar("S", bound="Spec")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """Base of every Spec; fields are numbers, enums, tuples and other Specs, never code."""

    def replace(self: S, **changes: Any) -> S:
        """The same Spec with some fields changed; an unknown field is refused with the nearest name."""
        names = [f.name for f in dataclasses.fields(self)]
        for name in changes:
            if name not in names:
                raise ConfigError(f"{type(self).__name__} has no field {name!r}{nearest(name, names)}; it has {', '.join(names)}")
        return dataclasses.replace(self, **changes)

    def diff(self, other: Spec) -> dict[str, tuple[Any, Any]]:
        """The fields in which two Specs differ: name -> (mine, theirs); a field that one of them lacks shows as None."""
        mine, theirs = vars(self), vars(other)
        return {k: (mine.get(k), theirs.get(k)) for k in (*mine, *(k for k in theirs if k not in mine)) if mine.get(k) != theirs.get(k)}

    def json(self) -> dict[str, Any]:
        """A JSON object from which `from_json` makes an equal Spec."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_json(cls: type[S], record: Mapping[str, Any]) -> S:
        """The Spec stored by `json`; missing and unknown fields are refused."""
        types_ = _hints(cls)
        for name in record:
            if name not in types_ and name != "kind":
                raise ConfigError(f"{cls.__name__} has no field {name!r}{nearest(name, types_)}")
        needed = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
        lacking = [name for name in needed if name not in record]
        if lacking:
            raise ConfigError(f"{cls.__name__} needs the field {lacking[0]!r}, which the record lacks")
        return cls(**{name: _typed(types_[name], value, name) for name, value in record.items() if name != "kind"})

    @classmethod
    def checked(cls: type[S], values: Mapping[str, Any]) -> S:
        """The Spec with these field values, each held to its declared type."""
        return cls.from_json({name: _plain(value) for name, value in values.items()})

    def hash(self) -> str:
        """sha256 of the class name and the sorted JSON, in hex."""
        text = json.dumps({"spec": type(self).__name__, **self.json()}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def _hints(cls: type[Spec]) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def _plain(value: Any) -> Any:
    if isinstance(value, Spec):
        return {"kind": type(value).__name__, **value.json()}
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    return value


def _typed(hint: Any, value: Any, name: str) -> Any:
    """`value` as the declared type of field `name`: the closed set of types that a Spec may hold."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _one_of(get_args(hint), value, name)
    if origin is tuple:
        inner = get_args(hint)
        exact = None if len(inner) == 2 and inner[1] is Ellipsis else len(inner)
        if not isinstance(value, (list, tuple)) or exact not in (None, len(value)):
            raise ConfigError(f"field {name!r} should be a list{f' of {exact}' if exact else ''}, found {value!r}")
        return tuple(_typed(inner[0 if exact is None else i], v, name) for i, v in enumerate(value))
    if isinstance(hint, type) and issubclass(hint, Spec):
        if not isinstance(value, Mapping) or value.get("kind", hint.__name__) != hint.__name__:
            raise ConfigError(f"field {name!r} should be a {hint.__name__}, found {value!r}")
        return hint.from_json(value)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        if not isinstance(value, str) or value not in hint.__members__:
            alike = nearest(str(value), hint.__members__)
            raise ConfigError(f"field {name!r} should be one of {', '.join(hint.__members__)}, found {value!r}{alike}")
        return hint[value]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"field {name!r} should be {hint.__name__}, found {value!r}")
    return value


def _one_of(hints: tuple[Any, ...], value: Any, name: str) -> Any:
    if value is None and type(None) in hints:
        return None
    specs = {h.__name__: h for h in hints if isinstance(h, type) and issubclass(h, Spec)}
    if isinstance(value, Mapping) and specs:
        kind = value.get("kind")
        if kind not in specs:
            raise ConfigError(f"field {name!r} should be one of {', '.join(specs)}, found {kind!r}{nearest(str(kind), specs)}")
        return specs[kind].from_json(value)
    plain = [h for h in hints if h is not type(None) and h.__name__ not in specs]
    for hint in plain:
        try:
            return _typed(hint, value, name)
        except ConfigError:
            continue
    raise ConfigError(f"field {name!r} should be one of {', '.join(getattr(h, '__name__', str(h)) for h in hints)}, found {value!r}")
