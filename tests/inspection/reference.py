"""Attention by hand: from each layer's input, the projections and the equation, in loops that no fused kernel shares."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from transept.blocks.attention import Attention
from transept.blocks.bigbird import BlockSparseAttention
from transept.blocks.block import Block
from transept.blocks.context import Context
from transept.blocks.cross import CrossAttention
from transept.blocks.disentangled import DisentangledAttention, distance
from transept.blocks.latent import LatentAttention
from transept.blocks.longformer import GlobalAttention, GlobalContext
from transept.ops.masks import PAD, PerHead, Window
from transept.ops.rotary import Layout, frequencies


def hands(module: nn.Module, ids: Tensor, **rest: Any) -> dict[str, Tensor]:
    """Name of each attention -> its weights [b h t s], from the input that each layer was called with."""
    calls: dict[str, Tensor] = {}
    hooks = []

    def note(name: str, attention: nn.Module) -> None:
        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            calls[name] = by_equation(attention, args[0], kwargs["ctx"] if "ctx" in kwargs else args[1])

        hooks.append(attention.register_forward_pre_hook(before, with_kwargs=True))

    for path, block in module.named_modules():
        if isinstance(block, Block):
            words = path.split(".")
            prefix = "encoder." if words[0] == "encoder" else ""
            for branch in ("attn", "cross"):
                if branch in block.order:
                    note(f"{prefix}{branch}[{words[-1]}]", block.get_submodule(branch))
    with torch.no_grad():
        module(ids, **rest)
    for hook in hooks:
        hook.remove()
    return calls


def by_equation(m: Any, x: Tensor, ctx: Context) -> Tensor:
    """softmax of the scores, pair by pair."""
    if isinstance(m, LatentAttention):
        q, k, scale = latent(m, x, ctx)
    elif isinstance(m, CrossAttention):
        q, k, scale = parted(m.q(x), m.heads), parted(m.k(ctx.memory), m.heads), m.scale
    else:
        heads = m.heads
        q, k, scale = parted(m.q(x), heads), parted(m.k(x), getattr(m, "kv_heads", heads)), m.scale
        k = k.repeat_interleave(heads // k.shape[1], 1)
        rope = getattr(getattr(m, "position", None), "spec", None)
        if hasattr(rope, "theta"):
            q, k = turned(q, ctx, rope), turned(k, ctx, rope)
    scores = torch.einsum("bhte,bhse->bhts", q, k) * scale + extra(m, x, ctx, q, k)
    allowed = allowing(m, ctx, scores.shape)
    found = torch.zeros_like(scores)
    for b, h, t in ((b, h, t) for b in range(scores.shape[0]) for h in range(scores.shape[1]) for t in range(scores.shape[2])):
        seen = [s for s in range(scores.shape[3]) if allowed[b, h, t, s]]
        if seen:
            row = scores[b, h, t, seen]
            grown = (row - row.max()).exp()
            found[b, h, t, seen] = grown / grown.sum()
    if isinstance(m, GlobalAttention):
        glob(m, x, ctx, found)
    return found


def parted(x: Tensor, heads: int) -> Tensor:
    b, t, w = x.shape
    return x.reshape(b, t, heads, w // heads).permute(0, 2, 1, 3)


def turned(x: Tensor, ctx: Context, spec: Any) -> Tensor:
    """Each pair of numbers turned by position times frequency (Su et al. 2021, eq. 15)."""
    rates, factor = frequencies(spec, int(ctx.positions.index.max()) + 1)
    angle = ctx.positions.index[:, None, :, None] * rates
    half = spec.dims // 2
    first, second = (
        (slice(0, spec.dims, 2), slice(1, spec.dims, 2)) if spec.layout is Layout.PAIRS else (slice(0, half), slice(half, spec.dims))
    )
    out = x.clone()
    a, b = x[..., first], x[..., second]
    out[..., first] = (a * angle.cos() - b * angle.sin()) * factor
    out[..., second] = (b * angle.cos() + a * angle.sin()) * factor
    return out


def latent(m: LatentAttention, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor, float]:
    """Equations 37-44 of arXiv 2412.19437."""
    s = m.spec
    c_q, c_kv = m.q_norm(m.q_down(x)), m.kv_norm(m.kv_down(x))
    q_r = turned(parted(m.q_rope(c_q), s.heads), ctx, m.position.spec)
    k_r = turned(parted(m.k_rope(x), 1), ctx, m.position.spec).expand(-1, s.heads, -1, -1)
    q = torch.cat((parted(m.q_up(c_q), s.heads), q_r), -1)
    return q, torch.cat((parted(m.k_up(c_kv), s.heads), k_r), -1), m.scale


def extra(m: Any, x: Tensor, ctx: Context, q: Tensor, k: Tensor) -> Tensor | float:
    """What is added to the scores: relative positions, or how often a block is counted."""
    where = ctx.positions.index
    if isinstance(m, DisentangledAttention):
        table, rows = m.source[0](), distance(where, where, m.spec)
        out = torch.zeros(q.shape[0], m.heads, q.shape[2], q.shape[2])
        k_r = parted((m.k if m.spec.shared else m.k_position)(table[None]), m.heads)[0] if m.spec.c2p else None
        q_r = parted((m.q if m.spec.shared else m.q_position)(table[None]), m.heads)[0] if m.spec.p2c else None
        for t in range(q.shape[2]):
            for s in range(q.shape[2]):
                if k_r is not None:
                    out[:, :, t, s] += (q[:, :, t] * k_r[:, rows[0, t, s]]).sum(-1)
                if q_r is not None:
                    out[:, :, t, s] += (k[:, :, s] * q_r[:, rows[0, t, s]]).sum(-1)
        return out * m.scale
    if isinstance(m, BlockSparseAttention) and where.shape[1] > (5 + 2 * m.random) * m.block:
        blocks, of = -(-where.shape[1] // m.block), where[0] // m.block
        inner = (of > 0) & (of < blocks - 1)
        return math.log(1 + m.random) * (inner[:, None] & (of == 0)[None]).float()
    bias = m.position.bias(ctx, q.shape[2]) if isinstance(m, Attention) else None
    return 0.0 if bias is None else bias


def allowing(m: Any, ctx: Context, shape: torch.Size) -> Tensor:
    """Which pairs may meet, by the rule of the family's paper."""
    q = ctx.positions.index[0]
    if isinstance(m, CrossAttention):
        return torch.ones(shape, dtype=torch.bool)
    far = q[:, None] - q[None]
    if isinstance(m, BlockSparseAttention):
        if len(q) <= (5 + 2 * m.random) * m.block:
            return torch.ones(shape, dtype=torch.bool)
        of, last = q // m.block, -(-len(q) // m.block) - 1
        near = (of[:, None] - of[None]).abs() <= 1
        ends = ((of == 0) | (of == last)).to(torch.bool)
        return (near | ends[None] | ends[:, None]).expand(shape)
    if isinstance(m, GlobalAttention):
        near = far.abs() < m.mask.size if isinstance(m.mask, Window) else m.mask.allow(q[:, None], q[None])
        chosen = ctx.chosen[0] if isinstance(ctx, GlobalContext) and ctx.chosen is not None else torch.zeros_like(q, dtype=torch.bool)
        return (near | chosen[None]).expand(shape)
    rules = m.mask.masks if isinstance(m.mask, PerHead) else [m.mask]
    return torch.stack([rule.allow(q[:, None], q[None]) for rule in rules]).expand(shape) & (q != PAD)


def glob(m: GlobalAttention, x: Tensor, ctx: Context, found: Tensor) -> None:
    """The rows of the global tokens, which see all through matrices of their own."""
    chosen = ctx.chosen[0] if isinstance(ctx, GlobalContext) and ctx.chosen is not None else None
    if chosen is None:
        return
    q, k = parted(m.q_all(x), m.heads), parted(m.k_all(x), m.heads)
    for t in chosen.nonzero()[:, 0].tolist():
        found[:, :, t] = (torch.einsum("bhe,bhse->bhs", q[:, :, t], k) * m.scale).softmax(-1)
