"""The routing of experts against a naive loop from DeepSeek-V3's equations 12-16."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.counts import count
from transept.ops.routing import RouteSpec, route


def naive(logits: list[float], correction: list[float], s: RouteSpec) -> dict[int, float]:
    """Expert -> weight, one token, by sorting."""
    affinity = [1 / (1 + torch.exp(torch.tensor(-u)).item()) for u in logits]  # eq. 15
    biased = [a + b for a, b in zip(affinity, correction, strict=True)]  # eq. 16
    size = s.experts // s.groups
    groups = [list(range(g * size, (g + 1) * size)) for g in range(s.groups)]
    best = sorted(groups, key=lambda g: -sum(sorted((biased[e] for e in g), reverse=True)[:2]))[: s.top_groups]
    chosen = sorted((e for g in best for e in g), key=lambda e: -biased[e])[: s.chosen]  # eq. 14
    total = sum(affinity[e] for e in chosen) if s.normalise else 1.0  # eq. 13
    return {e: s.scale * affinity[e] / total for e in chosen}


@st.composite
def routes(draw: st.DrawFn) -> RouteSpec:
    groups, size = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    top = draw(st.integers(1, groups))
    return RouteSpec(
        experts=groups * size,
        chosen=draw(st.integers(1, top * size)),
        groups=groups,
        top_groups=top,
        normalise=draw(st.booleans()),
        scale=draw(st.floats(0.5, 3.0)),
    )


@settings(max_examples=count(500))
@given(routes(), st.integers(0, 2**31))
def test_the_naive_loop(s: RouteSpec, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    logits, correction = torch.randn(7, s.experts, generator=g), 0.3 * torch.randn(s.experts, generator=g)
    chosen, weight = route(logits, correction, s)
    for row in range(7):
        expected = naive(logits[row].tolist(), correction.tolist(), s)
        found = dict(zip(chosen[row].tolist(), weight[row].tolist(), strict=True))
        assert set(found) == set(expected)
        assert all(abs(found[e] - expected[e]) < 1e-5 for e in expected)


def test_the_correction_chooses_but_does_not_weigh() -> None:
    s = RouteSpec(experts=4, chosen=1, normalise=False)
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    chosen, weight = route(logits, torch.tensor([0.0, 0.0, 0.0, 5.0]), s)
    assert chosen.item() == 3
    torch.testing.assert_close(weight, logits[:, 3:].sigmoid())
