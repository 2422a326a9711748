"""How two families differ, read from their Specs and from the slots of their networks: the course made executable."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import nn

from transept.blocks.block import Block
from transept.blocks.embeddings import Embedding
from transept.blocks.stack import Stack
from transept.blocks.traits import Traits
from transept.core.registry import Family
from transept.core.spec import Spec


@dataclass(frozen=True)
class Difference:
    """One line: where, what the first has, what the second has ("-" for nothing)."""

    where: str
    left: str
    right: str


def diff(a: tuple[Family, Spec], b: tuple[Family, Spec]) -> list[Difference]:
    """The differences of two families at given sizes: slots first, then numbers. Equal things are not mentioned."""
    left, right = a[1].json(), b[1].json()
    lines = _slot_lines(_slots(a), _slots(b), set(left) & set(right))
    for name in (*left, *(n for n in right if n not in left)):
        if name in left and name in right and left[name] != right[name]:
            lines += [Difference(f"{name}{k}", x, y) for k, x, y in _flat(left[name], right[name])]
    return lines


Slots = dict[str, dict[str, list[str]]]
"""Slot -> trait -> its values over the layers; the trait "" is the class."""


def _slots(a: tuple[Family, Spec]) -> Slots:
    """What fills each slot; layers share their slots."""
    family, spec = a
    with torch.device("meta"):
        model = family.build(spec)
    slots: Slots = {}
    for name, module in model.named_modules():
        if name and not isinstance(module, _STRUCTURE) and type(module) is not nn.Linear:
            slot = slots.setdefault(re.sub(r"^stack\.|(?<=layers)\.\d+", "", name), {})
            traits = module.traits() if isinstance(module, Traits) else {}
            for trait, value in {"": type(module).__name__, **traits}.items():
                values = slot.setdefault(trait, [])
                if str(value) not in values:
                    values.append(str(value))
    return slots


_STRUCTURE = (nn.Dropout, nn.ModuleList, nn.Identity, Block, Stack, Embedding)


def _slot_lines(left: Slots, right: Slots, numbers: set[str]) -> list[Difference]:
    """Slots that differ in class, or in a trait that is not already a number of both Specs."""
    lines = []
    for name in (*left, *(n for n in right if n not in left)):
        x, y = left.get(name, {}), right.get(name, {})
        same = {trait for trait in x if trait in y and x[trait] == y[trait]} if x.get("") == y.get("") else set()
        shown = [_text(side, same | numbers) for side in (x, y)]
        if shown[0] != shown[1]:
            lines.append(Difference(name, *shown))
    return lines


def _text(slot: dict[str, list[str]], left_out: set[str]) -> str:
    kind = " / ".join(slot.get("", ["-"]))
    traits = ", ".join(f"{trait} {' / '.join(values)}" for trait, values in slot.items() if trait and trait not in left_out)
    return f"{kind}({traits})" if traits else kind


def _flat(x: object, y: object) -> list[tuple[str, str, str]]:
    if isinstance(x, dict) and isinstance(y, dict):
        return [(f".{k}", str(x.get(k, "-")), str(y.get(k, "-"))) for k in {**x, **y} if x.get(k) != y.get(k)]
    return [("", str(x), str(y))]
