"""Rotary positions: relative by construction, in both layouts, and the layouts are one another's permutation (row 36)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.counts import count
from transept.mapping import Unpair
from transept.ops.rotary import Layout, Linear, Llama3, RopeSpec, Scaling, Yarn, angles, frequencies, rotate

EXAMPLES = settings(max_examples=count(300))
LAYOUTS = st.sampled_from(list(Layout))
SCALINGS: list[Scaling | None] = [
    None,
    Linear(factor=4.0),
    Llama3(factor=8.0, low=1.0, high=4.0, context=64),
    Yarn(factor=4.0, context=64, attention=1.2),
]


def at(x: Tensor, position: int, spec: RopeSpec) -> Tensor:
    """x [e] turned as at that position, in float64."""
    cos, sin = angles(torch.tensor([[position]]), spec, 1, torch.float64)
    return rotate(x.double()[None, None, None], cos, sin, spec.layout).flatten()


@EXAMPLES
@given(
    seed=st.integers(0, 2**31),
    layout=LAYOUTS,
    scaling=st.sampled_from(SCALINGS),
    m=st.integers(0, 500),
    n=st.integers(0, 500),
    shift=st.integers(0, 500),
    part=st.booleans(),
)
def test_a_score_depends_on_the_difference_of_positions_only(
    seed: int, layout: Layout, scaling: Scaling | None, m: int, n: int, shift: int, part: bool
) -> None:
    spec = RopeSpec(theta=10000.0, dims=8 if part else 16, layout=layout, scaling=scaling)
    q, k = torch.randn(2, 16, generator=torch.Generator().manual_seed(seed))
    here = at(q, m, spec) @ at(k, n, spec)
    there = at(q, m + shift, spec) @ at(k, n + shift, spec)
    # angles are computed in float32: at position 1000 they are good to about 6e-5
    assert abs(here - there) < 2e-3
    if scaling is None:
        assert abs(at(q, m, spec).norm() - q.norm()) < 1e-4, "a rotation keeps lengths"


@EXAMPLES
@given(st.integers(0, 2**31), st.integers(0, 200))
def test_halves_after_unpairing_equal_pairs(seed: int, position: int) -> None:
    """Permuting the rows of W_q and W_k takes one layout to the other: the rotated heads hold the same numbers, and scores are equal."""
    heads, e = 3, 16
    g = torch.Generator().manual_seed(seed)
    x, w_q, w_k = torch.randn(5, generator=g), torch.randn(heads * e, 5, generator=g), torch.randn(heads * e, 5, generator=g)
    move = Unpair(lambda s: heads)
    (q_native,) = move.load([w_q], None)
    (k_native,) = move.load([w_k], None)
    for h in range(heads):
        rows = slice(h * e, (h + 1) * e)
        pairs = RopeSpec(theta=100.0, dims=e, layout=Layout.PAIRS)
        halves = pairs.replace(layout=Layout.HALVES)
        a = at(w_q[rows] @ x, position, pairs)
        b = at(q_native[rows] @ x, position, halves)
        torch.testing.assert_close(torch.cat((a[0::2], a[1::2])), b)
        torch.testing.assert_close(a @ at(w_k[rows] @ x, 3, pairs), b @ at(k_native[rows] @ x, 3, halves))


@EXAMPLES
@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 8))
def test_the_conversion_of_layouts_goes_round(seed: int, heads: int, pairs: int) -> None:
    w = torch.randn(heads * pairs * 2, 7, generator=torch.Generator().manual_seed(seed))
    move = Unpair(lambda s: heads)
    assert torch.equal(move.save(move.load([w], None), None)[0], w)
    assert torch.equal(move.load(move.save([w], None), None)[0], w)
    if pairs > 1:
        assert not torch.equal(move.load([w], None)[0], w)


def test_by_complex_numbers() -> None:
    """RoFormer's own definition: the pair (x_2i, x_2i+1) as a complex number times exp(i m theta_i)."""
    spec = RopeSpec(theta=10000.0, dims=8, layout=Layout.PAIRS)
    x = torch.randn(8)
    theta = 10000.0 ** (-2 * torch.arange(4) / 8)
    expected = torch.view_as_real(torch.view_as_complex(x.view(4, 2)) * torch.exp(1j * 7 * theta)).flatten()
    torch.testing.assert_close(at(x, 7, spec).float(), expected)


def test_linear_scaling_is_a_finer_ruler() -> None:
    plain = RopeSpec(theta=10000.0, dims=8)
    x = torch.randn(8)
    torch.testing.assert_close(at(x, 12, plain.replace(scaling=Linear(factor=4.0))), at(x, 3, plain))


@pytest.mark.parametrize("scaling", [s for s in SCALINGS if s is not None])
def test_scalings_slow_the_slow_turns_and_keep_the_order(scaling: Scaling) -> None:
    plain, _ = frequencies(RopeSpec(theta=10000.0, dims=32), 1)
    scaled, _ = frequencies(RopeSpec(theta=10000.0, dims=32, scaling=scaling), 1)
    assert scaled[-1] < plain[-1]
    assert (scaled <= plain * (1 + 1e-6)).all() and (scaled.diff() < 0).all()
