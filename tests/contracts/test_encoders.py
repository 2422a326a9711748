"""One contract for every encoder under every head: what must hold whatever the page says inside (rows 5, 37, 40, 43-49, 52-60, 64-68)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import Tensor, nn

import transept
from tests.contracts.decoders import Hears
from tests.contracts.encoders import Case, at_tokens, cases, draw_ids, every_encoder, model, results, without_positions
from tests.counts import count
from tests.laws.forms import holds, same
from transept.blocks.bigbird import BlockSparseAttention
from transept.blocks.disentangled import LocalConv
from transept.blocks.encoder import Encoder, Last
from transept.blocks.longformer import LongEncoder
from transept.blocks.recurrent import BiLM
from transept.core.errors import InputError
from transept.core.registry import Published
from transept.core.tap import listening
from transept.door import Model
from transept.mapping.own import own as native_form
from transept.ops.patterns import Dilated

NEAR = 3e-6
EXAMPLES = settings(max_examples=count(40))
SEEDS = st.integers(0, 2**31)
own = [case for case in cases() if case.form is None]
every_page = pytest.mark.parametrize("case", own, ids=str)


def run(m: nn.Module, ids: Tensor, **rest: Any) -> dict[str, Tensor]:
    with torch.no_grad():
        return results(m, ids, **rest)


def near(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and found
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        off = (found[name] - value).abs().max().item()
        assert off <= NEAR * max(1.0, value.abs().max().item()), f"{name} is off by {off:.2e}"


def test_every_encoder_page_is_here() -> None:
    """The registry finds them; a page that stops being one would go untested in silence."""
    names = {case.family.name for case in cases()}
    assert {"bert", "roberta", "distilbert", "albert", "electra", "deberta", "roformer", "longformer", "bigbird", "t5", "elmo"} <= names
    assert len(cases()) >= 80 and len({str(case) for case in cases()}) == len(cases())


@every_encoder
def test_results_are_of_order_one(case: Case) -> None:
    """Otherwise the absolute tolerances of the other tests would say nothing."""
    for name, value in run(model(case), draw_ids(case, 0, 4, 20)).items():
        assert value.isfinite().all() and 0.1 < value[value > -100].abs().max() < 40, name


def alone(case: Case, seed: int, rows: list[int], left: bool) -> None:
    """Padding changes nothing; up to the length where BigBird sees everything, since beyond it its blocks are those of the padded batch, as
    published.
    """
    m, width = model(case), max(rows) + 2
    assert all(width <= (5 + 2 * part.random) * part.block for part in m.modules() if isinstance(part, BlockSparseAttention))
    ids = draw_ids(case, seed, len(rows), width)
    starts = [width - real if left else 0 for real in rows]
    mask = torch.tensor([[at <= i < at + real for i in range(width)] for at, real in zip(starts, rows, strict=True)])
    y = run(m, ids, mask=mask)
    for i, (at, real) in enumerate(zip(starts, rows, strict=True)):
        mine = {name: value[i : i + 1, at : at + real] if at_tokens(value, ids) else value[i : i + 1] for name, value in y.items()}
        near(mine, run(m, ids[i : i + 1, at : at + real]))


@every_encoder
def test_a_row_in_a_batch_is_the_row_alone(case: Case) -> None:
    # RoFormer's choice is read off the last column, as published.
    alone(case, 9, [12, 5], left=isinstance(getattr(getattr(model(case), "head", None), "pool", None), Last))


@every_page
@EXAMPLES
@given(seed=SEEDS, rows=st.lists(st.integers(4, 14), min_size=1, max_size=4), left=st.booleans())
def test_any_row_in_any_batch_is_the_row_alone(case: Case, seed: int, rows: list[int], left: bool) -> None:
    """Padding on either side; a summary is read at the first column, so there only on the right."""
    summed = not all(at_tokens(value, torch.zeros(1, 9)) for value in run(model(case), draw_ids(case, 0, 1, 9)).values())
    alone(case, seed, rows, left and not summed and not isinstance(model(case), LongEncoder))


@every_encoder
def test_rows_do_not_know_each_other(case: Case) -> None:
    m, order = model(case), [3, 0, 4, 1, 2]
    ids = draw_ids(case, 1, 5, 18)
    y = run(m, ids)
    near(run(m, ids[order]), {name: value[order] for name, value in y.items()})


@every_page
def test_a_token_sees_both_sides(case: Case) -> None:
    """A changed token changes the states before it and after it; in two directions that never meet (ELMo), one half each."""
    m = model(case)
    ids = draw_ids(case, 2, 1, 9)
    other = ids.clone()
    other[0, 5] = 4 + (ids[0, 5] - 3) % (case.spec.vocab - 4)
    moved = (run(m, other)["hidden"] - run(m, ids)["hidden"]).abs()[0]
    if isinstance(m, BiLM):
        left, right = moved.chunk(2, -1)
        assert left[:5].max() == 0 and right[6:].max() == 0 and left[5:].amax(1).min() > 0 and right[:6].amax(1).min() > 0
    else:
        assert moved.amax(1).min() > 1e-5


@every_page
@EXAMPLES
@given(seed=SEEDS, order=st.permutations(range(5)))
def test_without_positions_order_is_not_seen(case: Case, seed: int, order: list[int]) -> None:
    """Permuting the tokens of an encoder that was robbed of its positions permutes its states; with them it does not."""
    plain = model(case)
    if isinstance(plain, BiLM) or any(isinstance(p, LocalConv) for p in plain.modules()):
        pytest.skip(f"{case}: a recurrence or a convolution sees order without positions")
    if any(isinstance(getattr(p, "mask", None), Dilated) for p in plain.modules()):
        pytest.skip(f"{case}: a dilated window is a pattern of positions")
    ids = draw_ids(case, seed, 1, 5)
    robbed = without_positions(copy.deepcopy(plain))
    name = "hidden"
    near({name: run(robbed, ids[:, order])[name]}, {name: run(robbed, ids)[name][:, order]})
    if len(set(ids[0].tolist())) == 5 and order != sorted(order):
        assert (run(plain, ids[:, order])[name] - run(plain, ids)[name][:, order]).abs().max() > 1e-4


@every_encoder
def test_every_parameter_learns(case: Case) -> None:
    """The gradient of a loss over all results reaches each parameter, and is not zero where arithmetic lets it differ from zero."""
    m = copy.deepcopy(model(case)).train()
    ids = draw_ids(case, 3, 3, 24)
    rest: dict[str, Any] = {}
    if isinstance(m, LongEncoder):
        rest["everywhere"] = torch.arange(24).expand(3, -1) % 7 == 0
    if isinstance(m, Encoder) and getattr(case.spec, "segments", 0) > 1:
        rest["segments"] = (torch.arange(24) > 11).long().expand(3, -1)
    gen = torch.Generator().manual_seed(0)
    loss = torch.zeros(())
    for value in results(m, ids, **rest).values():
        loss = loss + (value * torch.randn(value.shape, generator=gen)).sum()
    loss.backward()
    for name, parameter in m.named_parameters():
        assert parameter.grad is not None, f"no gradient reaches {name}"
        assert parameter.grad.isfinite().all(), f"the gradient of {name} is not finite"
        # One vector added to all keys shifts all scores of a query alike, which softmax does not see.
        free = name.endswith((".k.bias", ".k_all.bias", ".k_position.bias"))
        assert free or parameter.grad.abs().max() > 0, f"the gradient of {name} is zero"


@every_encoder
def test_evaluation_is_the_same_bits_again(case: Case) -> None:
    m, ids = model(case), draw_ids(case, 4, 2, 11)
    same(run(m, ids), run(m, ids))


@every_encoder
def test_a_row_of_padding_only_stays_finite(case: Case) -> None:
    """Where a row has no token at all nothing becomes NaN, and its neighbour is what it is alone."""
    m, ids = model(case), draw_ids(case, 5, 2, 9)
    y = run(m, ids, mask=torch.tensor([[True] * 9, [False] * 9]))
    assert all(value.isfinite().all() for value in y.values())
    near({name: value[:1] for name, value in y.items()}, run(m, ids[:1]))


@every_page
def test_watching_changes_nothing(case: Case) -> None:
    """A listener hears the attention of every layer, whose rows sum to one, and the result is the same bits."""
    m: Any = model(case)
    ids = draw_ids(case, 6, 2, 12)
    quiet, ear = run(m, ids), Hears()
    with listening(ear):
        same(run(m, ids), quiet)
    weights = [value for _, name, value in ear.heard if name == "weights"]
    assert bool(weights) == (not isinstance(m, BiLM))
    for w in weights:
        assert torch.allclose(w.sum(-1), torch.ones(()), atol=1e-5)


@every_encoder
def test_an_empty_or_wrong_input_is_refused(case: Case) -> None:
    m, vocab = model(case), case.spec.vocab
    ids = draw_ids(case, 7, 1, 8)
    with pytest.raises(InputError, match="empty"):
        m(torch.zeros(1, 0, dtype=torch.long))
    wrong = ids.clone()
    wrong[0, 1] = vocab
    with pytest.raises(InputError, match=f"{vocab}.*vocabulary|vocabulary.*{vocab}"):
        m(wrong)
    # Under the tests' run-time check of shapes its own error comes first.
    with pytest.raises((InputError, TypeCheckError), match="mask"):
        m(ids, mask=torch.ones(1, 2, dtype=torch.bool))


def foreign(case: Case) -> Published | None:
    """The form in which the case is saved: its own, or the first that is read into the page's own wiring and can say its Spec; the
    library's own where nobody published one."""
    known = case.family.published or (native_form(case.family),)
    forms = [case.form] if case.form else [f for f in known if f.build is None and not f.architecture.startswith("gguf:")]
    return next((form for form in forms if holds(form, case.spec)), None)


@pytest.mark.parametrize("case", [case for case in cases() if foreign(case)], ids=str)
def test_weights_go_round(case: Case, tmp_path: Path) -> None:
    """Saved as a folder and loaded: the same form, the same Spec, the same bits, the same results."""
    form, m = foreign(case), model(case)
    transept.save(Model(m, case.family, form, case.spec), tmp_path)
    again = transept.load(tmp_path)
    assert again.family is case.family and again.spec == case.spec and again.form is form
    same(again.model.state_dict(), m.state_dict())
    ids = draw_ids(case, 8, 2, 13)
    same(run(again.model, ids), run(m, ids))


def test_parameters_are_what_the_maps_write() -> None:
    """For every form that has a case: the names in the module's state_dict are the native names of the map."""
    checked = 0
    for case in cases():
        if case.form is not None:
            native = {name for bond in case.form.names.bonds(case.spec) for name in bond.native}
            assert native == set(case.build().state_dict()), str(case)
            checked += 1
    assert checked >= 50
