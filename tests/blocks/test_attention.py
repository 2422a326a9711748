"""Grouped heads at their two ends, and what each attention keeps per token (rows 15, 82a, 82d)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.counts import count
from transept.blocks.attention import Attention
from transept.blocks.cache import Room
from transept.blocks.context import Context
from transept.blocks.latent import LatentAttention, LatentSpec
from transept.blocks.positions import Rotary
from transept.core.shapes import Float
from transept.core.tap import listening
from transept.ops.masks import Causal, Positions, Window
from transept.ops.rotary import RopeSpec

ROPE = Rotary(RopeSpec(theta=100.0, dims=8))


def call(length: int) -> Context:
    where = Positions.span(0, length)
    return Context(where, where)


def attention(kv_heads: int, seed: int) -> Attention:
    torch.manual_seed(seed)
    made = Attention(32, 4, kv_heads, 8, mask=Causal(), position=ROPE)
    with torch.no_grad():
        for p in made.parameters():
            p.normal_(std=0.4)
    return made


def by_hand(a: Attention, x: Float[Tensor, "b t d"], key_head: list[int]) -> Tensor:
    """One head after another: head h uses the keys and values of head key_head[h]; concatenate, then the output matrix."""
    ctx = call(x.shape[1])
    outs = []
    for h, kv in enumerate(key_head):
        q = (x @ a.q.weight[8 * h : 8 * h + 8].T)[:, None]
        k = (x @ a.k.weight[8 * kv : 8 * kv + 8].T)[:, None]
        v = x @ a.v.weight[8 * kv : 8 * kv + 8].T
        q, k = ROPE(q, k, ctx)
        scores = (q @ k.transpose(-1, -2))[:, 0] / 8**0.5
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
        outs.append(scores.softmax(-1) @ v)
    return torch.cat(outs, -1) @ a.out.weight.T


@settings(max_examples=count(100))
@given(st.integers(0, 2**31), st.sampled_from([1, 2, 4]), st.integers(1, 12))
def test_heads_are_independent_and_concatenated(seed: int, kv_heads: int, length: int) -> None:
    """kv_heads = heads is multi-head attention, kv_heads = 1 is multi-query attention, between them groups share."""
    a = attention(kv_heads, seed)
    x = torch.randn(2, length, 32, generator=torch.Generator().manual_seed(seed))
    key_head = {1: [0, 0, 0, 0], 2: [0, 0, 1, 1], 4: [0, 1, 2, 3]}[kv_heads]
    torch.testing.assert_close(a(x, call(length)), by_hand(a, x, key_head), atol=2e-5, rtol=1e-4)


def test_grouped_heads_equal_full_heads_with_repeated_keys() -> None:
    """GQA is MHA whose key and value heads are copies of one another."""
    few, many = attention(2, 0), attention(4, 1)
    many.load_state_dict({**few.state_dict(), **{f"{n}.weight": _repeated(few.get_parameter(f"{n}.weight"), 2) for n in "kv"}})
    x = torch.randn(2, 9, 32)
    torch.testing.assert_close(few(x, call(9)), many(x, call(9)))


def _repeated(weight: Tensor, times: int) -> Tensor:
    return weight.unflatten(0, (-1, 8)).repeat_interleave(times, 0).flatten(0, 1)


def test_masked_heads_equal_removed_heads() -> None:
    """A listener that zeroes a head changes the output exactly as cutting the head out of the weights does."""

    class Silence:
        def wants(self, owner: object, name: str) -> bool:
            return False

        def hear(self, owner: object, name: str, value: Tensor) -> Tensor:
            if name != "heads":
                return value
            value = value.clone()
            value[:, 2] = 0
            return value

    a, x = attention(4, 3), torch.randn(1, 6, 32)
    cut = Attention(32, 3, 3, 8, mask=Causal(), position=ROPE)
    keep = [i for i in range(32) if i // 8 != 2]
    with torch.no_grad():
        for n in "qkv":
            cut.get_parameter(f"{n}.weight").copy_(a.get_parameter(f"{n}.weight")[keep])
        cut.out.weight.copy_(a.out.weight[:, keep])
    with listening(Silence()):
        masked = a(x, call(6))
    torch.testing.assert_close(masked, cut(x, call(6)))


SIZES = {"mha": 4, "gqa": 2, "mqa": 1}


@pytest.mark.parametrize("name", SIZES)
def test_bytes_per_token_of_heads(name: str) -> None:
    """2 x kv_heads x head_dim numbers per token and layer."""
    a = attention(SIZES[name], 0)
    slot = a.slot(Room(1, 100, torch.float32, torch.device("cpu")))
    assert slot.nbytes == 100 * 2 * SIZES[name] * 8 * 4


def test_bytes_per_token_at_deepseek_v3_s_size() -> None:
    """The table of the paper's idea: what 128 heads of 128 keep per token and layer, in 2-byte numbers."""
    spec = LatentSpec(heads=128, q_rank=1536, kv_rank=512, nope=128, rope=64, value=128, eps=1e-6)
    room = Room(1, 1000, torch.bfloat16, torch.device("meta"))
    with torch.device("meta"):
        latent = LatentAttention(7168, spec, mask=Causal(), position=ROPE, scale=1.0).slot(room).nbytes / 1000
        mha, gqa, mqa = (Attention(7168, 128, kv, 128, mask=Causal()).slot(room).nbytes / 1000 for kv in (128, 8, 1))
    assert (latent, mha, gqa, mqa) == (1152, 65536, 4096, 512)


def test_a_window_keeps_no_more_than_it_can_see() -> None:
    a = Attention(32, 4, 4, 8, mask=Causal() & Window(5))
    slot = a.slot(Room(1, 100, torch.float32, torch.device("cpu")))
    for step in range(40):
        k = torch.zeros(1, 4, 1, 8)
        slot.append(k, k, Positions.span(step, 1))
        assert slot.nbytes <= 5 * 2 * 4 * 8 * 4
