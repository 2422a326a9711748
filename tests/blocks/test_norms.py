"""The norms against torch's functions, the written formulas, and batches of other samples (rows 24-27)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.counts import count
from transept.blocks.block import Order
from transept.blocks.norms import LayerNorm, NoNorm, RMSNorm


@settings(max_examples=count(200))
@given(st.integers(0, 2**31), st.integers(2, 40), st.sampled_from([1e-6, 1e-5, 1e-2]))
def test_the_written_formulas(seed: int, dim: int, eps: float) -> None:
    g = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(2, 5, dim, generator=g) + 1
    layer, rms = LayerNorm(dim, eps), RMSNorm(dim, eps)
    with torch.no_grad():
        for p in (layer.weight, layer.bias, rms.weight):
            p.copy_(torch.randn(dim, generator=g))
    mean, var = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    torch.testing.assert_close(layer(x), (x - mean) / (var + eps).sqrt() * layer.weight + layer.bias, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rms(x), x / ((x * x).mean(-1, keepdim=True) + eps).sqrt() * rms.weight, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer(x), F.layer_norm(x, (dim,), layer.weight, layer.bias, eps))
    torch.testing.assert_close(rms(x), F.rms_norm(x, (dim,), rms.weight, eps))


def test_a_sample_never_depends_on_its_batch() -> None:
    x = torch.randn(8, 6, 16)
    for norm in (LayerNorm(16), RMSNorm(16)):
        whole = norm(x)
        assert all(torch.equal(norm(x[i : i + 1])[0], whole[i]) for i in range(8))
        assert not list(norm.buffers()), "no running statistics"


def test_rms_norm_is_layer_norm_of_a_centred_input() -> None:
    x = torch.randn(4, 16)
    x = x - x.mean(-1, keepdim=True)
    torch.testing.assert_close(RMSNorm(16, 1e-5)(x), LayerNorm(16, 1e-5)(x))


def test_pre_and_post_norm_are_the_two_formulas() -> None:
    x, norm = torch.randn(2, 3, 16), LayerNorm(16)

    def f(y: torch.Tensor) -> torch.Tensor:
        return y.roll(1, -1) * 2

    assert torch.equal(Order.PRE.rule()(x, f, norm), x + f(norm(x)))
    assert torch.equal(Order.POST.rule()(x, f, norm), norm(x + f(x)))
    assert torch.equal(Order.POST.rule()(x, f, NoNorm()), x + f(x))


def test_dropout_is_off_in_evaluation() -> None:
    """Run to run, bit for bit."""
    x, norm = torch.randn(2, 3, 16), LayerNorm(16)
    rule = Order.PRE.rule(dropout=0.5)
    assert not torch.equal(rule(x, torch.sin, norm), rule(x, torch.sin, norm))
    rule.eval()
    assert torch.equal(rule(x, torch.sin, norm), rule(x, torch.sin, norm))
