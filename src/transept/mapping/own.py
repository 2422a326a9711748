"""The form of a family that nobody published: a Spec's own fields and a model's own names, so that what is trained here can be kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from transept.core.registry import Family, Published, family
from transept.core.spec import Spec
from transept.mapping.fields import REQUIRED, Field, Fields
from transept.mapping.table import Bond, Map

PREFIX = "transept:"
_made: dict[str, tuple[Family, Published]] = {}


def own(page: Family) -> Published:
    """The form of a family under the library's own names; one and the same object for one page."""
    if _made.get(page.name, (None,))[0] is not page:
        form = Published(PREFIX + page.name, OwnNames(page.build), OwnFields(page.spec), model_type="transept")
        _made[page.name] = page, form
    return _made[page.name][1]


def declared(architecture: str) -> tuple[Family, Published] | None:
    """The family and form of an architecture that `own` has named; None for any other. Raises ConfigError for an unknown family."""
    if not architecture.startswith(PREFIX):
        return None
    page = family(architecture.removeprefix(PREFIX))
    return page, own(page)


class OwnNames(Map):
    """Each tensor under its native name, as the wiring of a Spec has it."""

    def __init__(self, build: Callable[[Any], Any]):
        super().__init__(index={})
        self.build = build

    def bonds(self, spec: Any, root: str | None = None) -> list[Bond]:
        """One bond without moves for every tensor of the model."""
        with torch.device("meta"):
            names = self.build(spec).state_dict()
        return [Bond((name,), (name,), ()) for name in names]


class OwnFields(Fields):
    """A Spec as its own JSON; unknown and missing fields are refused."""

    def __init__(self, spec: type[Spec]):
        entries = [(f.name, REQUIRED if f.default is dataclasses.MISSING else f.default) for f in dataclasses.fields(spec)]
        super().__init__(*(Field(name, name, default) for name, default in entries))
        self.spec = spec

    def read(self, config: Mapping[str, Any], ignore: Sequence[str] = ()) -> dict[str, Any]:
        """The Spec's fields, held to their types."""
        return dict(vars(self.spec.checked(super().read(config, ignore))))

    def write(self, spec: Any) -> dict[str, Any]:
        """The Spec's JSON."""
        return spec.json()
