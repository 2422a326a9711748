"""Weights as stored times activations, against the gguf package's numbers and a float64 product."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.counts import count
from tests.native.oracle import FLOATS, ISAS, QUANTS, activations, block, pytestmark, quantised, stored  # noqa: F401
from transept import native
from transept.core.errors import ConfigError


def product(x: np.ndarray, weight: native.Weight, n: int, threads: int = 2, isa: str = "", **options: object) -> np.ndarray:
    """One linear record run for the rows of x."""
    p = native.Program(max_rows=max(1, len(x)))
    a, y = p.buffer(x.shape[1]), p.buffer(n)
    p.linear(a, weight, y, **options)  # pyright: ignore[reportArgumentType]
    plan = p.build(native.Team(threads), isa)
    plan.view(a)[:] = x
    plan.step(native.Batch(None, np.zeros(len(x)), np.arange(len(x))))
    return plan.view(y).copy()


def scale_of(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """What relative errors are relative to: the size of the terms that each output sums."""
    return np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(w, axis=1)[None] + 1e-30


@settings(max_examples=count(300), deadline=None)
@given(
    st.sampled_from(FLOATS + QUANTS),
    st.integers(1, 70),
    st.integers(1, 9),
    st.integers(1, 40),
    st.sampled_from(ISAS),
    st.integers(0, 2**32),
)
def test_float_activations_equal_the_exact_product(kind: str, n: int, blocks: int, t: int, isa: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    k = blocks * block(kind) if kind in QUANTS else blocks * 23
    packed, w = stored(rng, kind, n, k)
    x = activations(rng, t, k)
    y = product(x, native.pack(packed), n, isa=isa)
    assert np.max(np.abs(y - x.astype(np.float64) @ w.T) / scale_of(x, w)) <= 1e-6


@settings(max_examples=count(300), deadline=None)
@given(st.sampled_from(QUANTS), st.integers(1, 70), st.integers(1, 9), st.integers(1, 40), st.sampled_from(ISAS), st.integers(0, 2**32))
def test_int8_activations_equal_the_product_of_the_quantised_rows(kind: str, n: int, blocks: int, t: int, isa: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    k = blocks * block(kind)
    packed, w = stored(rng, kind, n, k)
    x = activations(rng, t, k)
    y, exact = product(x, native.pack(packed), n, isa=isa, int8=True), x.astype(np.float64) @ w.T
    ties = np.abs(x).max(1)[:, None] * 1e-6 * np.abs(w).sum(1)  # a value on the edge of two steps may fall to either side
    step = np.repeat(np.abs(np.pad(x, ((0, 0), (0, -k % 32)))).reshape(t, -1, 32).max(-1) / 127, 32, axis=1)[:, :k]
    assert np.all(np.abs(y - exact) <= 0.5001 * step @ np.abs(w).T + 1e-6 * scale_of(x, w))
    off = np.abs(y - quantised(x) @ w.T) > 2e-6 * scale_of(x, w) + ties
    assert off.mean() <= 0.02


@pytest.mark.parametrize("kind", FLOATS + QUANTS)
@pytest.mark.parametrize("int8", [False, True])
def test_a_row_has_the_same_bits_alone_and_among_others(kind: str, int8: bool) -> None:
    rng = np.random.default_rng(3)
    k, n, t = 512, 200, 133
    packed, _ = stored(rng, kind, n, k)
    x, weight = activations(rng, t, k), native.pack(packed)
    whole = product(x, weight, n, int8=int8)
    for threads in (1, 3):
        assert np.array_equal(product(x, weight, n, threads, int8=int8), whole)
    for first, last in [(0, 1), (5, 7), (10, 13), (20, 24), (40, 45), (60, 71), (100, 133)]:
        assert np.array_equal(product(x[first:last], weight, n, int8=int8), whole[first:last])


def act(name: str, x: np.ndarray) -> np.ndarray:
    import torch
    from torch.nn import functional as f

    table = {
        "none": lambda v: v,
        "silu": f.silu,
        "gelu": f.gelu,
        "gelu_tanh": lambda v: f.gelu(v, approximate="tanh"),
        "relu": f.relu,
        "quick_gelu": lambda v: v * torch.sigmoid(1.702 * v),
        "relu2": lambda v: f.relu(v) ** 2,
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
    }
    return table[name](torch.from_numpy(x)).numpy()


@settings(max_examples=count(200), deadline=None)
@given(
    st.sampled_from(["none", "silu", "gelu", "gelu_tanh", "relu", "quick_gelu", "relu2", "sigmoid", "tanh"]),
    st.integers(1, 50),
    st.integers(1, 9),
    st.booleans(),
    st.booleans(),
    st.floats(-2, 2),
    st.sampled_from(ISAS),
    st.integers(0, 2**32),
)
def test_epilogue(name: str, n: int, t: int, biased: bool, residual: bool, alpha: float, isa: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    k = 40
    packed, w = stored(rng, "F32", n, k)
    x, bias, res = (
        rng.standard_normal((t, k), np.float32) * 3,
        rng.standard_normal(n).astype(np.float32),
        rng.standard_normal((t, n)).astype(np.float32),
    )
    p = native.Program(max_rows=t)
    a, y, r = p.buffer(k), p.buffer(n + 7), p.buffer(n)
    p.linear(
        a,
        native.pack(packed),
        y.columns(3, n),
        bias=native.vector(bias) if biased else None,
        act=name,
        residual=r if residual else None,
        alpha=alpha,
    )
    plan = p.build(native.Team(2), isa)
    plan.view(a)[:], plan.view(r)[:], plan.view(y)[:] = x, res, 7
    plan.step(native.Batch(None, np.zeros(t), np.arange(t)))
    expected = act(name, x.astype(np.float64) @ w.T + (bias if biased else 0)) * np.float32(alpha) + (res if residual else 0)
    assert np.allclose(plan.view(y)[:, 3 : n + 3], expected, atol=1e-5, rtol=1e-5)
    assert np.all(plan.view(y)[:, :3] == 7) and np.all(plan.view(y)[:, n + 3 :] == 7)


@settings(max_examples=count(100), deadline=None)
@given(st.sampled_from(FLOATS + QUANTS), st.integers(1, 5), st.integers(1, 20), st.booleans(), st.integers(0, 2**32))
def test_gated(kind: str, panels: int, t: int, biased: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    k, n = 256, 16 * panels
    (gate, wg), (up, wu) = stored(rng, kind, n, k), stored(rng, kind, n, k)
    x, bg, bu = rng.standard_normal((t, k), np.float32), *rng.standard_normal((2, n)).astype(np.float32)
    bias = native.gated_bias(bg, bu) if biased else None
    y = product(x, native.pack(gate, up, gated=True), n, act="silu", gated=True, bias=bias)
    g, u = x @ wg.T + (bg if biased else 0), x @ wu.T + (bu if biased else 0)
    assert np.allclose(y, act("silu", g) * u, atol=1e-4 * np.abs(g).max() * np.abs(u).max())


@pytest.mark.parametrize("int8", [False, True])
def test_groups_and_stacks(int8: bool) -> None:
    rng = np.random.default_rng(5)
    g, k, n, t = 3, 64, 32, 9
    parts = [stored(rng, "Q8_0", n, k) for _ in range(g)]
    x = activations(rng, t, g * 80)
    weight = native.pack(*[part for part, _ in parts])
    y = product(x, weight, g * 40, groups=g, group_in=80, group_out=40, int8=int8)
    for i, (_, w) in enumerate(parts):
        own = x[:, i * 80 : i * 80 + k]
        assert np.max(np.abs(y[:, i * 40 : i * 40 + n] - own.astype(np.float64) @ w.T) / scale_of(own, w)) <= (5e-3 if int8 else 1e-6)
        assert np.all(y[:, i * 40 + n : (i + 1) * 40] == 0)
    stacked = product(x[:, :k], weight, g * n, int8=int8)
    for i, (part, _) in enumerate(parts):
        assert np.array_equal(stacked[:, i * n : (i + 1) * n], product(x[:, :k], native.pack(part), n, int8=int8))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("int8", [False, True])
def test_a_poisoned_row_shows_and_leaves_the_others_alone(bad: float, int8: bool) -> None:
    rng = np.random.default_rng(6)
    packed, _ = stored(rng, "Q4_0", 48, 96)
    x = activations(rng, 7, 96)
    weight = native.pack(packed)
    clean = product(x, weight, 48, int8=int8)
    x[3, 40] = bad
    y = product(x, weight, 48, int8=int8)
    assert not np.isfinite(y[3]).any() if int8 else not np.isfinite(y[3]).all()
    assert np.array_equal(np.delete(y, 3, 0), np.delete(clean, 3, 0))


def test_zero_and_tiny_rows() -> None:
    packed, w = stored(np.random.default_rng(7), "Q4_0", 16, 64)
    x = np.stack([np.zeros(64), np.full(64, 1e-42), np.full(64, 1e-30)]).astype(np.float32)
    y = product(x, native.pack(packed), 16, int8=True)
    assert np.all(y[0] == 0) and np.all(np.abs(y[1]) < 1e-38)
    assert np.allclose(y[2], x[2] @ w.T, rtol=0.02, atol=1e-31)


@pytest.mark.parametrize("kind", FLOATS + QUANTS)
def test_embedding_reads_the_rows_of_any_kind(kind: str) -> None:
    rng = np.random.default_rng(8)
    packed, w = stored(rng, kind, 37, 256)
    p = native.Program(max_rows=8)
    y = p.buffer(256)
    p.embed(native.pack(packed), y, scale=2.0)
    p.embed(native.vector(np.arange(512 * 256).reshape(512, 256)), y, source="positions", offset=2, add=True)
    plan = p.build(native.Team(1))
    ids = [0, 36, 15, 16, 17]
    plan.step(native.Batch(ids, np.zeros(5), np.arange(5)))
    expected = np.float32(2) * w[ids].astype(np.float32) + np.arange(512 * 256, dtype=np.float32).reshape(512, 256)[2:7]
    assert np.allclose(plan.view(y, 5), expected, rtol=1e-6)


def test_wrong_weights_are_refused() -> None:
    with pytest.raises(ConfigError, match="Q4_9"):
        native.raw(np.zeros((4, 18), np.uint8), "Q4_9", 32)
    with pytest.raises(ConfigError, match="bytes"):
        native.raw(np.zeros((4, 17), np.uint8), "Q4_0", 32)
    with pytest.raises(ConfigError, match="rows of 40"):
        native.packed_bytes("Q4_0", 16, 40)
    four, five = native.raw(np.zeros((20, 18), np.uint8), "Q4_0", 32), native.raw(np.zeros((20, 22), np.uint8), "Q5_0", 32)
    with pytest.raises(ConfigError, match="agree"):
        native.pack(four, five)
    with pytest.raises(ConfigError, match="multiples of 16"):
        native.pack(four, four)
    p = native.Program()
    a, y = p.buffer(31), p.buffer(20)
    p.linear(a, native.pack(four), y)
    with pytest.raises(ConfigError, match=r"record 0 \(linear\): linear input needs columns 0..32 of a buffer of 31"):
        p.build(native.Team(1))
