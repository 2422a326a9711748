"""`with watch(m, "attn[3].head[2]") as seen:`: what a model computes inside, heard while its fused kernels run; and other values put there.

Nothing is computed for a place that nobody watches. Contexts may stand inside each other: each hears, and changes, what the outer ones
let through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from transept.adapters.prune import gates
from transept.core.errors import InputError, nearest
from transept.core.shapes import Tensor
from transept.core.tap import Listener, current, listening
from transept.inspection.sites import Site, find, layers, sites

Change = Tensor | Callable[[Tensor], Tensor]


@runtime_checkable
class Holder(Protocol):
    """What holds a network, such as a loaded `transept.Model`."""

    def look(self) -> nn.Module:
        """The network, to be watched."""
        ...


Watched = nn.Module | Holder


class Seen:
    """What was heard, by name: `seen[name]` is the value of the latest call, `seen.every(name)` those of all calls in order.

    Values are the network's own, so gradients flow through them where the call made any.
    """

    def __init__(self, names: Sequence[str]):
        self.heard: dict[str, list[Tensor]] = {name: [] for name in names}

    def every(self, name: str) -> list[Tensor]:
        """The values of all calls. Errors: InputError for a name that is not watched."""
        if name not in self.heard:
            raise InputError(f"{name!r} is not watched{nearest(name, self.heard)}; watched are {', '.join(self.heard)}")
        return self.heard[name]

    def __getitem__(self, name: str) -> Tensor:
        if not self.every(name):
            raise InputError(f"{name} was not computed yet: call the model inside the context")
        return self.heard[name][-1]

    def keys(self) -> list[str]:
        """The names that are watched."""
        return [*self.heard]


def watchable(m: Watched) -> list[str]:
    """Every name that `watch` takes for this model; after the brackets of an attention, .head[0] and so on name one head."""
    return [*sites(module_of(m))]


@contextmanager
def watch(m: Watched, *names: str) -> Iterator[Seen]:
    """Within this context the named values are kept: attn[3].head[2] the weights of one head [b t s], attn[3] those of all [b h t s].

    `[*]` stands for every number. Others: attn[3].q, .k, .v and .out (each head's output) [b h t e], block[3] the stream after a layer
    and embed before the first [b t d], mlp[3].hidden, hidden; encoder.attn[0] and cross[0] in an encoder-decoder. A decoder that runs in
    the native core runs as a module meanwhile. Errors: InputError with the nearest name.
    """
    module = module_of(m)
    found = find(module, names)
    if not found:
        raise InputError(f"name what to watch, such as {', '.join([*sites(module)][:3])}")
    seen = Seen([*found])
    with chained(_Ears(module, found, seen)):
        yield seen


@contextmanager
def patched(m: Watched, changes: Mapping[str, Change], at: Sequence[int] | None = None) -> Iterator[None]:
    """Within this context other values flow on from the named places: a tensor of the same shape, or a function of what was computed.

    `at` names the positions that are changed, all where it is None. Errors: InputError for attention weights, which the fused kernels
    never make (change .out instead), and for a value of another shape.
    """
    module = module_of(m)
    given = {site: change for name, change in changes.items() for site in find(module, [name]).values()}
    weights = next((site.name for site in given if site.tap == "weights"), None)
    if weights is not None:
        raise InputError(f"{weights} is never computed by the fused kernels, so it cannot be changed; change {weights}.out")
    with chained(_Hands(module, given, at)):
        yield


def heads_off(m: Watched, heads: Sequence[str]) -> AbstractContextManager[None]:
    """Within this context the named heads, such as attn[3].head[2], give zeros; attn[3] stands for all of its heads."""
    module = module_of(m)
    off: dict[str, list[int]] = {}
    for site in find(module, heads).values():
        if not site.heads or site.tap != "weights" or site.path not in _maskable(module):
            raise InputError(f"{site.name} is no head of an attention that can be taken out")
        off.setdefault(site.path, []).extend(range(site.heads) if site.head is None else [site.head])
    return chained(gates(module, off))


def swapped(m: Watched, name: str, given: Callable[[], Any], taken: Callable[[], Any], at: Sequence[int] | None = None) -> Any:
    """The result of the call `taken` with the named value of the call `given` put in its place (activation patching)."""
    with watch(m, name) as seen:
        given()
    with patched(m, {place: seen[place] for place in seen.keys()}, at):
        return taken()


@contextmanager
def chained(listener: Listener) -> Iterator[None]:
    """As `listening`, but who listens already goes on to."""
    outer = current()
    with listening(listener if outer is None else _Both(outer, listener)):
        yield


def module_of(m: Watched) -> nn.Module:
    """The network; a loaded model lends it without giving up its native core."""
    return m if isinstance(m, nn.Module) else m.look()


def _maskable(module: nn.Module) -> set[str]:
    return {layer.path for layer in layers(module) if hasattr(module.get_submodule(layer.path), "out")}


class _Both:
    """Two listeners, the second behind the first."""

    def __init__(self, first: Listener, second: Listener):
        self.first, self.second = first, second
        self.turn: list[tuple[Listener, bool | tuple[int, ...]]] = []

    def wants(self, owner: object, name: str) -> bool | tuple[int, ...]:
        self.turn = [(listener, wanted) for listener in (self.first, self.second) if (wanted := listener.wants(owner, name))]
        if len(self.turn) == 1:
            return self.turn[0][1]
        return bool(self.turn)

    def hear(self, owner: object, name: str, value: Any) -> Any:
        if not self.turn:
            return self.second.hear(owner, name, self.first.hear(owner, name, value))
        # A value made for who wanted it: all heads where two did, so that each takes its own.
        turn, self.turn = self.turn, []
        for listener, wanted in turn:
            listener.hear(owner, name, value if wanted is True or len(turn) == 1 else value[:, list(wanted or ())])
        return value


class _Places:
    """Which places a module stands for when it says a name."""

    def __init__(self, module: nn.Module, found: Sequence[Site]):
        self.places: dict[tuple[int, str], list[Site]] = {}
        for site in found:
            self.places.setdefault((id(module.get_submodule(site.path)), site.tap), []).append(site)
        self.calls: dict[tuple[int, str], int] = {}

    def now(self, owner: object, name: str) -> list[Site]:
        """The places of this saying; a module of several layers says its name once for each."""
        key = (id(owner), name)
        found = self.places.get(key)
        if not found:
            return []
        if found[0].uses == 1:
            return found
        count = self.calls.get(key, 0)
        self.calls[key] = count + 1
        return [site for site in found if site.use == count % site.uses]


class _Ears(_Places):
    """Keeps what it hears."""

    def __init__(self, module: nn.Module, found: Mapping[str, Site], seen: Seen):
        super().__init__(module, [*found.values()])
        self.seen = seen

    def wants(self, owner: object, name: str) -> bool | tuple[int, ...]:
        places = self.places.get((id(owner), name), [])
        heads = sorted({site.head for site in places if site.head is not None})
        return bool(places) if any(site.head is None for site in places) else tuple(heads)

    def hear(self, owner: object, name: str, value: Any) -> Any:
        wanted = self.wants(owner, name)
        made = wanted if name == "weights" and isinstance(wanted, tuple) else None
        for site in self.now(owner, name):
            head = None if site.head is None else site.head // site.group if made is None else made.index(site.head)
            self.seen.heard[site.name].append(value if head is None else value[:, head])
        return value


class _Hands(_Places):
    """Puts other values in place of what it hears."""

    def __init__(self, module: nn.Module, changes: Mapping[Site, Change], at: Sequence[int] | None):
        super().__init__(module, [*changes])
        self.changes, self.at = changes, at

    def wants(self, owner: object, name: str) -> bool:
        return False

    def hear(self, owner: object, name: str, value: Any) -> Any:
        for site in self.now(owner, name):
            value = self._changed(site, value)
        return value

    def _changed(self, site: Site, value: Tensor) -> Tensor:
        part = value if site.head is None else value[:, site.head // site.group]
        change = self.changes[site]
        new = change(part) if callable(change) else change
        if new.shape[-part.ndim + 1 :] != part.shape[1:] or len(new) not in (1, len(part)):
            raise InputError(f"{site.name} has the shape {tuple(part.shape)} here, but {tuple(new.shape)} was to take its place")
        if self.at is not None:
            axis = part.ndim - 2
            bad = next((i for i in self.at if not -part.shape[axis] <= i < part.shape[axis]), None)
            if bad is not None:
                raise InputError(f"{site.name} has the positions 0 to {part.shape[axis] - 1} here, not {bad}")
            where = torch.tensor([*self.at], device=part.device) % part.shape[axis]
            new = part.index_copy(axis, where, new.expand_as(part).index_select(axis, where).to(part.dtype))
        if site.head is None:
            return new.expand_as(value).to(value.dtype)
        out = value.clone()
        out[:, site.head // site.group] = new
        return out
