"""Attention of a model that runs fused: maps by layer and head, what they say through all layers, and how far they look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from transept.blocks.seq2seq import EncoderDecoder
from transept.core.errors import InputError, nearest
from transept.core.shapes import Float, Int, Tensor
from transept.inspection.sites import Layer, layers
from transept.inspection.watch import Watched, module_of, watch


@dataclass(frozen=True)
class Map:
    """The weights [b t s] of one head; `name` is what `watch` calls it."""

    layer: int
    head: int
    name: str
    weights: Tensor


def called(m: Watched, ids: Int[Tensor, "b t"], source: Tensor | None = None) -> Any:
    """The network's result on some ids; an encoder-decoder's on a target beside its source."""
    module = module_of(m)
    return module(ids, source=source) if isinstance(module, EncoderDecoder) else module(ids)


def kinds(m: Watched) -> list[str]:
    """The kinds of attention that a model has: self, encoder (an encoder-decoder's encoder) and cross."""
    found = {layer.kind for layer in layers(module_of(m))}
    return [kind for kind in ("self", "encoder", "cross") if kind in found]


def of_kind(m: Watched, kind: str) -> list[Layer]:
    """The layers of one kind. Errors: InputError where there are none."""
    found = [layer for layer in layers(module_of(m)) if layer.kind == kind]
    if not found:
        have = kinds(m)
        said = f"it has {', '.join(have)}{nearest(kind, have)}" if have else "it has no attention"
        raise InputError(f"kind: this model has no attention of the kind {kind!r}; {said}")
    return found


def maps(
    m: Watched,
    ids: Int[Tensor, "b t"],
    *,
    source: Tensor | None = None,
    kind: str = "self",
    layer: int | None = None,
    head: int | None = None,
) -> list[Map]:
    """The maps of one layer and head, or of all where they are None; only these are computed, in one call of the model.

    Errors: InputError for a layer or head that is not there.
    """
    chosen = [one for one in of_kind(m, kind) if layer in (None, one.index)]
    if not chosen:
        raise InputError(f"layer: the layers are 0 to {len(of_kind(m, kind)) - 1}, found {layer}")
    wanted = [(one, h) for one in chosen for h in range(one.heads) if head in (None, h)]
    if not wanted:
        raise InputError(f"head: the heads are 0 to {max(one.heads for one in chosen) - 1}, found {head}")
    names = [f"{one.name}.head[{h}]" for one, h in wanted]
    with torch.no_grad(), watch(m, *names) as seen:
        called(m, ids, source)
    return [Map(one.index, h, name, seen[name]) for (one, h), name in zip(wanted, names, strict=True)]


def rollout(weights: Sequence[Float[Tensor, "b h t t"]]) -> Float[Tensor, "b t t"]:
    """How much of each token reaches each token through all layers (Abnar and Zuidema 2020, arXiv 2005.00928, section 3).

    A layer's heads are averaged, the residual stream counts as much as the attention, and the layers are multiplied; rows sum to 1.
    """
    total = torch.eye(weights[0].shape[-1], device=weights[0].device, dtype=weights[0].dtype)[None]
    for layer in weights:
        mixed = layer.mean(1) + torch.eye(layer.shape[-1], device=layer.device, dtype=layer.dtype)
        total = mixed / mixed.sum(-1, keepdim=True) @ total
    return total


def rolled(m: Watched, ids: Int[Tensor, "b t"], *, source: Tensor | None = None, kind: str = "self", layer: int | None = None) -> Tensor:
    """The rollout of a model on some ids [b t t], through the layers up to and with `layer`."""
    if kind == "cross":
        raise InputError("kind: a rollout multiplies the layers of one sequence, so it is of self or encoder, not of cross")
    chosen = of_kind(m, kind)
    if layer is not None and not 0 <= layer < len(chosen):
        raise InputError(f"layer: the layers are 0 to {len(chosen) - 1}, found {layer}")
    names = [one.name for one in chosen[: None if layer is None else layer + 1]]
    with torch.no_grad(), watch(m, *names) as seen:
        called(m, ids, source)
    return rollout([seen[name] for name in names])


def distance(weights: Float[Tensor, "b t s"]) -> float:
    """How far a head looks on average, in tokens (Dosovitskiy et al. 2020, section 4.5, there in pixels)."""
    t, s = weights.shape[-2:]
    # The last query stands at the last key.
    away = (torch.arange(t)[:, None] + s - t - torch.arange(s)).abs().to(weights)
    return float((weights * away).sum(-1).mean())


def batch_of(ids: Sequence[int], module: nn.Module) -> Int[Tensor, "1 t"]:
    """One row of ids where the network computes."""
    return torch.tensor([[*ids]], device=next(module.parameters()).device)
