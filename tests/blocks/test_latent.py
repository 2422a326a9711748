"""Latent attention against DeepSeek-V3's equations 37-47, one line at a time (row 82b)."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.counts import count
from transept.blocks.cache import Cache, Dense, Room
from transept.blocks.context import Context
from transept.blocks.latent import LatentAttention, LatentSpec
from transept.blocks.positions import Rotary
from transept.ops.masks import Causal, Positions
from transept.ops.rotary import Layout, RopeSpec

SPEC = LatentSpec(heads=3, q_rank=20, kv_rank=16, nope=8, rope=8, value=12, eps=1e-6)
THETA = 100.0
SCALE = 1 / math.sqrt(SPEC.nope + SPEC.rope)


def made(seed: int) -> LatentAttention:
    torch.manual_seed(seed)
    position = Rotary(RopeSpec(theta=THETA, dims=SPEC.rope, layout=Layout.PAIRS))
    a = LatentAttention(32, SPEC, mask=Causal(), position=position, scale=SCALE)
    with torch.no_grad():
        for name, p in a.named_parameters():
            p.copy_(torch.rand_like(p) + 0.5 if "norm" in name else torch.randn_like(p) / p.shape[-1] ** 0.5)
    return a


def rope(x: Tensor, position: int) -> Tensor:
    """Each neighbouring pair as a complex number, turned by position * theta^(-2i/d)."""
    turn = THETA ** (-torch.arange(0, len(x), 2).double() / len(x))
    return torch.view_as_real(torch.view_as_complex(x.view(-1, 2)) * torch.exp(1j * position * turn)).flatten()


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean() + SPEC.eps).sqrt() * weight


def equations(a: LatentAttention, h: Tensor) -> Tensor:
    """u_t for every t of h [t d], by loops in float64."""
    w = {name: p.detach().double() for name, p in a.named_parameters()}
    s, h = SPEC, h.double()
    queries, keys, values = [], [], []
    for t in range(len(h)):
        c_q = norm(w["q_down.weight"] @ h[t], w["q_norm.weight"])  # 37
        q_c = (w["q_up.weight"] @ c_q).view(s.heads, s.nope)  # 38
        q_r = [rope(x, t) for x in (w["q_rope.weight"] @ c_q).view(s.heads, s.rope)]  # 39
        queries.append([torch.cat((q_c[i], q_r[i])) for i in range(s.heads)])  # 40
        c_kv = norm(w["kv_down.weight"] @ h[t], w["kv_norm.weight"])  # 41
        k_c = (w["k_up.weight"] @ c_kv).view(s.heads, s.nope)  # 42
        k_r = rope(w["k_rope.weight"] @ h[t], t)  # 43
        keys.append([torch.cat((k_c[i], k_r)) for i in range(s.heads)])  # 44
        values.append((w["v_up.weight"] @ c_kv).view(s.heads, s.value))  # 45
    out = []
    for t in range(len(h)):
        o = []
        for i in range(s.heads):
            scores = torch.stack([queries[t][i] @ keys[j][i] for j in range(t + 1)]) / math.sqrt(s.nope + s.rope)
            o.append(sum(p * values[j][i] for j, p in enumerate(scores.softmax(0))))  # 46
        out.append(w["out.weight"] @ torch.cat(o))  # 47
    return torch.stack(out)


def run(a: LatentAttention, x: Tensor, sizes: list[int]) -> tuple[Tensor, Dense]:
    """x in chunks through a cache: the first is expanded, the others are absorbed."""
    slot = a.slot(Room(len(x), 4, x.dtype, x.device))
    cache, outs, start = Cache([{"attn": slot}], len(x)), [], 0
    for size in sizes:
        where = Positions.span(start, size)
        outs.append(a(x[:, start : start + size], Context(where, cache.extend(where), slot=slot)))
        start += size
    assert isinstance(slot, Dense)
    return torch.cat(outs, 1), slot


@settings(max_examples=count(50))
@given(st.integers(0, 2**31), st.integers(1, 9))
def test_line_for_line(seed: int, length: int) -> None:
    a, x = made(seed), torch.randn(1, length, 32, generator=torch.Generator().manual_seed(seed))
    where = Positions.span(0, length)
    torch.testing.assert_close(a(x, Context(where, where))[0].double(), equations(a, x[0]), atol=1e-5, rtol=1e-4)


@settings(max_examples=count(100))
@given(st.integers(0, 2**31), st.lists(st.integers(1, 5), min_size=2, max_size=6))
def test_absorbed_equals_expanded(seed: int, sizes: list[int]) -> None:
    length = sum(sizes)
    a, x = made(seed), torch.randn(2, length, 32, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        where = Positions.span(0, length)
        whole = a(x, Context(where, where))
        parts, _ = run(a, x, sizes)
    assert (whole - parts).abs().max() <= 2e-6 * max(1.0, whole.abs().max().item())


def test_the_cache_holds_the_latent_and_the_rotated_key_and_nothing_else() -> None:
    a, x = made(0), torch.randn(1, 7, 32)
    with torch.no_grad():
        _, slot = run(a, x, [4, 1, 1, 1])
    assert slot.k.shape[1] == slot.v.shape[1] == 1, "one head, whatever the number of query heads"
    assert (slot.k.shape[3], slot.v.shape[3]) == (SPEC.kv_rank, SPEC.rope)
    assert slot.nbytes == slot.k.shape[2] * (SPEC.kv_rank + SPEC.rope) * 4
    w = {name: p.detach().double() for name, p in a.named_parameters()}
    for t in range(7):
        h = x[0, t].double()
        torch.testing.assert_close(slot.k[0, 0, t].double(), norm(w["kv_down.weight"] @ h, w["kv_norm.weight"]), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(slot.v[0, 0, t].double(), rope(w["k_rope.weight"] @ h, t), atol=1e-5, rtol=1e-4)
