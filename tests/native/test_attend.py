"""Attention over paged caches against torch's scaled_dot_product_attention in float64, and its bits against themselves in other company."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tests.counts import count
from tests.native.oracle import ISAS, pytestmark  # noqa: F401
from transept import native

TOLERANCE = {"F32": 2e-6, "F16": 1e-3, "Q8": 1.5e-2}


class House:
    """One attention layer with its cache: tokens come in steps of any shape, the oracle sees each sequence whole."""

    def __init__(
        self,
        rng,
        kv_heads,
        group,
        head,
        vhead,
        kind="F32",
        latent=False,
        left=-1,
        right=0,
        cap=0.0,
        biased=False,
        isa="",
        threads=2,
        pages=64,
    ):
        self.rng, self.heads, self.kv_heads, self.head, self.vhead = rng, kv_heads * group, kv_heads, head, vhead
        self.left, self.right, self.cap, self.scale, self.latent = left, right, cap, head**-0.5, latent
        self.cache = native.Cache(kv_heads, head, pages, vhead=vhead, kind=kind, latent=latent)
        self.cache.data[:] = 255  # NaN in every number: nothing unwritten may be read
        self.bias = rng.standard_normal((self.heads, 40)).astype(np.float32) if biased else None
        self.max_rows = 512
        self.build(threads, isa)

    def build(self, threads: int, isa: str = "") -> None:
        p = native.Program(max_rows=self.max_rows)
        self.q, self.k, self.v = (
            p.buffer(self.heads * self.head),
            p.buffer(self.kv_heads * self.head),
            p.buffer(max(1, self.kv_heads * self.vhead)),
        )
        self.y = p.buffer(self.heads * self.vhead)
        if self.latent:
            p.append(
                self.cache,
                self.k.columns(0, self.vhead),
                self.k.columns(self.vhead, self.head - self.vhead) if self.head > self.vhead else None,
            )
        else:
            p.append(self.cache, self.k, self.v)
        p.attend(
            self.cache,
            self.q,
            self.y,
            heads=self.heads,
            scale=self.scale,
            left=self.left,
            right=self.right,
            cap=self.cap,
            bias=None if self.bias is None else native.vector(self.bias),
            bias_zero=30,
        )
        self.plan = p.build(native.Team(threads), isa)

    def step(self, q, k, v, sequence, position, tables, lengths=None) -> np.ndarray:
        for view, values in ((self.q, q), (self.k, k), (self.v, v)):
            self.plan.view(view, len(q))[:] = values
        self.plan.step(native.Batch(None, sequence, position, tables=tables, lengths=lengths))
        return self.plan.view(self.y, len(q)).copy()

    def tokens(self, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        q, k = (self.rng.standard_normal((n, h * self.head)).astype(np.float32) for h in (self.heads, self.kv_heads))
        v = self.rng.standard_normal((n, self.kv_heads * self.vhead)).astype(np.float32)
        return q, k, v

    def oracle(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        t = len(q)
        tq = torch.from_numpy(q).double().view(t, self.heads, self.head).transpose(0, 1)
        tk = (
            torch.from_numpy(k).double().view(t, self.kv_heads, self.head).transpose(0, 1).repeat_interleave(self.heads // self.kv_heads, 0)
        )
        tv = tk[..., : self.vhead] if self.latent else torch.from_numpy(v).double().view(t, self.kv_heads, self.vhead).transpose(0, 1)
        if not self.latent:
            tv = tv.repeat_interleave(self.heads // self.kv_heads, 0)
        i, j = torch.arange(t)[:, None], torch.arange(t)[None]
        seen = torch.ones(t, t, dtype=torch.bool)
        if self.left >= 0:
            seen &= j >= i - self.left
        if self.right >= 0:
            seen &= j <= i + self.right
        if self.cap:
            s = torch.tanh(tq @ tk.transpose(1, 2) * self.scale / self.cap) * self.cap
            y = torch.softmax(s.masked_fill(~seen, -torch.inf), -1) @ tv
        else:
            mask = torch.zeros(self.heads, t, t, dtype=torch.float64).masked_fill(~seen, -torch.inf)
            if self.bias is not None:
                mask = mask + torch.from_numpy(self.bias).double()[:, (j - i + 30).clamp(0, 39)]
            y = F.scaled_dot_product_attention(tq, tk, tv, attn_mask=mask, scale=self.scale)
        return y.transpose(0, 1).reshape(t, -1).numpy()


@settings(max_examples=count(300), deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 5),
    st.sampled_from([8, 16, 20, 64]),
    st.sampled_from([8, 16, 24]),
    st.sampled_from(list(TOLERANCE)),
    st.lists(st.integers(1, 60), min_size=1, max_size=3),
    st.sampled_from([-1, 0, 5, 20]),
    st.sampled_from(["none", "cap", "bias"]),
    st.sampled_from(ISAS),
    st.integers(0, 2**32),
)
def test_steps_of_any_shape_equal_whole_sequences(kv_heads, group, head, vhead, kind, lengths, left, extra, isa, seed) -> None:
    rng = np.random.default_rng(seed)
    house = House(rng, kv_heads, group, head, vhead, kind, left=left, cap=3.0 * (extra == "cap"), biased=extra == "bias", isa=isa)
    data = [house.tokens(n) for n in lengths]
    pages = rng.permutation(64)[: 4 * len(lengths)].reshape(len(lengths), 4)
    done, out = [0] * len(lengths), [np.zeros((n, house.heads * vhead)) for n in lengths]
    while any(d < n for d, n in zip(done, lengths, strict=True)):
        take = [min(n - d, int(rng.integers(0, 30))) for d, n in zip(done, lengths, strict=True)]
        rows = [(s, d + i) for s, (d, m) in enumerate(zip(done, take, strict=True)) for i in range(m)]
        if not rows:
            continue
        q, k, v = (np.concatenate([data[s][part][d : d + m] for s, (d, m) in enumerate(zip(done, take, strict=True))]) for part in range(3))
        y, at = house.step(q, k, v, [s for s, _ in rows], [p for _, p in rows], pages), 0
        for s, m in enumerate(take):
            out[s][done[s] : done[s] + m] = y[at : at + m]
            at, done[s] = at + m, done[s] + m
    for s, parts in enumerate(data):
        expected = house.oracle(*parts)
        assert np.allclose(out[s], expected, atol=TOLERANCE[kind] * (1 + np.abs(expected).max()) * 3)


@pytest.mark.parametrize("kind", list(TOLERANCE))
@pytest.mark.parametrize(("heads", "head", "latent"), [(3, 40, 32), (40, 72, 64), (2, 16, 16)])
def test_latent_attention_shares_one_vector_per_token(kind: str, heads: int, head: int, latent: int) -> None:
    house = House(np.random.default_rng(heads), 1, heads, head, latent, kind, latent=True)
    q, k, v = house.tokens(50)
    y = np.concatenate(
        [house.step(q[a:b], k[a:b], v[a:b], [0] * (b - a), range(a, b), [[9, 1, 4, 7]]) for a, b in ((0, 33), (33, 34), (34, 50))]
    )
    assert np.allclose(y, house.oracle(q, k, v), atol=TOLERANCE[kind] * 8)


@pytest.mark.parametrize(("left", "right"), [(-1, -1), (4, 4), (-1, 2)])
def test_both_ways_within_the_length(left: int, right: int) -> None:
    house = House(np.random.default_rng(2), 2, 2, 16, 16, left=left, right=right)
    a, b = house.tokens(37), house.tokens(20)
    y = house.step(
        *(np.concatenate([u, w]) for u, w in zip(a, b, strict=True)),
        [0] * 37 + [1] * 20,
        [*range(37), *range(20)],
        [[5, 6, 7], [2, 3, 0]],
        lengths=[37, 20],
    )
    assert np.allclose(y[:37], house.oracle(*a), atol=1e-5) and np.allclose(y[37:], house.oracle(*b), atol=1e-5)


def test_memory_of_another_length_through_the_second_space() -> None:
    rng, heads, head = np.random.default_rng(4), 3, 16
    cache = native.Cache(heads, head, 8, space=1)
    p = native.Program(max_rows=64)
    k, v = p.buffer(heads * head), p.buffer(heads * head)
    p.append(cache, k, v)
    fill = p.build(native.Team(1))
    p = native.Program(max_rows=64)
    q, y = p.buffer(heads * head), p.buffer(heads * head)
    p.attend(cache, q, y, heads=heads, scale=0.25, right=-1)
    cross = p.build(native.Team(2))
    memory, queries = (
        rng.standard_normal((2, 45, heads * head)).astype(np.float32),
        rng.standard_normal((3, heads * head)).astype(np.float32),
    )
    fill.view(k, 45)[:], fill.view(v, 45)[:] = memory
    tables = [[3, 1, 2], [0, 7, 6]]
    fill.step(native.Batch(None, [0] * 25 + [1] * 20, [*range(25), *range(20)], memory_tables=tables))
    cross.view(q, 3)[:] = queries
    cross.step(native.Batch(None, [0, 1, 1], [100, 0, 1], memory_tables=tables, memory_lengths=[25, 20]))
    for row, (a, b) in enumerate([(0, 25), (25, 45), (25, 45)]):
        tq, tk, tv = (
            torch.from_numpy(x).double().view(-1, heads, head).transpose(0, 1) for x in (queries[row], memory[0, a:b], memory[1, a:b])
        )
        expected = F.scaled_dot_product_attention(tq, tk, tv, scale=0.25).transpose(0, 1).reshape(-1)
        assert np.allclose(cross.view(y, 3)[row], expected, atol=1e-5)


@pytest.mark.parametrize("kind", list(TOLERANCE))
@pytest.mark.parametrize(("kv_heads", "group", "latent", "left"), [(3, 3, False, -1), (1, 4, False, 300), (1, 40, True, -1)])
def test_bits_do_not_depend_on_company_chunking_pages_or_threads(kind: str, kv_heads: int, group: int, latent: bool, left: int) -> None:
    n, head = 700, 32  # three chunks of keys
    house = House(np.random.default_rng(6), kv_heads, group, head, 16, kind, latent=latent, left=left, pages=128)
    q, k, v = house.tokens(n)
    table = np.arange(50)[None]

    def run(cuts: list[int], table: np.ndarray, threads: int) -> np.ndarray:
        house.build(threads)
        house.cache.data[:] = 255
        return np.concatenate(
            [house.step(q[a:b], k[a:b], v[a:b], [0] * (b - a), range(a, b), table) for a, b in zip(cuts, cuts[1:], strict=False)]
        )

    whole = run([0, 350, 700], table, 2)
    assert np.allclose(whole, house.oracle(q, k, v), atol=TOLERANCE[kind] * 8)
    assert np.array_equal(run([0, 500, *range(501, 520), 522, 600, 695, *range(696, 701)], table[:, ::-1], 3), whole)
    assert np.array_equal(run([0, 257, 258, 290, 512, 699, 700], table, 1), whole)
    house.build(2)
    other = house.tokens(30)
    house.step(*other, [0] * 30, range(30), [[100, 101]])
    last = [np.concatenate([a[29:30], b[699:]]) for a, b in zip(other, (q, k, v), strict=True)]
    tables = np.full((2, 50), -1)
    tables[0, :2], tables[1] = (100, 101), table
    assert np.array_equal(house.step(*last, [0, 1], [29, 699], tables)[1], whole[699])


def test_pages_behind_the_window_may_be_gone() -> None:
    house = House(np.random.default_rng(8), 2, 2, 16, 16, left=19)
    q, k, v = house.tokens(100)
    table = np.arange(7)[None]
    y = house.step(q[:99], k[:99], v[:99], [0] * 99, range(99), table)
    gone = table.copy()
    gone[0, :4] = -1
    house.cache.data[:4] = 255
    y = np.concatenate([y, house.step(q[99:], k[99:], v[99:], [0], [99], gone)])
    assert np.allclose(y, house.oracle(q, k, v), atol=1e-5)
