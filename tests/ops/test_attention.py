"""Attention: the fused path, the reference, torch's own, and the formulas of the lectures (rows 12-15, 17)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.counts import count
from transept.ops.attention import attend, reference, weights
from transept.ops.masks import Bound, Causal, Full, Global, Mask, Positions, Window

EXAMPLES = settings(max_examples=count(300))
MASKS: list[Mask] = [
    Full(),
    Causal(),
    Window(3),
    Causal() & Window(1),
    Causal() & Window(4),
    Causal() & (Window(2) | Global((0,))),
    Window(2) | Global((1, 3)),
]


def bound(mask: Mask, t: int, s: int | None = None, padded: Tensor | None = None) -> Bound:
    """The mask over t queries that are the last of s keys; `padded` [b s] is True at real tokens."""
    s = t if s is None else s
    if padded is not None:
        k = Positions.of(padded)
        return Bound(mask, Positions(k.index[:, s - t :], None), k)
    return Bound(mask, Positions.span(s - t, t), Positions.span(0, s))


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def calls(draw_from: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Bound, float, Tensor | None]:
    kv = draw_from(st.integers(1, 3))
    heads = kv * draw_from(st.integers(1, 3))
    b, t, e, f = (draw_from(st.integers(1, n)) for n in (3, 9, 12, 12))
    s = t + draw_from(st.integers(0, 7))
    seed = draw_from(st.integers(0, 2**31))
    padded = draw(seed, b, s) > -0.5 if draw_from(st.booleans()) else None
    bias = draw(seed + 1, 1, heads, t, s) if draw_from(st.booleans()) else None
    where = bound(draw_from(st.sampled_from(MASKS)), t, s, padded)
    return (
        draw(seed + 2, b, heads, t, e),
        draw(seed + 3, b, kv, s, e),
        draw(seed + 4, b, kv, s, f),
        where,
        draw_from(st.floats(0.1, 2)),
        bias,
    )


@EXAMPLES
@given(calls())
def test_the_fused_path_equals_the_reference(call: tuple[Tensor, Tensor, Tensor, Bound, float, Tensor | None]) -> None:
    q, k, v, mask, scale, bias = call
    expected = reference(q, k, v, mask=mask, scale=scale, bias=bias)
    torch.testing.assert_close(attend(q, k, v, mask=mask, scale=scale, bias=bias), expected, atol=3e-6, rtol=1e-5)


@EXAMPLES
@given(calls())
def test_weights_sum_to_one_or_zero_and_never_leave_the_mask(call: tuple[Tensor, Tensor, Tensor, Bound, float, Tensor | None]) -> None:
    q, k, _, mask, scale, bias = call
    w = weights(q, k, mask=mask, scale=scale, bias=bias)
    allowed = mask.dense.expand(len(q), 1, *w.shape[2:])
    assert (w[~allowed.expand_as(w)] == 0).all()
    total = w.sum(-1)
    seen = allowed.any(-1).expand_as(total)
    assert (total[~seen] == 0).all()
    torch.testing.assert_close(total[seen], torch.ones_like(total[seen]))


def test_a_query_that_may_attend_to_nothing_gets_zeros() -> None:
    q, k, v = draw(0, 2, 2, 3, 8), draw(1, 2, 2, 3, 8), draw(2, 2, 2, 3, 8)
    padded = torch.tensor([[True, True, True], [False, False, False]])
    for bias in (None, torch.ones(1, 2, 3, 3)):
        y = attend(q, k, v, mask=bound(Causal(), 3, padded=padded), scale=1.0, bias=bias)
        assert (y[1] == 0).all() and (y[0] != 0).all() and torch.isfinite(y).all()


def test_equal_to_torch_s_own_call() -> None:
    q, k, v = draw(0, 2, 4, 7, 16), draw(1, 2, 4, 7, 16), draw(2, 2, 4, 7, 16)
    for mask, options in ((Full(), {}), (Causal(), {"is_causal": True}), (Window(2), {"attn_mask": bound(Window(2), 7).dense})):
        expected = F.scaled_dot_product_attention(q, k, v, **options)
        torch.testing.assert_close(reference(q, k, v, mask=bound(mask, 7), scale=16**-0.5), expected)


def test_equal_to_torch_s_multi_head_attention() -> None:
    """The block against nn.MultiheadAttention, weights and all."""
    from transept.blocks.attention import Attention, Bias
    from transept.blocks.context import Context

    theirs = nn.MultiheadAttention(32, 4, batch_first=True)
    ours = Attention(32, 4, 4, 8, mask=Causal(), bias=Bias.ALL)
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(std=0.3)
        for name, weight, bias in zip("qkv", theirs.in_proj_weight.chunk(3), theirs.in_proj_bias.chunk(3), strict=True):
            ours.get_submodule(name).load_state_dict({"weight": weight, "bias": bias})
    ours.out.load_state_dict(theirs.out_proj.state_dict())
    x, where = draw(5, 3, 11, 32), Positions.span(0, 11)
    expected, _ = theirs(x, x, x, attn_mask=torch.ones(11, 11, dtype=torch.bool).triu(1), need_weights=False)
    torch.testing.assert_close(ours(x, Context(where, where)), expected)


def test_column_form_of_the_formula() -> None:
    """c = sum_i softmax(<q, k_i> / sqrt(D)) v_i with K, V of shape [D x L] (the lecture's other notation)."""
    d, length = 6, 5
    K, V, q = draw(0, d, length), draw(1, d, length), draw(2, d)
    c = V @ torch.softmax(K.T @ q / math.sqrt(d), 0)
    y = attend(q[None, None, None], K.T[None, None], V.T[None, None], mask=bound(Full(), 1, length), scale=d**-0.5)
    torch.testing.assert_close(y.flatten(), c)


def test_identity_projections_give_the_bare_formula() -> None:
    """With W_v = W_k = W_q = I self-attention is c_i = sum_j softmax_j(<x_i, x_j>) x_j: global, and different at every position."""
    x = draw(3, 6, 8)
    loops = torch.stack(
        [sum(w * x[j] for j, w in enumerate(torch.softmax(torch.stack([x[i] @ x[j] for j in range(6)]), 0))) for i in range(6)]
    )
    y = attend(x[None, None], x[None, None], x[None, None], mask=bound(Full(), 6), scale=1.0)
    torch.testing.assert_close(y[0, 0], loops)


def test_scores_that_are_not_scaled_saturate() -> None:
    """Scores of wide heads grow with sqrt(width); without the scale nearly all weight falls on one key."""
    q, k = draw(0, 1, 1, 64, 512), draw(1, 1, 1, 64, 512)
    scaled, raw = (weights(q, k, mask=bound(Full(), 64), scale=s).amax(-1).mean().item() for s in (512**-0.5, 1.0))
    assert scaled < 0.2 < 0.9 < raw


@EXAMPLES
@given(st.integers(0, 2**31), st.integers(2, 12))
def test_the_shape_of_a_mask_never_changes_its_meaning(seed: int, length: int) -> None:
    """The short ways (`everything`, `triangle`) agree with the dense boolean."""
    first = seed % 5
    for mask in MASKS:
        b = Bound(mask, Positions.span(first, length), Positions.span(0, first + length))
        if b.everything:
            assert b.dense.all()
        if b.triangle:
            assert torch.equal(b.dense[0, 0], torch.ones(length, length, dtype=torch.bool).tril())
        assert torch.equal(Bound(b.rule, b.q, b.k).dense, b.dense)
