"""Token merging (Bolya et al. 2022, arXiv 2210.09461; row 51): the most similar tokens become one, so that a sequence gets shorter by r.

Tokens are split into two alternating sets; each of the first set has one best partner in the second, and the r best pairs are merged
("bipartite soft matching", appendix D). Nothing is iterated, so all rows go at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from transept.core.errors import InputError
from transept.core.shapes import Float, Int, Tensor


@dataclass(frozen=True)
class Matching:
    """Which tokens become one: row by row, `source` [b r] of the first set join `target` [b r] of the second; `kept` [b n] of the first
    set stay.
    """

    kept: Int[Tensor, "b n"]
    source: Int[Tensor, "b r"]
    target: Int[Tensor, "b r"]


def match(keys: Float[Tensor, "b t e"], r: int, protect_first: bool = False) -> Matching:
    """The matching of tokens by the cosine of their attention keys (averaged over heads); `protect_first` keeps a class token apart.

    At most half of the tokens can be merged; more is refused.
    """
    unit = keys / keys.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    a, b = unit[:, ::2], unit[:, 1::2]
    most = min(a.shape[1] - protect_first, b.shape[1] and a.shape[1])
    if not 0 <= r <= most:
        raise InputError(f"{r} tokens cannot be merged out of {keys.shape[1]}: at most {most}")
    scores = a @ b.transpose(1, 2)
    if protect_first:
        scores[:, 0] = float("-inf")
    best, partner = scores.max(-1)
    order = best.argsort(dim=-1, descending=True, stable=True)
    source = order[:, :r]
    return Matching(order[:, r:].sort(dim=-1).values, source, partner.gather(1, source))


def merge(
    x: Float[Tensor, "b t d"], size: Float[Tensor, "b t 1"], found: Matching
) -> tuple[Float[Tensor, "b u d"], Float[Tensor, "b u 1"]]:
    """The merged tokens, means weighted by how many patches each stands for, and their sizes; those of the first set that stay come
    first.
    """
    whole = torch.cat((x * size, size), -1)
    a, b = whole[:, ::2], whole[:, 1::2]
    wide = whole.shape[-1]
    joined = b.scatter_add(1, found.target[..., None].expand(-1, -1, wide), a.gather(1, found.source[..., None].expand(-1, -1, wide)))
    out = torch.cat((a.gather(1, found.kept[..., None].expand(-1, -1, wide)), joined), 1)
    return out[..., :-1] / out[..., -1:], out[..., -1:]


def proportional(size: Float[Tensor, "b s 1"]) -> Float[Tensor, "b 1 1 s"]:
    """log(size), added to the scores of the merged keys so that a token of n patches counts n times (eq. 1)."""
    return size.log().transpose(1, 2)[:, None]
