"""What a template may spend: steps, seconds, and bytes of everything it builds, all counted before they are spent."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sized
from dataclasses import dataclass
from typing import Any

from transept.core.errors import TemplateError

DEPTH = 64
"""How deep lists and dicts may nest: deeper ones would leave the C stack to JSON and comparison."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The allowance of one render; what the messages themselves hold is added, so a long conversation is no runaway.

    steps: loop rounds, calls, filters, operators; they end a runaway well before the clock does. seconds: processor time of this
    thread, the backstop. characters: the longest single value.
    bytes: everything built during the render together, the output included. calls: how deep macros and recursive loops nest.
    """

    steps: int = 60_000
    seconds: float = 2.0
    characters: int = 1 << 17
    bytes: int = 3 << 20
    calls: int = 48


@dataclass(frozen=True)
class Weight:
    """Size of a value written out: characters, items at every level (shared ones counted each time), levels."""

    characters: int
    items: int
    depth: int


ONE = Weight(8, 1, 0)


class Meter:
    """Counts one render against its budget; every method raises TemplateError when the allowance is spent."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.steps = budget.steps
        self.bytes = budget.bytes
        self.characters = budget.characters
        self.depth = 0
        self.stop = time.thread_time() + budget.seconds
        self.known: dict[int, tuple[Any, Weight]] = {}

    def allow(self, value: Any) -> None:
        """Add the allowance that an input brings with it."""
        weight = self.weigh(value)
        self.steps += 100 * weight.items
        self.bytes += 256 * weight.characters
        self.characters += 8 * weight.characters
        self.stop += weight.characters * 1e-6

    def tick(self, n: int = 1) -> bool:
        """Spend `n` steps; looks at the clock every 64 steps and at every large one."""
        self.steps -= n
        if self.steps < 0:
            raise TemplateError(f"chat template: more than {self.budget.steps} steps; a template that ends was expected")
        if (n > 64 or not self.steps & 63) and time.thread_time() > self.stop:
            raise TemplateError(f"chat template: more than {self.budget.seconds} s of work; a template that ends was expected")
        return True

    def spend(self, size: int) -> None:
        """Reserve `size` bytes before they are allocated."""
        self.bytes -= size
        if self.bytes < 0:
            raise TemplateError(f"chat template: builds more than {self.budget.bytes} bytes for a short conversation")

    def fits(self, characters: int) -> None:
        """Refuse a value longer than the allowance, before it is built."""
        if characters > self.characters:
            raise TemplateError(f"chat template: a value of {characters} characters; at most {self.characters} are allowed")

    def text(self, value: str) -> str:
        """Charge one new string."""
        self.fits(len(value))
        self.spend(64 + len(value) * (1 if value.isascii() else 4))
        return value

    def made(self, value: Any) -> Any:
        """Charge one new value of any kind and return it; a generator is charged item by item as it is read."""
        self.tick()
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, int):
            if value.bit_length() > 4096:
                raise TemplateError("chat template: an integer of more than 4096 bits")
            return value
        if type(value).__module__ == "builtins" and hasattr(value, "__next__"):
            return self.each(value)
        if isinstance(value, (list, tuple, dict)):
            self.spend(64 + 16 * len(value))
            weight = self.weigh(value)
            self.fits(weight.characters)
        return value

    def each(self, values: Any) -> Any:
        """A lazily charged copy of an iterator."""
        for value in values:
            yield self.made(value)

    def weigh(self, value: Any) -> Weight:
        """Written-out size of a value, each container measured once."""
        if isinstance(value, str):
            return Weight(len(value) + 2, 1, 0)
        if not isinstance(value, (list, tuple, dict)):
            return ONE
        found = self.known.get(id(value))
        if found is not None:
            return found[1]
        characters, items, depth = 2, 1, 0
        parts = [*value.keys(), *value.values()] if isinstance(value, Mapping) else value
        for part in parts:
            inner = self.weigh(part)
            characters, items, depth = characters + inner.characters + 2, items + inner.items, max(depth, inner.depth)
        if depth + 1 > DEPTH:
            raise TemplateError(f"chat template: lists or dicts nested more than {DEPTH} deep")
        weight = Weight(characters, items, depth + 1)
        self.tick(1 + len(value) // 16)
        self.known[id(value)] = (value, weight)
        return weight

    def operand(self, value: Any) -> Any:
        """Charge for comparing or writing out a value that already exists."""
        weight = self.weigh(value)
        self.tick(1 + weight.items // 16 + weight.characters // 4096)
        return value

    def copied(self, value: Any) -> None:
        """Reserve room for a list made from `value`'s items."""
        if isinstance(value, str):
            self.spend(80 * len(value))
        elif isinstance(value, Sized):
            self.spend(64 * len(value))
        self.operand(value)
