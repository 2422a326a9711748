"""A Spec changes, compares, travels as JSON and hashes; what does not fit is refused by name."""

from __future__ import annotations

import dataclasses
import enum
import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.counts import count
from transept.core.errors import ConfigError
from transept.core.registry import all_families
from transept.core.spec import Spec


class Kind(enum.Enum):
    ROUND = 1
    SQUARE = (2, 3)


@dataclass(frozen=True, kw_only=True)
class Small(Spec):
    factor: float


@dataclass(frozen=True, kw_only=True)
class Large(Spec):
    factor: float
    steps: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Whole(Spec):
    dim: int
    rate: float
    name: str = "x"
    tied: bool = False
    window: int | None = None
    shape: Kind = Kind.ROUND
    pair: tuple[int, float] = (1, 2.0)
    part: Small | Large | None = None
    inner: Small = Small(factor=1.0)


FINITE = st.floats(allow_nan=False, allow_infinity=False)
SMALL = st.builds(Small, factor=FINITE)
LARGE = st.builds(Large, factor=FINITE, steps=st.lists(st.integers(), max_size=3).map(tuple))
WHOLE = st.builds(
    Whole,
    dim=st.integers(),
    rate=FINITE,
    name=st.text(max_size=5),
    tied=st.booleans(),
    window=st.none() | st.integers(),
    shape=st.sampled_from(Kind),
    pair=st.tuples(st.integers(), FINITE),
    part=st.none() | SMALL | LARGE,
    inner=SMALL,
)
MANY = settings(max_examples=count(1000), phases=[Phase.explicit, Phase.generate, Phase.shrink])


@MANY
@given(WHOLE)
def test_json_goes_round(spec: Whole) -> None:
    """Through real JSON text, every kind of field comes back equal and of its own type."""
    again = Whole.from_json(json.loads(json.dumps(spec.json())))
    assert again == spec and type(again.part) is type(spec.part) and type(again.pair) is tuple
    assert again.hash() == spec.hash() and again.diff(spec) == {}


@MANY
@given(WHOLE, WHOLE)
def test_diff_names_what_differs(a: Whole, b: Whole) -> None:
    """`diff` is the fields that `replace` would have to change, and equal hashes mean no difference."""
    found = a.diff(b)
    assert a.replace(**{name: theirs for name, (_, theirs) in found.items()}) == b
    assert all(mine == getattr(a, name) != theirs for name, (mine, theirs) in found.items())
    assert (a.hash() == b.hash()) == (not found)


def test_diff_of_two_kinds_shows_what_one_lacks() -> None:
    assert Small(factor=1.0).diff(Large(factor=1.0, steps=(1,))) == {"steps": (None, (1,))}
    assert Small(factor=1.0).hash() != Large(factor=1.0).hash()


def test_a_spec_is_frozen_and_hashable() -> None:
    spec = Whole(dim=1, rate=2.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.dim = 2  # type: ignore[misc]
    assert len({spec, Whole(dim=1, rate=2.0), spec.replace(dim=3)}) == 2
    assert spec == Whole(dim=1, rate=2.0)


def test_the_hash_is_the_same_in_another_process() -> None:
    code = "from transept.ops.rotary import Linear; print(Linear(factor=2.0).hash())"
    from transept.ops.rotary import Linear

    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == Linear(factor=2.0).hash()


RECORD: dict[str, Any] = Whole(dim=1, rate=2.0, part=Large(factor=1.0)).json()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dmi": 3}, ["'dmi'", "nearest: 'dim'"]),
        ({"dim": ...}, ["'dim'", "needs"]),
        ({"dim": "1"}, ["'dim'", "int", "'1'"]),
        ({"dim": True}, ["'dim'", "int", "True"]),
        ({"dim": 1.5}, ["'dim'", "int", "1.5"]),
        ({"rate": "fast"}, ["'rate'", "float"]),
        ({"rate": None}, ["'rate'", "float", "None"]),
        ({"tied": 1}, ["'tied'", "bool"]),
        ({"window": "wide"}, ["'window'", "'wide'"]),
        ({"shape": "ROUNT"}, ["'shape'", "ROUND", "nearest: 'ROUND'"]),
        ({"shape": 1}, ["'shape'", "ROUND"]),
        ({"shape": [1]}, ["'shape'"]),
        ({"pair": 3}, ["'pair'", "list"]),
        ({"pair": [1]}, ["'pair'"]),
        ({"pair": [1, 2.0, 3]}, ["'pair'"]),
        ({"part": {"kind": "Lage", "factor": 1.0}}, ["'part'", "'Lage'", "nearest: 'Large'"]),
        ({"part": {"factor": 1.0}}, ["'part'"]),
        ({"part": 3}, ["'part'", "3"]),
        ({"inner": {"kind": "Small", "fctor": 1.0}}, ["'fctor'", "nearest: 'factor'"]),
        ({"inner": None}, ["'inner'"]),
        ({"inner": 5}, ["'inner'"]),
        ({"inner": {"kind": "Large", "factor": 1.0}}, ["'inner'", "'Large'"]),
    ],
    ids=str,
)
def test_a_record_that_does_not_fit_is_refused(change: dict[str, Any], words: list[str]) -> None:
    record = {name: value for name, value in {**RECORD, **change}.items() if value is not ...}
    with pytest.raises(ConfigError) as caught:
        Whole.from_json(record)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_an_unknown_field_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="'wndow'.*nearest: 'window'.*dim, rate"):
        Whole(dim=1, rate=2.0).replace(wndow=3)


@pytest.mark.parametrize("family", all_families(), ids=lambda family: family.name)
def test_every_published_size_goes_round(family: Any) -> None:
    """Every size of every family: through JSON text and back, with a hash of its own."""
    specs = {**family.sizes, **{f"tiny {name}": spec for name, spec in family.tiny.items()}}
    assert specs
    for spec in specs.values():
        assert family.spec.from_json(json.loads(json.dumps(spec.json()))) == spec
    assert len({spec.hash() for spec in specs.values()}) == len(set(specs.values()))
