"""One contract for every decoder: what must hold whatever the page says inside (rows 17, 23, 40, 82c, 82d)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import Tensor, nn

import transept
from tests.contracts.decoders import Case, Hears, draw_ids, every_decoder, model, spec
from tests.counts import count
from tests.laws.forms import holds
from transept.checkpoints.save import form_for
from transept.core.errors import ConfigError, InputError
from transept.core.tap import listening
from transept.door import Model
from transept.mapping.own import own

NEAR = {torch.float32: 2e-6, torch.float64: 1e-12}
SEEDS = st.integers(0, 2**31)
# No explaining phase: it runs a failing example under a tracer, minutes for a model.
EXAMPLES = settings(max_examples=count(60), phases=[Phase.explicit, Phase.generate, Phase.shrink])


def length_limit(case: Case) -> int:
    return min(getattr(spec(case), "context", 24), 24)


@st.composite
def splits(draw: st.DrawFn, most: int) -> list[int]:
    """Sizes of the chunks of a prompt."""
    return draw(st.lists(st.integers(1, 9), min_size=1, max_size=8).filter(lambda sizes: sum(sizes) <= most))


@st.composite
def padding(draw: st.DrawFn, most: int) -> list[tuple[int, int, int]]:
    """For each row of a batch: columns of padding on the left, real tokens, columns of padding on the right; all rows equally long."""
    width = draw(st.integers(2, most))
    side = draw(st.sampled_from(["left", "right", "both"]))
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        real = draw(st.integers(1, width))
        left = {"left": width - real, "right": 0}.get(side)
        left = draw(st.integers(0, width - real)) if left is None else left
        rows.append((left, real, width - real - left))
    return rows


def mask_of(rows: list[tuple[int, int, int]]) -> Tensor:
    return torch.tensor([[False] * left + [True] * real + [False] * right for left, real, right in rows])


def logits(m: nn.Module, ids: Tensor, **rest: object) -> Tensor:
    with torch.no_grad():
        return m(ids, **rest).logits


def near(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    off = (found - expected).abs().max().item()
    assert off <= NEAR[found.dtype], f"off by {off:.2e}"


@every_decoder
def test_logits_are_of_order_one(case: Case) -> None:
    """Otherwise the absolute tolerances of the other tests would say nothing."""
    s = spec(case)
    y = logits(model(case), draw_ids(0, (4, length_limit(case)), s.vocab))
    assert y.shape == (4, length_limit(case), s.vocab)
    assert 0.15 < y.std().item() < 2 and 0.5 < y.abs().max() < 8
    assert s.head_dim >= 8 if hasattr(s, "head_dim") else True, "at a head width of 2 or 4 a wrong rotary layout is invisible"


@every_decoder
@EXAMPLES
@given(wide=st.booleans(), seed=SEEDS, batch=st.integers(1, 3), data=st.data())
def test_later_tokens_change_nothing(case: Case, wide: bool, seed: int, batch: int, data: st.DataObject) -> None:
    """Causality, exact: whatever stands later, the logits of a prefix are the same bits."""
    vocab = spec(case).vocab
    length = data.draw(st.integers(2, length_limit(case)))
    cut = data.draw(st.integers(1, length - 1))
    ids = draw_ids(seed, (batch, length), vocab)
    changed = ids.clone()
    changed[:, cut:] = (ids[:, cut:] + draw_ids(seed + 1, (batch, length - cut), vocab - 1) + 1) % vocab
    a, b = logits(model(case, wide), ids), logits(model(case, wide), changed)
    assert torch.equal(a[:, :cut], b[:, :cut])
    assert (a[:, cut] - b[:, cut]).abs().max() > 1e-4


@every_decoder
@EXAMPLES
@given(wide=st.booleans(), seed=SEEDS, batch=st.integers(1, 3), data=st.data())
def test_cached_equals_uncached(case: Case, wide: bool, seed: int, batch: int, data: st.DataObject) -> None:
    """Token by token with a cache that has to grow, against one call."""
    m, length = model(case, wide), data.draw(st.integers(1, length_limit(case)))
    ids = draw_ids(seed, (batch, length), spec(case).vocab)
    cache = m.cache(batch, capacity=data.draw(st.integers(1, length)))
    steps = [logits(m, ids[:, i : i + 1], cache=cache) for i in range(length)]
    near(torch.cat(steps, 1), logits(m, ids))
    assert cache.length == length


@every_decoder
@EXAMPLES
@given(wide=st.booleans(), seed=SEEDS, batch=st.integers(1, 3), data=st.data())
def test_chunked_prefill_equals_one_shot(case: Case, wide: bool, seed: int, batch: int, data: st.DataObject) -> None:
    m, sizes = model(case, wide), data.draw(splits(length_limit(case)))
    ids = draw_ids(seed, (batch, sum(sizes)), spec(case).vocab)
    cache = m.cache(batch)
    parts = [logits(m, chunk, cache=cache) for chunk in ids.split(sizes, 1)]
    near(torch.cat(parts, 1), logits(m, ids))


@every_decoder
@EXAMPLES
@given(wide=st.booleans(), seed=SEEDS, data=st.data())
def test_padding_changes_nothing(case: Case, wide: bool, seed: int, data: st.DataObject) -> None:
    """A row in a batch, padded at either end or both, gives the logits that it gives alone."""
    m, rows = model(case, wide), data.draw(padding(length_limit(case)))
    ids = draw_ids(seed, (len(rows), sum(rows[0])), spec(case).vocab)
    y = logits(m, ids, mask=mask_of(rows))
    for i, (left, real, _) in enumerate(rows):
        near(y[i : i + 1, left : left + real], logits(m, ids[i : i + 1, left : left + real]))


@every_decoder
@EXAMPLES
@given(wide=st.booleans(), seed=SEEDS, steps=st.integers(1, 6), chunk=st.integers(1, 12), data=st.data())
def test_padded_batch_decodes_as_alone(case: Case, wide: bool, seed: int, steps: int, chunk: int, data: st.DataObject) -> None:
    """Prefill of a padded batch in chunks, then a few tokens more: each row as if it had been alone without a cache."""
    m, rows = model(case, wide), data.draw(padding(length_limit(case) - steps))
    ids = draw_ids(seed, (len(rows), sum(rows[0]) + steps), spec(case).vocab)
    mask, width, cache = mask_of(rows), sum(rows[0]), m.cache(len(rows))
    for at in range(0, width, chunk):
        logits(m, ids[:, at : min(at + chunk, width)], mask=mask[:, at : at + chunk], cache=cache)
    tail = torch.cat([logits(m, ids[:, i : i + 1], cache=cache) for i in range(width, width + steps)], 1)
    for i, (left, real, _) in enumerate(rows):
        alone = torch.cat((ids[i : i + 1, left : left + real], ids[i : i + 1, width:]), 1)
        near(tail[i : i + 1], logits(m, alone)[:, real:])


@every_decoder
@EXAMPLES
@given(wide=st.booleans(), seed=SEEDS, order=st.permutations(range(5)), length=st.integers(1, 24))
def test_rows_do_not_know_each_other(case: Case, wide: bool, seed: int, order: list[int], length: int) -> None:
    """Permuting the rows of a batch permutes what comes out; other neighbours change nothing."""
    m, vocab = model(case, wide), spec(case).vocab
    ids = draw_ids(seed, (5, min(length, length_limit(case))), vocab)
    y = logits(m, ids)
    near(logits(m, ids[order]), y[order])
    others = ids.clone()
    others[1:] = draw_ids(seed + 1, others[1:].shape, vocab)
    near(logits(m, others)[:1], y[:1])


@every_decoder
def test_every_parameter_learns(case: Case) -> None:
    """The gradient of the loss reaches each parameter, is finite, and is not zero where the arithmetic lets it differ from zero."""
    m = copy.deepcopy(model(case)).train()
    ids = draw_ids(1, (4, length_limit(case)), spec(case).vocab)
    out = m(ids).logits
    F.cross_entropy(out[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    for name, parameter in m.named_parameters():
        assert parameter.grad is not None, f"no gradient reaches {name}"
        assert parameter.grad.isfinite().all(), f"the gradient of {name} is not finite"
        # One vector added to all keys shifts all scores of a query alike, which softmax does not see: the key bias may have no gradient.
        assert name.endswith(".k.bias") or parameter.grad.abs().max() > 0, f"the gradient of {name} is zero"


@every_decoder
def test_a_row_of_padding_only_stays_finite(case: Case) -> None:
    """Where a row has no token at all, nothing becomes NaN: not its output, not its neighbour's, not a gradient, nor what is
    decoded after it.
    """
    m = copy.deepcopy(model(case))
    ids = draw_ids(2, (2, 6), spec(case).vocab)
    mask = torch.tensor([[True] * 6, [False] * 6])
    y = m(ids, mask=mask).logits
    assert y.isfinite().all()
    near(y[:1].detach(), logits(m, ids[:1]))
    y[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in m.parameters())
    cache = m.cache(2)
    logits(m, ids, mask=mask, cache=cache)
    after = logits(m, ids[:, :1], cache=cache)
    assert after.isfinite().all()
    near(after[1:], logits(m, ids[1:, :1]))


@every_decoder
def test_watching_changes_nothing(case: Case) -> None:
    """A listener that hears everything hears something of every layer, and the output is the same bits."""
    m: Any = model(case)
    ids = draw_ids(3, (2, 12), spec(case).vocab)
    quiet, ear = logits(m, ids), Hears()
    with listening(ear):
        watched = logits(m, ids)
    assert torch.equal(quiet, watched)
    names = {name for _, name, _ in ear.heard}
    assert {"weights", "heads", "attn", "hidden"} <= names, names
    weights = [value for _, name, value in ear.heard if name == "weights"]
    assert len(weights) == len(m.stack.layers)
    for w in weights:
        assert torch.allclose(w.sum(-1), torch.ones(()), atol=1e-5)
        assert w.triu(1).abs().max() == 0


@every_decoder
@EXAMPLES
@given(wide=st.booleans(), seed=SEEDS, rows=st.lists(st.integers(0, 2), min_size=1, max_size=5), length=st.integers(1, 20), data=st.data())
def test_reordered_cache_equals_recomputation(case: Case, wide: bool, seed: int, rows: list[int], length: int, data: st.DataObject) -> None:
    """Beam search: rows of the cache are chosen, repeated and dropped, padded or not, and decoding goes on from there."""
    m, vocab = model(case, wide), spec(case).vocab
    ids, more = draw_ids(seed, (3, length), vocab), draw_ids(seed + 1, (len(rows), 3), vocab)
    left = data.draw(st.lists(st.integers(0, length - 1), min_size=3, max_size=3)) if data.draw(st.booleans()) else [0, 0, 0]
    mask = mask_of([(n, length - n, 0) for n in left]) if any(left) else None
    cache = m.cache(3)
    logits(m, ids, mask=mask, cache=cache)
    cache.reorder(torch.tensor(rows))
    y = torch.cat([logits(m, more[:, i : i + 1], cache=cache) for i in range(3)], 1)
    for i, row in enumerate(rows):
        near(y[i : i + 1], logits(m, torch.cat((ids[row : row + 1, left[row] :], more[i : i + 1]), 1))[:, -3:])


@every_decoder
@EXAMPLES
@given(wide=st.booleans(), seed=SEEDS, kept=st.integers(1, 16), dropped=st.integers(1, 12))
def test_truncated_cache_equals_never_appended(case: Case, wide: bool, seed: int, kept: int, dropped: int) -> None:
    """A cache that takes back its latest columns decodes as if they had never been; one that cannot (a full ring) refuses and is
    not changed.
    """
    m, vocab = model(case, wide), spec(case).vocab
    ids, more = draw_ids(seed, (2, kept + dropped), vocab), draw_ids(seed + 1, (2, 4), vocab)
    cache = m.cache(2)
    logits(m, ids, cache=cache)
    expected = logits(m, torch.cat((ids[:, :kept], more), 1))[:, kept:]
    try:
        cache.truncate(kept)
    except InputError:
        reaches = [r for part in m.modules() if (mask := getattr(part, "mask", None)) is not None and (r := mask.reach()) is not None]
        assert min(reaches) < kept + dropped
        near(logits(m, more, cache=cache), logits(m, torch.cat((ids, more), 1))[:, kept + dropped :])
        return
    assert cache.length == kept
    near(logits(m, more, cache=cache), expected)


@every_decoder
def test_parameters_are_what_the_maps_write(case: Case) -> None:
    """For every form that can hold this spec: the names in the model's state_dict are the native names of the map."""
    family, s = case[0], spec(case)
    able = [form for form in family.published or (own(family),) if holds(form, s)]
    if not able:
        pytest.skip(f"{family.name} {case[1]}: nobody published a form that could say this spec")
    for form in able:
        native = {name for bond in form.names.bonds(s) for name in bond.native}
        assert native == set((form.build or family.build)(s).state_dict()), form.architecture


@every_decoder
def test_weights_go_round(case: Case, tmp_path: Path) -> None:
    """Saved as a folder and loaded: the same family, the same Spec, the same bits, the same results."""
    family, s = case[0], spec(case)
    try:
        form = form_for(family, s)
    except ConfigError:
        pytest.skip(f"{family.name} {case[1]}: nobody published a form that could say this spec")
    transept.save(Model(model(case), family, form, s), tmp_path)
    again = transept.load(tmp_path)
    assert again.family is family and again.spec == s and again.form is form
    ids = draw_ids(9, (2, 7), s.vocab)
    for name, tensor in again.model.state_dict().items():
        assert torch.equal(tensor, model(case).state_dict()[name]), name
    assert torch.equal(logits(again.model, ids), logits(model(case), ids))


@every_decoder
def test_bfloat16_is_near_float32(case: Case) -> None:
    """In bfloat16 (8 bits of precision) the distributions differ by little, cached or not."""
    m, ids = model(case), draw_ids(4, (2, length_limit(case)), spec(case).vocab)
    half = copy.deepcopy(m).to(torch.bfloat16)
    exact = logits(m, ids).log_softmax(-1)
    cache = half.cache(2)
    cached = torch.cat([logits(half, part, cache=cache) for part in ids.split(7, 1)], 1)
    for found in (logits(half, ids), cached):
        assert found.dtype == torch.bfloat16
        kl = F.kl_div(found.float().log_softmax(-1), exact, log_target=True, reduction="none").sum(-1)
        assert kl.median().item() < 2e-3, f"KL {kl.median().item():.1e}"


@every_decoder
def test_evaluation_is_the_same_bits_again(case: Case) -> None:
    """No dropout, no hidden state: two calls in evaluation mode are equal (row 23), and so are two models of one state."""
    m, ids = model(case), draw_ids(5, (2, 9), spec(case).vocab)
    first = logits(m, ids)
    assert torch.equal(first, logits(m, ids))
    twin = case[0].build(spec(case)).eval()
    twin.load_state_dict(m.state_dict())
    assert torch.equal(first, logits(twin, ids))


@every_decoder
def test_hidden_states_are_features(case: Case) -> None:
    """A decoder represents by its states before the head (row 40): they are in the result, the head of them is the logits, and a
    linear probe on the last one tells the order of two tokens, which their sum cannot tell."""
    m, s = model(case, wide=True), spec(case)
    ids = draw_ids(6, (1000, 4), s.vocab)
    flipped = torch.arange(1000) % 2 == 0
    ids[:, 1], ids[:, 2], ids[:, 3] = torch.where(flipped, 3, 5), torch.where(flipped, 5, 3), 7
    with torch.no_grad():
        out = m(ids)
    assert out.hidden.shape == (1000, 4, getattr(s, "width", s.dim))
    assert torch.equal(m.head(out.hidden), out.logits)
    assert torch.equal(m.hidden(ids), out.hidden)
    x, y = torch.nn.functional.pad(out.hidden[:, -1], (0, 1), value=1.0), flipped.double() * 2 - 1
    seen, asked = x[:600], x[600:]
    probe = torch.linalg.solve(seen.T @ seen + 0.1 * torch.eye(x.shape[1]), seen.T @ y[:600])
    assert ((asked @ probe).sign() == y[600:]).double().mean() > 0.6


@every_decoder
def test_an_empty_or_wrong_input_is_refused(case: Case) -> None:
    m, vocab = model(case), spec(case).vocab
    with pytest.raises(InputError, match="empty"):
        m(torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(InputError, match=f"{vocab}.*vocabulary|vocabulary.*{vocab}"):
        m(torch.tensor([[0, vocab]]))
    # Under the tests' run-time check of shapes its own error comes first.
    with pytest.raises((InputError, TypeCheckError), match="mask"):
        m(torch.zeros(1, 3, dtype=torch.long), mask=torch.ones(1, 2, dtype=torch.bool))
