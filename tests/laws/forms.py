"""Every published form of every family, with the tiny specs that it can hold, and files made of nothing but names and tensors."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from transept.core.errors import ConfigError
from transept.core.registry import Family, Published, all_families
from transept.mapping.own import own


class Memory:
    """Tensors by name, as a map reads them."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.tensors = tensors

    def keys(self) -> Iterable[str]:
        return self.tensors

    def read(self, key: str, /) -> Tensor:
        return self.tensors[key]


def holds(form: Published, spec: Any) -> bool:
    """True if the form's configuration can say all that the spec says."""
    try:
        return spec.replace(**form.fields.read(form.fields.write(spec))) == spec
    except ConfigError:
        return False


def forms() -> list[tuple[Family, Published]]:
    """Every form in the registry: the published ones, and the library's own of families that nobody published."""
    return [(family, form) for family in all_families() for form in family.published or (own(family),)]


def held(family: Family, form: Published) -> dict[str, Any]:
    """The tiny specs that the form can hold, by name; a classifier's with three classes."""
    specs = dict(family.tiny)
    for name, spec in family.tiny.items():
        for field, value in (("classes", 3), ("labels", ("no", "yes", "maybe"))):
            if not getattr(spec, field, True):
                specs[f"{name}, 3 {field}"] = spec.replace(**{field: value})
    return {name: spec for name, spec in specs.items() if holds(form, spec) and _whole(family, form, spec)}


def _whole(family: Family, form: Published, spec: Any) -> bool:
    """False where the form's head would have no outputs at all: a classifier of a spec that names no classes."""
    with warnings.catch_warnings():
        # torch warns of drawing a tensor without elements.
        warnings.simplefilter("ignore", UserWarning)
        return all(math.prod(shape) for shape in shapes(family, form, spec).values())


def shapes(family: Family, form: Published, spec: Any) -> dict[str, tuple[int, ...]]:
    """The native parameters and buffers of the form's module."""
    with torch.device("meta"):
        module = (form.build or family.build)(spec)
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def numbers(named: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Tensors in which, as far as the dtype can tell them apart, no number comes twice."""
    gen = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=gen).to(dtype) for name, shape in named.items()}


def bits(tensors: Iterable[Tensor]) -> Tensor:
    """All numbers, sorted."""
    return torch.cat([t.flatten() for t in tensors]).sort().values


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    """Equal names, dtypes, shapes and bits."""
    assert set(a) == set(b)
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype and torch.equal(tensor, b[name]), name
