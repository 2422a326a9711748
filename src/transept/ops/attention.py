"""Scaled dot-product attention, softmax(q k^T * scale + bias) v (Vaswani et al. 2017, eq. 1; rows 12, 13, 17)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from transept.core.shapes import Float, Tensor
from transept.ops.masks import Bound, Mask, PerHead, once
from transept.ops.sparse import attend_plan, worth


def attend(
    q: Float[Tensor, "b h t e"],
    k: Float[Tensor, "b k s e"],
    v: Float[Tensor, "b k s f"],
    *,
    mask: Bound,
    scale: float,
    bias: Float[Tensor, "#b #h t s"] | None = None,
) -> Float[Tensor, "b h t f"]:
    """Attention of h query heads over k key/value heads (k divides h: MHA, GQA and MQA alike), fused.

    A sparse mask is computed by its blocks where that pays. A query that may attend to nothing gets zeros. Equal to `reference`.
    """
    if isinstance(mask.mask, PerHead):
        return _by_head((q, k, v), mask, mask.mask.masks, scale, bias)
    grouped = q.shape[1] != k.shape[1]
    if bias is None and mask.everything:
        return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped)
    if bias is None and mask.triangle:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    plan = worth(mask) if bias is None else None
    if plan is not None:
        return attend_plan(q, k, v, plan, scale)
    allowed = mask.dense
    if bias is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale, enable_gqa=grouped)
    added = bias.to(q.dtype).masked_fill(~allowed, torch.finfo(q.dtype).min)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=added, scale=scale, enable_gqa=grouped)
    return y * allowed.any(-1, keepdim=True)


def _by_head(qkv: tuple[Tensor, Tensor, Tensor], mask: Bound, rules: tuple[Mask, ...], scale: float, bias: Tensor | None) -> Tensor:
    """Each head under a rule of its own."""
    q, k, v = qkv
    group, out = q.shape[1] // k.shape[1], []
    for h, rule in enumerate(rules):
        own = once(mask.memo, h, lambda rule=rule: Bound(rule, mask.q, mask.k))
        added = bias if bias is None or bias.shape[1] == 1 else bias[:, h : h + 1]
        out.append(attend(q[:, h : h + 1], k[:, h // group, None], v[:, h // group, None], mask=own, scale=scale, bias=added))
    return torch.cat(out, 1)


def weights(
    q: Float[Tensor, "b h t e"],
    k: Float[Tensor, "b k s e"],
    *,
    mask: Bound,
    scale: float,
    bias: Float[Tensor, "#b #h t s"] | None = None,
    heads: Sequence[int] | None = None,
) -> Float[Tensor, "b g t s"]:
    """The attention weights themselves, for inspection and as the reference; rows that may attend to nothing are zero.

    With `heads` those of these heads alone, and no others are computed.
    """
    group, allowed = q.shape[1] // k.shape[1], mask.dense
    if heads is not None:
        chosen = [*heads]
        q, k, group = q[:, chosen], k[:, [h // group for h in chosen]], 1
        bias = bias if bias is None or bias.shape[1] == 1 else bias[:, chosen]
        allowed = allowed if allowed.shape[1] == 1 else allowed[:, chosen]
    scores = q @ k.repeat_interleave(group, dim=1).transpose(-1, -2) * scale
    if bias is not None:
        scores = scores + bias
    return torch.nan_to_num(scores.masked_fill(~allowed, float("-inf")).softmax(-1))


def reference(
    q: Float[Tensor, "b h t e"],
    k: Float[Tensor, "b k s e"],
    v: Float[Tensor, "b k s f"],
    *,
    mask: Bound,
    scale: float,
    bias: Float[Tensor, "#b #h t s"] | None = None,
) -> Float[Tensor, "b h t f"]:
    """The equation, line by line: what `attend` must equal."""
    v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    return weights(q, k, mask=mask, scale=scale, bias=bias) @ v
