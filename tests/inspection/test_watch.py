"""Names, contexts inside contexts, values put in place of others, and a loaded model that keeps its native core."""

from __future__ import annotations

import copy
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import transept
from tests.contracts.decoders import draw_ids, initialised
from transept.core.errors import InputError
from transept.core.registry import all_families, family
from transept.door import Model
from transept.inspection.attention import called
from transept.inspection.sites import find, patterns, sites
from transept.inspection.watch import heads_off, patched, swapped, watch, watchable

ABLE = [("bert", "two"), ("albert", "shared"), ("llama", "gqa"), ("deepseek_v3", ""), ("t5", ""), ("bart", ""), ("deberta", "v1"),
        ("roformer", "narrow"), ("transformer", "2017"), ("longformer", ""), ("sparse", "fixed")]  # fmt: skip


def made(name: str, tiny: str = "") -> tuple[nn.Module, Tensor, Tensor | None]:
    page = family(name)
    spec = page.tiny.get(tiny) or next(iter(page.tiny.values()))
    module, ids = initialised(page.build(spec), gain=1.0).eval(), draw_ids(1, (2, 9), spec.vocab)
    if name == "longformer":
        ids[:, 2:4] = spec.separator
    return module, ids, draw_ids(2, (2, 7), spec.vocab) if hasattr(module, "encoder") else None


def logits(module: nn.Module, ids: Tensor, source: Tensor | None) -> Tensor:
    with torch.no_grad():
        return called(module, ids, source).logits


@pytest.mark.parametrize("page", all_families(), ids=lambda page: page.name)
def test_every_name_is_heard(page: object) -> None:
    """Every place of every family says its name in one call, once for each; without a call there is a sentence."""
    if page.name in ("glove", "word2vec"):
        pytest.skip(f"{page.name} is a table of vectors: nothing is computed inside")
    module, ids, source = made(page.name)
    names = watchable(module)
    assert names and len(set(names)) == len(names)
    with torch.no_grad(), watch(module, *names) as seen:
        with pytest.raises(InputError, match="not computed yet"):
            seen[names[0]]
        called(module, ids, source)
    loose = [name for name in names if len(seen.every(name)) != 1 and not name.endswith("cell.hidden")]
    assert not loose, loose


def test_names_in_short() -> None:
    module, _, _ = made("llama", "gqa")
    assert patterns(module)[:4] == ["embed", "attn[0..1]", "attn[0..1].head[0..3]", "attn[0..1].q"]
    assert {name for name in sites(module)} >= {"embed", "attn[0]", "attn[1].v", "block[1]", "block[0].attn", "mlp[1].hidden", "hidden"}
    assert [*find(module, ["attn[*].head[*]"])] == [f"attn[{i}].head[{h}]" for i in range(2) for h in range(4)]
    assert [*find(module, ["decoder.attn[1].head[2].weights"])] == ["attn[1].head[2]"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("atn[0].head[1]", "nearest: 'attn[0].head[1]'"),
        ("attn[2].head[0]", "the layers 0 to 1"),
        ("attn[0].head[4]", "the heads 0 to 3, not 4"),
        ("block[1].head[0]", "has no heads"),
        ("blok[1]", "nearest: 'block[1]'"),
        ("encoder.attn[0]", "nearest: 'attn[0]'"),
        ("", "nothing called"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(name: str, words: str) -> None:
    module, _, _ = made("llama", "gqa")
    with pytest.raises(InputError) as caught, watch(module, name):
        pass
    assert words in str(caught.value)


def test_nothing_named_and_nothing_watched() -> None:
    module, ids, _ = made("llama", "gqa")
    with pytest.raises(InputError, match="name what to watch"), watch(module):
        pass
    with watch(module, "attn[0]") as seen, pytest.raises(InputError, match="not watched"):
        seen["attn[1]"]


def test_only_the_watched_head_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    import transept.blocks.attention as block

    asked: list[object] = []
    real = block.weights
    monkeypatch.setattr(block, "weights", lambda *args, **rest: (asked.append(rest.get("heads")), real(*args, **rest))[1])
    module, ids, _ = made("llama", "gqa")
    logits(module, ids, None)
    assert asked == []
    with watch(module, "attn[1].head[3]", "attn[1].head[0].q"):
        logits(module, ids, None)
    assert asked == [(3,)]


def test_contexts_stand_inside_each_other() -> None:
    """Two watchers of the same layer, a head off outside: each hears its own heads, of the changed model."""
    module, ids, _ = made("llama", "gqa")
    with torch.no_grad(), heads_off(module, ["attn[0].head[2]"]):
        with watch(module, "attn[1]", "attn[0].out") as whole:
            with watch(module, "attn[1].head[3]") as one, watch(module, "attn[1].head[0]", "attn[1].head[2]") as two:
                inside = called(module, ids).logits
            called(module, ids)
        outside = called(module, ids).logits
    assert torch.equal(inside, outside) and not torch.equal(inside, logits(module, ids, None))
    assert len(whole.every("attn[1]")) == 2 and len(one.every("attn[1].head[3]")) == 1
    assert not whole["attn[0].out"][:, 2].any() and whole["attn[0].out"][:, 1].any()
    for seen, head in ((one, 3), (two, 0), (two, 2)):
        assert (seen[f"attn[1].head[{head}]"] - whole["attn[1]"][:, head]).abs().max() <= 1e-6


def test_two_threads_watch_the_same_model() -> None:
    """Each hears its own calls alone."""
    module, ids, _ = made("llama", "gqa")
    counts: dict[int, int] = {}

    def run(times: int) -> None:
        with watch(module, "attn[0].head[1]") as seen:
            for _ in range(times):
                logits(module, ids, None)
        counts[times] = len(seen.every("attn[0].head[1]"))

    threads = [threading.Thread(target=run, args=(n,)) for n in (3, 5, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == {3: 3, 5: 5, 8: 8}


@pytest.mark.parametrize(("name", "tiny"), ABLE, ids=lambda value: value)
def test_heads_off_are_zeroed_columns_of_the_output_matrix(name: str, tiny: str) -> None:
    """One head, several of a layer, and every kind of attention in turn."""
    module, ids, source = made(name, tiny)
    attentions = {site.name: site for site in sites(module).values() if site.tap == "weights"}
    plain = logits(module, ids, source)
    for prefix in sorted({label.partition("[")[0] for label in attentions}):
        off = [f"{prefix}[0].head[1]", f"{prefix}[0].head[0]"]
        zeroed = copy.deepcopy(module)
        site = attentions[f"{prefix}[0]"]
        with torch.no_grad():
            zeroed.get_submodule(site.path).out.weight.unflatten(1, (site.heads, -1))[:, :2] = 0
        with heads_off(module, off):
            found = logits(module, ids, source)
        assert (found - logits(zeroed, ids, source)).abs().max() <= 1e-5
        assert (found - plain).abs().max() > 1e-4
    assert torch.equal(logits(module, ids, source), plain)
    with pytest.raises(InputError, match="no head"), heads_off(module, ["block[0]"]):
        pass


@pytest.mark.parametrize(("name", "tiny"), [*ABLE, ("lstm", "")], ids=lambda value: value)
def test_what_was_there_put_there_changes_nothing(name: str, tiny: str) -> None:
    """Every place that can be changed, with its own value: the result is equal to the bit. With zeros it is another."""
    module, ids, source = made(name, tiny)
    plain = logits(module, ids, source)
    places = [site.name for site in sites(module).values() if site.tap not in ("weights", "chosen", "pooled")]
    with torch.no_grad(), watch(module, *places) as seen:
        called(module, ids, source)
    for place in places:
        with patched(module, {place: seen[place]}):
            assert torch.equal(logits(module, ids, source), plain), place
        with patched(module, {place: torch.zeros_like}):
            assert not torch.equal(logits(module, ids, source), plain), place


def test_a_state_carries_a_run_into_another() -> None:
    """The whole stream of another text makes that text's answer; one position of it changes only what sees that position."""
    module, ids, _ = made("llama", "gqa")
    other = draw_ids(9, tuple(ids.shape), 90)
    for place in ("embed", "block[0]", "block[1].attn"):
        found = swapped(module, place, lambda: logits(module, other, None), lambda: logits(module, ids, None))
        assert torch.equal(found, logits(module, other, None)) or place == "block[1].attn"
    found = swapped(module, "block[0]", lambda: logits(module, other, None), lambda: logits(module, ids, None), at=[4])
    plain = logits(module, ids, None)
    assert torch.equal(found[:, :4], plain[:, :4]) and (found[:, 4:] - plain[:, 4:]).abs().amin((1, 2)).min() >= 0
    assert not torch.equal(found[:, 4], plain[:, 4])
    one = swapped(module, "attn[0].head[2].out", lambda: logits(module, other, None), lambda: logits(module, ids, None))
    assert not torch.equal(one, plain)


def test_changes_that_do_not_fit_are_refused() -> None:
    module, ids, _ = made("llama", "gqa")
    with pytest.raises(InputError, match="change attn\\[0\\].out"), patched(module, {"attn[0]": torch.zeros(1)}):
        pass
    with pytest.raises(InputError, match="has the shape"), patched(module, {"block[0]": torch.zeros(2, 3, 4)}):
        logits(module, ids, None)
    with pytest.raises(InputError, match="the positions 0 to 8 here, not 9"), patched(module, {"block[0]": torch.zeros_like}, at=[9]):
        logits(module, ids, None)


def test_gradients_flow_through_what_is_watched() -> None:
    module, ids, _ = made("llama", "gqa")
    with watch(module, "block[0]") as seen:
        loss = called(module, ids).logits.square().mean()
    (grad,) = torch.autograd.grad(loss, [seen["block[0]"]])
    assert grad.abs().max() > 0


def test_a_loaded_model_generates_the_same_and_keeps_its_native_core(tmp_path: Path) -> None:
    """Watched generation: as many maps as tokens, the same ids as without, and the native core runs again afterwards."""
    page = family("llama")
    module = initialised(page.build(page.tiny["gqa"])).eval()
    transept.save(Model(module, page, None, page.tiny["gqa"]), tmp_path)
    m = transept.load(tmp_path)
    plain = m.generate([5, 6, 7], max_tokens=6).ids
    native = m.lowered()
    assert native is not None, "the native core did not run, so nothing was shown"
    with transept.watch(m, "attn[1].head[2]", "hidden") as seen:
        assert m.generate([5, 6, 7], max_tokens=6).ids == plain
    shapes = [tuple(value.shape) for value in seen.every("attn[1].head[2]")]
    assert shapes == [(1, 3, 3), *((1, 1, 4 + i) for i in range(5))]
    assert m.lowered() is native
    ids = torch.tensor([[5, 6, 7, *plain[:-1]]])
    with transept.watch(m, "attn[1].head[2]") as once, torch.no_grad():
        m.look()(ids)
    for i, value in enumerate(seen.every("attn[1].head[2]")[1:]):
        assert (value[0, 0] - once["attn[1].head[2]"][0, 3 + i, : 4 + i]).abs().max() <= 1e-5
