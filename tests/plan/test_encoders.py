"""Encoders in the native core say what their modules say in torch: every family that lowers, with ragged batches, pairs and heads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from transept import native
from transept.blocks.encoder import Encoder
from transept.core.errors import InputError
from transept.core.registry import Family, all_families
from transept.core.spec import Spec
from transept.inference.plan import ModuleWeights, NativeEncoder, NotLowered

pytestmark = pytest.mark.skipif(not native.available(), reason=f"the native core is not compiled here: {native.why_not()}")
KNOWN = {"bert", "roberta", "distilbert", "albert", "electra", "roformer"}


def encoders() -> Iterator[tuple[str, Family, Spec]]:
    for fam in all_families():
        for label, spec in fam.tiny.items():
            with torch.device("meta"):
                if type(fam.build(spec)) is Encoder:
                    yield f"{fam.name}-{label}", fam, spec


CASES = list(encoders())


def built(fam: Family, spec: Spec) -> Encoder:
    torch.manual_seed(0)
    model = fam.build(spec).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.25)
    return model


@pytest.mark.parametrize(("name", "fam", "spec"), CASES, ids=[name for name, _, _ in CASES])
def test_plan_equals_module(name: str, fam: Family, spec: Spec) -> None:
    model = built(fam, spec)
    try:
        lowered = NativeEncoder(model, ModuleWeights(model), threads=2, max_rows=64)
    except NotLowered as reason:
        assert fam.name not in KNOWN, reason
        pytest.skip(f"{name} runs in torch: {reason}")
    ids, lengths = torch.randint(0, 90, (7, 30)), torch.tensor([30, 1, 17, 16, 5, 29, 30])
    mask = torch.arange(30) < lengths[:, None]
    several = lowered.segments and len(model.embed.segments.weight) > 1
    segments = (torch.arange(30) > 11).long().expand(7, 30) if several else None
    with torch.inference_mode():
        want, found = (m.states(ids, mask=mask, segments=segments) for m in (model, lowered))
        assert float((found - want)[mask].abs().max()) <= 1e-4
        # Its neighbours are nothing to a text: not a bit differs.
        alone = lowered.states(ids[2:3, :17], segments=None if segments is None else segments[2:3, :17])
        assert torch.equal(alone[0], found[2, :17])
        for ours, theirs in zip(vars(lowered(ids[:1])).values(), vars(model(ids[:1])).values(), strict=True):
            assert torch.allclose(ours, theirs, atol=2e-4)


def test_the_known_families_are_there() -> None:
    assert {fam.name for _, fam, _ in CASES} >= KNOWN


def test_bad_input_is_refused_as_the_module_refuses_it() -> None:
    fam, spec = next((fam, spec) for _, fam, spec in CASES if fam.name == "bert")
    model = built(fam, spec)
    lowered = NativeEncoder(model, ModuleWeights(model), max_rows=32)
    with pytest.raises(InputError, match="33 tokens, but the lowered model reads at most 32"):
        lowered.states(torch.zeros(1, 33, dtype=torch.long))
    with pytest.raises(InputError):
        lowered.states(torch.full((1, 3), 100_000))
    fam, spec = next((fam, spec) for _, fam, spec in CASES if fam.name == "distilbert")
    model = built(fam, spec)
    with pytest.raises(InputError, match="second segment"):
        NativeEncoder(model, ModuleWeights(model)).states(torch.zeros(1, 3, dtype=torch.long), segments=torch.ones(1, 3, dtype=torch.long))
