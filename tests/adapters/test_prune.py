"""Heads masked, scored and taken out, in encoders and decoders alike (row 16)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tests.contracts.decoders import draw_ids, initialised
from transept.adapters.prune import attentions, importance, masked, prune, weakest
from transept.core.errors import InputError
from transept.core.registry import family

CASES = [
    ("bert", "two"),
    ("albert", "shared"),
    ("deberta", "v1"),
    ("deberta", "v3"),
    ("roformer", "narrow"),
    ("llama", "gqa"),
    ("llama", "tied"),
    ("gpt", "gpt2"),
    ("deepseek_v3", ""),
]


def made(name: str, tiny: str) -> tuple[nn.Module, Tensor]:
    page = family(name)
    spec = page.tiny.get(tiny) or next(iter(page.tiny.values()))
    return initialised(page.build(spec), gain=1.0).eval(), draw_ids(1, (3, 9), spec.vocab)


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids).logits


@pytest.mark.parametrize(("name", "tiny"), CASES)
@pytest.mark.parametrize("pattern", [(0,), (1,), "all but the last", "every second"])
def test_masked_is_pruned(name: str, tiny: str, pattern: str | tuple[int, ...]) -> None:
    """The masked model, the physically smaller one, and a model whose output matrix has zero columns for those heads: all equal."""
    model, ids = made(name, tiny)
    layers = attentions(model)
    counts = {label: getattr(m, "heads", None) or m.spec.heads for label, m in layers.items()}
    chosen = {"all but the last": lambda n: range(n - 1), "every second": lambda n: range(0, n, 2)}.get(str(pattern), lambda n: pattern)
    heads = {label: list(chosen(n)) for label, n in counts.items()}
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        for label, gone in heads.items():
            zeroed.get_submodule(label).out.weight.unflatten(1, (counts[label], -1))[:, gone] = 0
        plain, oracle = logits(model, ids), logits(zeroed, ids)
        with masked(model, heads):
            hidden_heads = logits(model, ids)
        smaller = prune(model, heads)
        assert (hidden_heads - oracle).abs().max() <= 1e-5
        assert (logits(smaller, ids) - oracle).abs().max() <= 1e-5
        assert (plain - oracle).abs().max() > 1e-3, "the heads made no difference, so nothing was shown"
        assert torch.equal(logits(model, ids), plain), "the model itself was changed"
    # Ungrouped keys may cost what the queries save.
    sizes = [sum(p.numel() for p in m.parameters()) for m in (smaller, model)]
    assert sizes[0] < sizes[1] or (sizes[0] == sizes[1] and tiny == "gqa")


def test_a_pruned_decoder_generates_with_its_cache() -> None:
    model, ids = made("llama", "gqa")
    smaller = prune(model, {label: [0, 3] if i else [2] for i, label in enumerate(attentions(model))})
    cache = smaller.cache(3)
    with torch.no_grad():
        steps = torch.cat([smaller(ids[:, i : i + 1], cache=cache).logits for i in range(ids.shape[1])], 1)
        assert (steps - logits(smaller, ids)).abs().max() <= 1e-5


@pytest.mark.parametrize(("name", "tiny"), [("bert", "two"), ("llama", "gqa")])
def test_importance_is_the_slope_of_the_loss(name: str, tiny: str) -> None:
    """|dL/dg| against a finite difference of g, made by scaling the head's columns of the output matrix, in float64."""
    model, ids = made(name, tiny)
    model = model.double()

    def loss(m: nn.Module = model) -> Tensor:
        return m(ids).logits.square().mean()

    scores = importance(model, [loss])
    assert all(p.grad is None for p in model.parameters())
    for label, score in scores.items():
        for head in range(len(score)):
            values = []
            for step in (1e-5, -1e-5):
                moved = copy.deepcopy(model)
                with torch.no_grad():
                    moved.get_submodule(label).out.weight.unflatten(1, (len(score), -1))[:, head] *= 1 + step
                    values.append(loss(moved).item())
            slope = abs(values[0] - values[1]) / 2e-5
            assert abs(float(score[head]) - slope) <= 1e-5 * max(slope, 1e-3) + 1e-7


def test_the_weakest_go_first_and_every_layer_keeps_one() -> None:
    scores = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.0, 0.1, 10.0])}
    assert weakest(scores, 2) == {"b": [0, 1]}
    assert weakest(scores, 3) == {"a": [0], "b": [0, 1]}
    with pytest.raises(InputError, match="4 heads.*3"):
        weakest(scores, 4)


def test_what_cannot_be_pruned_is_refused() -> None:
    model, _ = made("bert", "two")
    first = next(iter(attentions(model)))
    with pytest.raises(InputError, match="nearest"):
        prune(model, {first + "x": [0]})
    with pytest.raises(InputError, match="0 to 3, not 4"):
        prune(model, {first: [4]})
    with pytest.raises(InputError, match="at least one"):
        prune(model, {first: [0, 1, 2, 3]})
    with pytest.raises(InputError, match="at least one loss"):
        importance(model, [])
