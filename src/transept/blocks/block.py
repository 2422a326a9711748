"""A block is a list of residual branches: each a function, its norm, and the rule that joins it to the stream (rows 23-25)."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import NamedTuple

from torch import nn

from transept.blocks.cache import Room, Slot
from transept.blocks.context import Context
from transept.blocks.dropout import Dropout
from transept.core.shapes import Float, Tensor
from transept.core.tap import tap


class Pre(nn.Module):
    """x + f(norm(x)): the stream itself is never normalised (row 25)."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.dropout = Dropout(dropout)

    def forward(self, x: Float[Tensor, "b t d"], f: Callable[[Tensor], Tensor], norm: nn.Module) -> Float[Tensor, "b t d"]:
        return x + self.dropout(f(norm(x)))


class Post(nn.Module):
    """norm(x + f(x)): the 2017 order (row 24)."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.dropout = Dropout(dropout)

    def forward(self, x: Float[Tensor, "b t d"], f: Callable[[Tensor], Tensor], norm: nn.Module) -> Float[Tensor, "b t d"]:
        return norm(x + self.dropout(f(x)))


class Order(Enum):
    """Where the norms of a stack stand: before each function, or after each sum."""

    PRE = "x + f(norm(x))"
    POST = "norm(x + f(x))"

    def rule(self, dropout: float = 0.0) -> Pre | Post:
        """The rule that joins a branch in this order."""
        return Pre(dropout) if self is Order.PRE else Post(dropout)


class Branch(NamedTuple):
    """A function, its norm, and how they join the stream."""

    f: nn.Module
    norm: nn.Module
    rule: nn.Module


class Block(nn.Module):
    """Residual branches in the order given; the branch's name is the parameter's name: `attn`, `attn_norm`, `mlp`, `mlp_norm`."""

    def __init__(self, **branches: Branch):
        super().__init__()
        self.order = tuple(branches)
        for name, branch in branches.items():
            self.add_module(name, branch.f)
            self.add_module(f"{name}_norm", branch.norm)
            self.add_module(f"{name}_rule", branch.rule)

    def branch(self, name: str) -> Branch:
        """The branch of that name."""
        return Branch(self.get_submodule(name), self.get_submodule(f"{name}_norm"), self.get_submodule(f"{name}_rule"))

    def forward(self, x: Float[Tensor, "b t d"], ctx: Context) -> Float[Tensor, "b t d"]:
        for name in self.order:
            f, norm, rule = self.branch(name)
            x = tap(self, name, rule(x, partial(f, ctx=ctx.branch(name)), norm))
        return x

    def slots(self, room: Room) -> dict[str, Slot]:
        """What each branch that remembers needs of a cache."""
        makers = {name: getattr(self.get_submodule(name), "slot", None) for name in self.order}
        return {name: make(room) for name, make in makers.items() if make is not None}
