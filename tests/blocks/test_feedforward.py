"""Feed-forward networks against their formulas (rows 19-22, 82b)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.counts import count
from transept.blocks.feedforward import MLP, Experts, GatedMLP, MoE, Router
from transept.ops.activations import Act
from transept.ops.routing import RouteSpec


def test_activations_are_torch_s_own_and_the_papers_formulas() -> None:
    x = torch.linspace(-6, 6, 601, dtype=torch.float64)
    phi = 0.5 * (1 + torch.erf(x / 2**0.5))
    tanh_form = 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    expected = {
        Act.RELU: x.clamp(min=0),
        Act.GELU: x * phi,
        Act.GELU_TANH: tanh_form,
        Act.QUICK_GELU: x / (1 + torch.exp(-1.702 * x)),
        Act.SILU: x / (1 + torch.exp(-x)),
        Act.RELU2: x.clamp(min=0) ** 2,
        Act.TANH: torch.tanh(x),
    }
    assert set(expected) == set(Act)
    for act, y in expected.items():
        torch.testing.assert_close(act(x), y)
    assert (Act.GELU(x) - Act.GELU_TANH(x)).abs().max() > 1e-4, "the two forms of GELU are told apart"


def test_plain_and_gated_networks() -> None:
    x = torch.randn(2, 3, 8)
    mlp, gated = MLP(8, 12, Act.RELU), GatedMLP(8, 12, Act.SILU)
    torch.testing.assert_close(mlp(x), torch.relu(x @ mlp.up.weight.T + mlp.up.bias) @ mlp.down.weight.T + mlp.down.bias)
    torch.testing.assert_close(gated(x), (F.silu(x @ gated.gate.weight.T) * (x @ gated.up.weight.T)) @ gated.down.weight.T)


@settings(max_examples=count(50))
@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(1, 6))
def test_a_mixture_is_the_sum_of_equation_12(seed: int, batch: int, length: int) -> None:
    torch.manual_seed(seed)
    spec = RouteSpec(experts=6, chosen=2, groups=3, top_groups=2, scale=2.5)
    moe = MoE(Router(8, spec), Experts(6, 8, 12, Act.SILU), GatedMLP(8, 12, Act.SILU))
    with torch.no_grad():
        for p in moe.parameters():
            p.normal_(std=0.5)
        moe.router.correction.normal_(std=0.2)
    x = torch.randn(batch, length, 8)
    y = moe(x)
    for b in range(batch):
        for t in range(length):
            h = x[b, t]
            chosen, weight = moe.router(h[None])
            total = moe.shared(h)
            for e, g in zip(chosen[0].tolist(), weight[0], strict=True):
                hidden = F.silu(moe.experts.gate[e] @ h) * (moe.experts.up[e] @ h)
                total = total + g * (moe.experts.down[e] @ hidden)
            torch.testing.assert_close(y[b, t], total, atol=1e-5, rtol=1e-4)
