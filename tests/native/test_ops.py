"""Every other record against torch or a naive loop from its definition."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tests.counts import count
from tests.native.oracle import ISAS, activations, pytestmark, stored  # noqa: F401
from transept import native
from transept.core.errors import ConfigError, InputError

seeds, isas = st.integers(0, 2**32), st.sampled_from(ISAS)


def tokens(t: int) -> native.Batch:
    return native.Batch(np.zeros(t), np.zeros(t), np.arange(t))


@settings(max_examples=count(300), deadline=None)
@given(st.integers(1, 70), st.integers(1, 4), st.integers(1, 5), st.booleans(), st.booleans(), st.booleans(), isas, seeds)
def test_norm(n: int, heads: int, t: int, layer: bool, weighted: bool, biased: bool, isa: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, w, b = activations(rng, t, heads * n) + 1, rng.standard_normal(n).astype(np.float32), rng.standard_normal(n).astype(np.float32)
    p = native.Program(max_rows=t)
    a, y = p.buffer(heads * n), p.buffer(heads * n + 3)
    p.norm(
        a,
        y.columns(2, heads * n),
        native.vector(w) if weighted else None,
        native.vector(b) if biased else None,
        eps=1e-5,
        layer=layer,
        count=heads,
    )
    plan = p.build(native.Team(2), isa)
    plan.view(a)[:] = x
    plan.step(tokens(t))
    rows = torch.from_numpy(x.reshape(t, heads, n)).double()
    tw = torch.from_numpy(w if weighted else np.ones(n, np.float32)).double()
    expected = F.layer_norm(rows, (n,), tw, None, 1e-5) if layer else F.rms_norm(rows, (n,), tw, 1e-5)
    if biased:
        expected = expected + torch.from_numpy(b)
    spread = np.abs(x).max() / (np.sqrt(np.var(x.reshape(t, heads, n), -1).min() + 1e-5)) if layer else 1.0
    assert np.allclose(plan.view(y)[:, 2 : 2 + heads * n], expected.reshape(t, -1), rtol=1e-4, atol=1e-5 + 3e-6 * spread)


@settings(max_examples=count(200), deadline=None)
@given(st.one_of(st.integers(1, 70), st.sampled_from([1023, 1024, 1025, 50257])), st.floats(0, 60), st.booleans(), isas, seeds)
def test_sum_of_exponentials(n: int, spread: float, barred: bool, isa: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = (spread * rng.standard_normal(n)).astype(np.float32)
    if barred:
        x[rng.permutation(n)[: n // 2]] = -np.inf
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRANSEPT_ISA", isa)
        found = native.exp_sum(x, float(x.max()))
    expected = float(torch.from_numpy(x).double().logsumexp(0)) - float(x.max())
    assert np.log(found) == pytest.approx(expected, abs=5e-7)


@settings(max_examples=count(200), deadline=None)
@given(st.integers(1, 3), st.integers(1, 10), st.integers(0, 3), st.integers(0, 5), st.booleans(), st.booleans(), seeds)
def test_rotary(heads: int, half: int, start: int, rest: int, interleaved: bool, tabled: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    head, t = start + 2 * half + rest, 4
    x, inv = rng.standard_normal((t, heads * head)).astype(np.float32), (10000.0 ** (-np.arange(half) / half)).astype(np.float32)
    position = rng.integers(0, 300, t)
    p = native.Program(max_rows=t)
    a, angles = p.buffer(heads * head), p.buffer(2 * half)
    table = np.arange(300, dtype=np.float32)[:, None] * inv
    if tabled:
        p.embed(native.vector(np.concatenate([np.cos(table), np.sin(table)], 1)), angles, source="positions")
    else:
        p.angles(native.vector(inv), angles)
    p.rotary(a, angles, heads=heads, width=2 * half, start=start, interleaved=interleaved)
    plan = p.build(native.Team(2))
    plan.view(a)[:] = x
    plan.step(native.Batch(np.zeros(t), np.zeros(t), position))
    expected = x.reshape(t, heads, head).astype(np.complex128)
    pairs = np.arange(2 * half).reshape(half, 2) if interleaved else np.arange(2 * half).reshape(2, half).T
    turn = np.exp(1j * table[position])[:, None]  # a rotation is a product with a complex number
    z = (x.reshape(t, heads, head)[..., start + pairs[:, 0]] + 1j * x.reshape(t, heads, head)[..., start + pairs[:, 1]]) * turn
    expected[..., start + pairs[:, 0]], expected[..., start + pairs[:, 1]] = z.real, z.imag
    assert np.allclose(plan.view(a), expected.real.reshape(t, -1), atol=1e-4)


@settings(max_examples=count(200), deadline=None)
@given(
    st.sampled_from(["copy", "add", "multiply", "gate", "softcap"]),
    st.sampled_from(["none", "silu", "tanh"]),
    st.integers(1, 20),
    st.integers(1, 4),
    st.booleans(),
    seeds,
)
def test_element(kind: str, act: str, n: int, pieces: int, by_vector: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    t, by_vector = 5, by_vector and kind in ("add", "multiply")
    a, b = rng.standard_normal((2, t, pieces * (n + 2))).astype(np.float32)
    if by_vector:
        b = np.repeat(b[:1], t, 0)
    p = native.Program(max_rows=t)
    va, vb, y = p.buffer(pieces * (n + 2)), p.buffer(pieces * (n + 2)), p.buffer(pieces * n)
    second = None if kind in ("copy", "softcap") else native.vector(b[0]) if by_vector else vb
    p.element(kind, va, y.columns(0, n), second, act=act, alpha=1.5, count=pieces, strides=(n + 2, n + 2, n))
    plan = p.build(native.Team(2))
    plan.view(va)[:], plan.view(vb)[:] = a, b
    plan.step(tokens(t))
    x, z = a.reshape(t, pieces, n + 2)[..., :n], b.reshape(t, pieces, n + 2)[..., :n]
    f = {"none": lambda v: v, "silu": lambda v: v / (1 + np.exp(-v)), "tanh": np.tanh}[act]
    expected = {
        "copy": lambda: 1.5 * f(x),
        "add": lambda: x + 1.5 * z,
        "multiply": lambda: 1.5 * x * z,
        "gate": lambda: f(x) * z,
        "softcap": lambda: 1.5 * np.tanh(x / 1.5),
    }[kind]()
    assert np.allclose(plan.view(y).reshape(t, pieces, n), expected, atol=2e-6, rtol=1e-5)


def naive_route(
    x: np.ndarray, top: int, score: str, bias: np.ndarray, groups: int, keep: int, best_two: bool, normalise: bool
) -> tuple[list[int], np.ndarray]:
    """DeepSeek-V2 and V3's gate for one row, in float64 (V3 report, section 2.1.2; V2, section 2.2)."""
    s = 1 / (1 + np.exp(-x)) if score == "sigmoid" else np.exp(x - x.max()) / np.exp(x - x.max()).sum() if score == "softmax" else x.copy()
    choice = s + bias
    parts = choice.reshape(groups, -1)
    worth = np.sort(parts, 1)[:, -2:].sum(1) if best_two and parts.shape[1] > 1 else parts.max(1)
    kept = np.argsort(-worth, kind="stable")[:keep]
    choice = np.where(np.isin(np.arange(len(x)) // parts.shape[1], kept), choice, -np.inf)
    chosen = np.argsort(-choice, kind="stable")[:top]
    w = s[chosen]
    if score == "softmax_chosen":
        w = np.exp(w - w.max()) / np.exp(w - w.max()).sum()
    return chosen.tolist(), (w / (w.sum() + 1e-20) if normalise else w) * 2.5


@settings(max_examples=count(200), deadline=None)
@given(
    st.sampled_from(["softmax", "sigmoid", "softmax_chosen"]),
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(1, 6),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    seeds,
)
def test_route(score: str, groups: int, per: int, keep: int, top: int, corrected: bool, best_two: bool, normalise: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, keep = groups * per, min(keep, groups)
    top, t = min(top, per * keep), 6
    x, bias = rng.standard_normal((t, n)).astype(np.float32), rng.standard_normal(n).astype(np.float32) * corrected
    p = native.Program(max_rows=t)
    a, y = p.buffer(n), p.buffer(2 * top)
    p.route(
        a,
        y,
        top=top,
        score=score,
        correction=native.vector(bias) if corrected else None,
        groups=groups,
        keep=keep,
        best_two=best_two,
        normalise=normalise,
        scale=2.5,
        eps=1e-20,
    )
    plan = p.build(native.Team(2))
    plan.view(a)[:] = x
    plan.step(tokens(t))
    for row in range(t):
        chosen, weights = naive_route(x[row].astype(np.float64), top, score, bias, groups, keep, best_two, normalise)
        assert plan.view(y)[row, :top].astype(int).tolist() == chosen
        assert np.allclose(plan.view(y)[row, top:], weights, rtol=1e-5)


@pytest.mark.parametrize("kind", ["F32", "Q4_0", "Q8_0"])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("t", [1, 2, 40, 400])
def test_experts(kind: str, int8: bool, t: int) -> None:
    rng = np.random.default_rng(t)
    experts, top, d, ffn = 5, 2, 64, 32
    parts = [[stored(rng, kind, *shape) for shape in ((ffn, d), (ffn, d), (d, ffn))] for _ in range(experts)]
    up = native.pack(*[part for e in parts for part, _ in e[:2]], gated=True)
    down = native.pack(*[e[2][0] for e in parts])
    chosen = np.stack([rng.permutation(experts)[:top] for _ in range(t)])
    weights = rng.uniform(0, 1, (t, top)).astype(np.float32)
    x, res = rng.standard_normal((2, t, d)).astype(np.float32)
    p = native.Program(max_rows=t)
    a, route, r, y = p.buffer(d), p.buffer(2 * top), p.buffer(d), p.buffer(d)
    p.experts(a, route, up, down, y, experts=experts, act="silu", residual=r, int8=int8)
    plan = p.build(native.Team(2))
    plan.view(a)[:], plan.view(route)[:], plan.view(r)[:] = x, np.concatenate([chosen, weights], 1), res
    plan.step(tokens(t))
    out = plan.view(y).copy()
    expected = res.astype(np.float64)
    for row in range(t):
        for e, w in zip(chosen[row], weights[row], strict=True):
            (_, g), (_, u), (_, dn) = parts[e]
            h = x[row] @ g.T
            expected[row] += w * ((h / (1 + np.exp(-h)) * (x[row] @ u.T)) @ dn.T)
    error = np.sqrt(np.mean((out - expected) ** 2) / np.mean(expected**2))
    assert error <= (2e-2 if int8 and kind != "F32" else 1e-6)
    for row in {0, t // 2, t - 1}:  # the same bits alone
        plan.view(a)[:1], plan.view(route)[:1], plan.view(r)[:1] = x[row], np.concatenate([chosen[row], weights[row]]), res[row]
        plan.step(tokens(1))
        assert np.array_equal(plan.view(y)[0], out[row])


@settings(max_examples=count(100), deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 5), st.integers(1, 3), st.integers(0, 2), seeds)
def test_unfold_is_a_convolution(lengths: list[int], kernel: int, stride: int, pad: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    frames = [(n + 2 * pad - kernel) // stride + 1 for n in lengths]
    if min(frames) < 1:
        return
    c, n, t = 5, 7, sum(lengths)
    x, w = rng.standard_normal((t, c)).astype(np.float32), rng.standard_normal((n, c, kernel)).astype(np.float32)
    p = native.Program(max_rows=max(t, sum(frames)))
    a, u, y, mean = p.buffer(c), p.buffer(kernel * c), p.buffer(n), p.buffer(c)
    p.unfold(a, u, kernel=kernel, stride=stride, pad=pad)
    p.linear(u, native.pack(native.raw(w.transpose(0, 2, 1).reshape(n, -1))), y, rows=3)
    p.pool(a, mean)
    plan = p.build(native.Team(2))
    plan.view(a)[:t] = x
    sequence, position = np.repeat(np.arange(len(lengths)), lengths), np.concatenate([np.arange(m) for m in lengths])
    other = np.repeat(np.arange(len(lengths)), frames), np.concatenate([np.arange(m) for m in frames])
    plan.step(native.Batch(None, sequence, position, other=other))
    at, out = 0, 0
    for i, (length, m) in enumerate(zip(lengths, frames, strict=True)):
        own = torch.from_numpy(x[at : at + length])
        expected = F.conv1d(own.T[None], torch.from_numpy(w), stride=stride, padding=pad)[0].T
        assert np.allclose(plan.view(y)[out : out + m], expected, atol=1e-5)
        assert np.allclose(plan.view(mean)[i], own.mean(0), atol=1e-6)
        at, out = at + length, out + m


@pytest.mark.parametrize("kind", ["mean", "max", "first", "last"])
def test_pool_and_gather(kind: str) -> None:
    x = np.random.default_rng(1).standard_normal((9, 4)).astype(np.float32)
    p = native.Program(max_rows=9)
    a, y, g = p.buffer(4), p.buffer(4), p.buffer(4)
    p.pool(a, y, kind=kind)
    p.gather(a, g)
    plan = p.build(native.Team(1))
    plan.view(a)[:] = x
    plan.step(native.Batch(None, [0, 0, 0, 1, 1, 1, 1, 2, 2], range(9), select=[2, 6, 8]))
    parts = [x[:3], x[3:7], x[7:]]
    f = {"mean": lambda v: v.mean(0), "max": lambda v: v.max(0), "first": lambda v: v[0], "last": lambda v: v[-1]}[kind]
    assert np.allclose(plan.view(y, 3), [f(v) for v in parts], atol=1e-6)
    assert np.array_equal(plan.view(g, 3), x[[2, 6, 8]])


def refused(batch: native.Batch, match: str) -> None:
    p = native.Program(max_rows=4)
    x, q, k = p.buffer(32), p.buffer(32), p.buffer(32)
    p.embed(native.vector(np.zeros((10, 32))), x)
    cache = native.Cache(2, 16, pages=3)
    p.append(cache, k, k)
    p.attend(cache, q, x, heads=2, scale=1.0)
    plan = p.build(native.Team(1))
    with pytest.raises(InputError, match=match):
        plan.step(batch)


def test_a_batch_that_does_not_fit_is_refused() -> None:
    t = [[0, 1], [2, -1]]
    refused(native.Batch([1] * 5, [0] * 5, range(5), tables=t), "5 rows does not fit the plan's 4")
    refused(native.Batch([10], [0], [0], tables=t), "looks up 10 in a table of 10")
    refused(native.Batch([-1], [0], [0], tables=t), "looks up -1")
    refused(native.Batch([1], [2], [0], tables=t), "names sequence 2 of 2")
    refused(native.Batch([1], [0], [-1], tables=t), "negative position")
    refused(native.Batch([1], [0], [32], tables=t), "reaches key 32, its page table ends at 32")
    refused(native.Batch([1], [1], [16], tables=t), "has page -1 at place 1, the cache has 3")
    refused(native.Batch([1], [1], [0], tables=[[0], [3]]), "has page 3")
    refused(native.Batch([1], [0], [0]), "no page table")
    refused(native.Batch(None, [0], [0], tables=t), "lacks the numbers")
    with pytest.raises(InputError, match=r"Selected rows 1..1 are not among the step's 1"):
        native.Batch([1], [0], [0], tables=t, select=[1])
    with pytest.raises(InputError, match="1 rows came with 2 ids"):
        native.Batch([1, 2], [0], [0], tables=t)


def test_a_record_that_does_not_fit_is_refused() -> None:
    cache = native.Cache(2, 16, pages=3)

    def build(add) -> None:
        p = native.Program(max_rows=4)
        add(p, p.buffer(32), p.buffer(32))
        p.build(native.Team(1))

    with pytest.raises(ConfigError, match=r"record 0 \(attend\): heads do not divide"):
        build(lambda p, a, b: p.attend(cache, a, b, heads=3, scale=1.0))
    with pytest.raises(ConfigError, match="rotary width"):
        build(lambda p, a, b: p.rotary(a, b, heads=2, width=18))
    with pytest.raises(ConfigError, match="length of a vector is 31, expected 32"):
        build(lambda p, a, b: p.norm(a, b, native.vector(np.zeros(31)), eps=0.0))
    with pytest.raises(ConfigError, match="a float vector stands where a packed weight"):
        build(lambda p, a, b: p.linear(a, native.vector(np.zeros(32)), b))
    with pytest.raises(ConfigError, match="overlaps its input"):
        build(lambda p, a, b: p.linear(a, native.pack(native.raw(np.zeros((16, 16)))), a.columns(8, 16)))
    with pytest.raises(ConfigError, match=r"'gelu_tahn' is unknown.*nearest: 'gelu_tanh'"):
        build(lambda p, a, b: p.linear(a, native.pack(native.raw(np.zeros((16, 16)))), b, act="gelu_tahn"))
    with pytest.raises(ConfigError, match="kept groups hold fewer"):
        build(lambda p, a, b: p.route(a, b, top=9, groups=4, keep=1))


SRC = str(Path(native.__file__).parents[2])


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": SRC, **env}, capture_output=True, text=True, timeout=120
    )


def test_the_core_runs_without_torch_and_can_be_turned_off() -> None:
    done = python("from transept import native; native.Team(1); import sys; print('torch' in sys.modules, native.available())")
    assert done.stdout.split() == ["False", "True"], done.stderr
    done = python("from transept import native; print(native.available(), native.why_not())", TRANSEPT_NATIVE="0")
    assert done.stdout.strip() == "False TRANSEPT_NATIVE=0 turns the native core off"
    done = python("from transept import native; print(native.why_not())", TRANSEPT_NATIVE_LIBRARY="/nowhere/core.so")
    assert "was compiled for this" in done.stdout


def test_an_instruction_set_can_be_forced() -> None:
    show = "from transept import native; print(native.isa())"
    assert [python(show, TRANSEPT_ISA=isa).stdout.strip() for isa in ISAS] == ISAS
    done = python(show + "; native.Program().build(native.Team(1))", TRANSEPT_ISA="mmx")
    assert done.stdout.strip() == "" and "no kernels named mmx" in done.stderr


def test_a_forked_child_is_told() -> None:
    code = (
        "import os; from transept import native; t = native.Team(2); p = native.Program(); a = p.buffer(4); p.pool(a, a)\n"
        "plan = p.build(t); b = native.Batch(None, [0], [0]); plan.step(b)\n"
        "pid = os.fork()\n"
        "if pid == 0:\n    try: plan.step(b)\n    except Exception as e: print(e, flush=True)\n    os._exit(0)\n"
        "os.waitpid(pid, 0)"
    )
    done = python(code)
    assert "forked" in done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.serial
@pytest.mark.timeout(3000)
@pytest.mark.skipif(
    os.environ.get("TRANSEPT_FULL") != "1", reason="compiles the core with sanitisers (about a minute); runs with TRANSEPT_FULL=1"
)
def test_under_the_sanitisers(tmp_path: Path) -> None:
    from transept.native.build import build, compiler

    library = build(tmp_path, sanitize=True)
    asan = subprocess.run([compiler() or "c++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout.strip()
    env = {
        **os.environ,
        "LD_PRELOAD": asan,
        "ASAN_OPTIONS": "detect_leaks=0",
        "TRANSEPT_NATIVE_LIBRARY": str(library),
        "TRANSEPT_FULL": "0",
    }
    files = ["tests/native/test_linear.py", "tests/native/test_ops.py", "tests/native/test_attend.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files],
        env=env,
        capture_output=True,
        text=True,
        timeout=2400,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
