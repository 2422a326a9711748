"""Low-rank adaptation: W stays, B A is learnt beside it (Hu et al. 2021, arXiv 2106.09685, eq. 3; row 84b)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from transept.blocks.embeddings import TokenEmbedding
from transept.blocks.heads import Head, TiedHead
from transept.core.errors import ConfigError, InputError, nearest
from transept.core.shapes import Float, Int, Tensor
from transept.core.spec import Spec

ATTENTION = ("*.attn.q", "*.attn.k", "*.attn.v", "*.attn.out")


@dataclass(frozen=True, kw_only=True)
class Lora(Spec):
    """Rank r, alpha (the update is scaled by alpha / r; by alpha / sqrt(r) where `stabilised`, Kalajdzievski 2023, arXiv 2312.03732),
    dropout before A, and the modules to adapt: names in which * stands for any piece."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("*.attn.q", "*.attn.v")
    stabilised: bool = False

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return self.alpha / (math.sqrt(self.rank) if self.stabilised else self.rank)


class Adapted(nn.Module):
    """What every adapted module has beside its own weight: A [r in], B [out r] and their factor."""

    weight: Tensor
    lora_a: nn.Parameter
    lora_b: nn.Parameter
    scale_ab: float

    def learn(self, inputs: int, outputs: int, lora: Lora, like: Tensor) -> None:
        """A and B in the place and type of `like`; one of them is zero, so that at first nothing is changed."""
        self.lora_a = nn.Parameter(torch.empty(lora.rank, inputs, dtype=like.dtype, device=like.device))
        self.lora_b = nn.Parameter(torch.zeros(outputs, lora.rank, dtype=like.dtype, device=like.device))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self.scale_ab, self.dropout_a = lora.scale, nn.Dropout(lora.dropout)

    def added(self, x: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
        """scale B A x."""
        return F.linear(F.linear(self.dropout_a(x), self.lora_a), self.lora_b) * self.scale_ab

    def update(self) -> Float[Tensor, "o i"]:
        """scale B A in float32."""
        return self.lora_b.float() @ self.lora_a.float() * self.scale_ab

    def merged(self) -> nn.Module:
        """The plain module that computes the same."""
        raise NotImplementedError


class LoraLinear(Adapted, nn.Linear):
    """W x + b + scale B A x."""

    def __init__(self, base: nn.Linear, lora: Lora):
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias, self.kind = base.weight, base.bias, type(base)
        self.learn(base.in_features, base.out_features, lora, base.weight)

    def forward(self, x: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
        return F.linear(x, self.weight, self.bias) + self.added(x)

    def merged(self) -> nn.Module:
        return _linear(self.kind, (self.weight.float() + self.update()).to(self.weight.dtype), self.bias)


class LoraEmbedding(Adapted, TokenEmbedding):
    """The token's row of W plus scale times that of (B A)^T; a head that reads the same table reads W alone."""

    def __init__(self, base: TokenEmbedding, lora: Lora):
        nn.Module.__init__(self)
        self.weight = base.weight
        vocab, dim = base.weight.shape
        self.learn(vocab, dim, lora, base.weight)
        # A is looked up by id, so it is A that begins as zero, as the published adapters do.
        nn.init.zeros_(self.lora_a)
        nn.init.normal_(self.lora_b)

    def forward(self, ids: Int[Tensor, "b t"]) -> Float[Tensor, "b t d"]:
        return super().forward(ids) + F.linear(F.embedding(ids, self.lora_a.T), self.lora_b) * self.scale_ab

    def merged(self) -> nn.Module:
        plain = TokenEmbedding(1, 1)
        plain.weight = nn.Parameter((self.weight.float() + self.update().T).to(self.weight.dtype).detach())
        return plain


class LoraTied(Adapted, TiedHead):
    """Scores by the token table, plus scale B A x; the table itself is not changed."""

    def __init__(self, base: TiedHead, lora: Lora):
        nn.Module.__init__(self)
        self.source, self.scale = base.source, base.scale
        table = base.source[0].weight
        self.learn(table.shape[1], table.shape[0], lora, table)

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... v"]:
        return super().forward(x) + self.added(x if self.scale == 1.0 else x * self.scale)

    def merged(self) -> nn.Module:
        return untied(self, self.update())


def add(model: nn.Module, lora: Lora) -> nn.Module:
    """Puts A and B beside every module that a target names, in place, and freezes everything else; returns the model.

    Linear maps, token tables and tied heads can be adapted. Errors: ConfigError for a rank below 1, or a target that names none;
    InputError for a module that is adapted already or cannot be.
    """
    if lora.rank < 1:
        raise ConfigError(f"the rank of an adapter is 1 or more, found {lora.rank}")
    chosen: dict[str, nn.Module] = {}
    for target in lora.targets:
        found = {name: m for name, m in _places(model) if fnmatchcase(name, target)}
        if not found:
            names = [name for name, _ in _places(model)]
            raise ConfigError(f"no linear map, token table or tied head is called {target!r}{nearest(target, names)}")
        chosen |= found
    model.requires_grad_(False)
    for name, module in chosen.items():
        put(model, name, wrapped(model, name, module, lora))
    return model


def adapted(model: nn.Module) -> dict[str, Adapted]:
    """Every adapted module by its name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Adapted)}


@dataclass(frozen=True)
class Merged:
    """How far the merged model's logits are from the adapted one's at most, and which heads no longer share the token table: their Spec's
    `tied` must now be False."""

    difference: float
    untied: tuple[str, ...]


@torch.no_grad()
def merge(model: nn.Module, probe: Mapping[str, Tensor]) -> Merged:
    """Adds every B A to its weight, in place, and proves it by the model's logits on `probe`, its named arguments such as ids.

    A head tied to a table that changes gets a table of its own with the old numbers. Raises InputError where nothing is adapted.
    """
    parts = adapted(model)
    if not parts:
        raise InputError("the model has no adapter to merge")
    training = model.training
    before = model.eval()(**probe).logits.float()
    loose = [name for name, m in parts.items() if isinstance(m, TiedHead)]
    for name, module in model.named_modules():
        if type(module) is TiedHead and isinstance(module.source[0], LoraEmbedding):
            put(model, name, untied(module))
            loose.append(name)
    for name, module in parts.items():
        _swap(model, name, module, module.merged())
    model.train(training)
    after = model.eval()(**probe).logits.float()
    model.train(training)
    return Merged(float((after - before).abs().max()), tuple(sorted(loose)))


def untied(head: TiedHead, update: Tensor | None = None) -> nn.Linear:
    """A head with a table of its own that scores as the tied one does, `update` added."""
    table = head.source[0].weight
    new = table.float() if update is None else table.float() + update
    return _linear(Head, (new * head.scale).to(table.dtype), None)


def wrapped(model: nn.Module, name: str, module: nn.Module, lora: Lora) -> Adapted:
    """The module of that name with A and B beside its weight, not yet put in its place. Raises InputError where that cannot be."""
    parent, _, leaf = name.rpartition(".")
    if isinstance(module, Adapted):
        raise InputError(f"{name} is adapted already: merge the first adapter before adding another")
    if leaf in getattr(model.get_submodule(parent), "READ", ()):
        raise InputError(f"the weight of {name} is read without a call while decoding, so it cannot be adapted")
    if isinstance(module, TiedHead):
        return LoraTied(module, lora)
    if isinstance(module, nn.Linear):
        return LoraLinear(module, lora)
    if isinstance(module, TokenEmbedding):
        made = LoraEmbedding(module, lora)
        _follow(model, module, made)
        return made
    raise InputError(f"{name} is a {type(module).__name__}, which cannot be adapted")


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Sets the module of that dotted name."""
    parent, _, leaf = name.rpartition(".")
    model.get_submodule(parent).add_module(leaf, module)


def _linear(kind: type[nn.Linear], weight: Tensor, bias: Tensor | None) -> nn.Linear:
    plain = kind(1, 1, bias=False)
    plain.weight = nn.Parameter(weight.detach().clone())
    plain.out_features, plain.in_features = weight.shape
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().clone())
    return plain


def _places(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that can be adapted or are: plain linear maps (a subclass may do more with its weight), token tables, tied heads."""
    plain = (nn.Linear, Head, TokenEmbedding, TiedHead)
    yield from ((name, m) for name, m in model.named_modules() if name and (type(m) in plain or isinstance(m, Adapted)))


def _swap(model: nn.Module, name: str, old: nn.Module, new: nn.Module) -> None:
    _follow(model, old, new)
    put(model, name, new)


def _follow(model: nn.Module, old: nn.Module, new: Any) -> None:
    """Whoever shares a token table goes on sharing it."""
    for module in model.modules():
        if getattr(module, "source", None) == (old,):
            module.source = (new,)  # type: ignore[assignment]
