"""A plan says what its module says: every decoder of the house, in the native core, against the module in torch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import transept
from transept import native
from transept.blocks.latent import LatentSpec
from transept.blocks.stack import Decoder
from transept.core.registry import Family, all_families, family
from transept.core.spec import Spec
from transept.door import Model
from transept.inference.engine import Ask, Engine, Limits
from transept.inference.engine.runner import Row
from transept.inference.plan import Lowerable, ModuleWeights, NativeRunner, NotLowered

pytestmark = pytest.mark.skipif(not native.available(), reason=f"the native core is not compiled here: {native.why_not()}")


def wide(spec: Spec) -> Spec:
    """Latent widths in multiples of 16, as every published model has them."""
    latent = getattr(spec, "latent", None)
    return spec.replace(latent=latent.replace(value=16, kv_rank=16)) if isinstance(latent, LatentSpec) else spec


def decoders() -> Iterator[tuple[str, Family, Spec]]:
    for fam in all_families():
        for label, spec in fam.tiny.items():
            with torch.device("meta"):
                if type(fam.build(spec)) is Decoder:
                    yield f"{fam.name}-{label}", fam, wide(spec)


CASES = list(decoders())
KNOWN = ("llama", "gpt", "gpt_neo", "opt", "deepseek_v3")


def built(fam: Family, spec: Spec) -> Decoder:
    torch.manual_seed(0)
    model = fam.build(spec).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.25)
    return model


@pytest.mark.parametrize(("name", "fam", "spec"), CASES, ids=[name for name, _, _ in CASES])
def test_plan_equals_module(name: str, fam: Family, spec: Spec) -> None:
    model = built(fam, spec)
    try:
        runner = NativeRunner(model, ModuleWeights(model), pages=16, threads=2, max_rows=16)
    except NotLowered as reason:
        assert fam.name not in KNOWN, reason
        pytest.skip(f"{name} runs in torch: {reason}")
    ids = torch.randint(0, 90, (40,))
    with torch.inference_mode():
        want = model(ids[None]).logits[0]
    tokens = tuple(ids.tolist())
    whole = torch.from_numpy(runner.run([Row(tokens, 0, (0, 3, 2), 5)]))
    assert float((whole - want[-5:]).abs().max()) <= 1e-5

    # One at a time, behind another sequence, alone and beside one more, on other pages: not a bit differs.
    runner.run([Row(tokens[:35], 0, pages, 0) for pages in ((4, 5, 6), (9, 10, 11), (14, 13, 12))])
    for i in range(35, 40):
        one, two, three = (Row(tokens[i : i + 1], i, pages, 1) for pages in ((4, 5, 6), (9, 10, 11), (14, 13, 12)))
        behind = runner.run([Row(tokens[: i - 30], 0, (7, 8), 1), one])[1]
        for found in (behind, runner.step([two])[0].copy(), *runner.step([three, two]).copy()):
            assert torch.equal(torch.from_numpy(found), whole[i - 35])


def test_every_known_family_is_covered() -> None:
    assert {fam.name for _, fam, _ in CASES} >= set(KNOWN)
    assert set(KNOWN) <= {fam.name for fam in all_families()}


def test_a_block_that_is_not_in_the_table_is_named() -> None:
    fam = family("llama")
    model = built(fam, fam.tiny["gqa"])
    model.stack.layers[1].mlp = torch.nn.Identity()
    with pytest.raises(NotLowered, match=r"stack.layers.1.mlp is a Identity"):
        NativeRunner(model, ModuleWeights(model), pages=4)


def test_the_engine_runs_on_the_native_core() -> None:
    fam = family("llama")
    model = built(fam, fam.tiny["gqa"])
    plain = Model(model, fam, None, fam.tiny["gqa"])
    runner = NativeRunner(model, ModuleWeights(model), pages=64, threads=2)
    engine = Engine(runner, context=64, limits=Limits(pages=64, page=16))
    prompts = [[1, 2, 3], [5] * 20, [9, 8], [1, 2, 3, 4]]
    results = engine.run([Ask(prompt=p, max_tokens=12) for p in prompts])
    assert [r[0].ids for r in results] == [plain.generate(p, max_tokens=12).ids for p in prompts]  # type: ignore[union-attr]


def test_a_loaded_decoder_runs_natively_until_its_module_is_opened(tmp_path) -> None:
    fam = family("llama")
    transept.save(Model(built(fam, fam.tiny["gqa"]), fam, None, fam.tiny["gqa"]), tmp_path)
    m = transept.load(tmp_path)
    native_ids = m.generate([1, 2, 3], max_tokens=20).ids
    held = m._model
    assert isinstance(held, Lowerable) and held.native() is not None
    assert m.card.parameters == sum(p.numel() for p in m.model.parameters())
    assert held.native() is None
    assert m.generate([1, 2, 3], max_tokens=20).ids == native_ids
    with torch.no_grad():
        m.model.head.weight.neg_()
    assert m.generate([1, 2, 3], max_tokens=20).ids != native_ids
