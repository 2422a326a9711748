"""How alike a model holds two positions, whatever its way of knowing where a token stands (rows 31-36, 100)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from transept.blocks.context import Context
from transept.blocks.disentangled import DisentangledAttention, RelativeTable, distance
from transept.blocks.positions import Learned, Relative, Rotary, Sinusoidal
from transept.core.errors import InputError
from transept.core.shapes import Float, Tensor
from transept.inspection.watch import Watched, module_of
from transept.ops.masks import Positions
from transept.ops.rotary import frequencies


@dataclass(frozen=True)
class Similarity:
    """`matrix` [n n] for the first n positions; `told` says in a sentence what its numbers are. Empty where the kind is none."""

    kind: str
    told: str
    matrix: Tensor


def similarity(m: Watched, count: int = 64) -> Similarity:
    """The similarity of the first `count` positions, fewer where the model's table ends before. Errors: InputError for a count below 1."""
    if count < 1:
        raise InputError(f"count: at least one position is needed, found {count}")
    with torch.no_grad():
        for module in module_of(m).modules():
            found = _of(module, count)
            if found is not None:
                return found
    return Similarity(
        "none", "this model is told no positions; what it knows of order it has from its masks or from reading in order", torch.zeros(0, 0)
    )


def _of(module: nn.Module, count: int) -> Similarity | None:
    if isinstance(module, Learned):
        rows = module.weight[module.offset : module.offset + min(count, module.context)]
        return Similarity("learned", "cosine of the learned vectors of two positions", _cosine(rows))
    if isinstance(module, Sinusoidal):
        where = torch.arange(count)[None]
        waves = module(torch.zeros(1, count, module.dim), where)[0]
        return Similarity("sinusoidal", "cosine of the sines and cosines that are added at two positions", _cosine(waves))
    if isinstance(module, Rotary):
        rates, _ = frequencies(module.spec, count)
        where = torch.arange(count)
        turn = ((where[:, None] - where)[..., None] * rates).cos().mean(-1)
        return Similarity(
            "rotary", "mean cosine of the angles between two positions over all frequencies: what rotation leaves of q k", turn
        )
    if isinstance(module, Relative):
        where = Positions.span(0, count, module.weight.device)
        bias = module.bias(Context(where, where), count)[0].mean(0)
        return Similarity("relative", "what the position of the key adds to the score of a query, averaged over the heads", bias)
    if isinstance(module, DisentangledAttention):
        return Similarity(
            "relative",
            "cosine of the vector of the distance between two positions with that of distance 0",
            _disentangled(module.source[0], module, count),
        )
    return None


def _disentangled(table: RelativeTable, module: DisentangledAttention, count: int) -> Float[Tensor, "n n"]:
    where = torch.arange(count)[None]
    rows = F.normalize(table().float(), dim=-1)
    away = distance(where, where, module.spec)[0]
    return rows[away] @ rows[away[0, 0]]


def _cosine(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n n"]:
    rows = F.normalize(rows.float(), dim=-1)
    return rows @ rows.T
