"""Watched attention against transformers' eager attention and against the equation by hand, for every family, while fused kernels run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.contracts.decoders import initialised
from tests.inspection.reference import hands
from tests.parity import test_decoders as decoders
from tests.parity import test_encoders as encoders
from tests.parity import test_seq2seq as pairs
from tests.parity.mirror import mirror
from transept.blocks.alignment import After, Before
from transept.blocks.seq2seq import EncoderDecoder
from transept.core.registry import Family, all_families
from transept.inspection.attention import called
from transept.inspection.sites import layers
from transept.inspection.watch import watch

LONG = {"longformer": 24, "bigbird": 60, "sparse": 40, "gpt_neo": 24}
CASES = [(page, name) for page in all_families() for name in page.tiny if page.name not in ("glove", "word2vec")]


def made(page: Family, tiny: str, length: int = 9) -> tuple[nn.Module, Tensor, Tensor | None]:
    """A tiny model with ids, and a source for an encoder-decoder."""
    spec: Any = page.tiny[tiny]
    module = initialised(page.build(spec), gain=1.0).eval()
    gen = torch.Generator().manual_seed(1)
    ids = torch.randint(4, spec.vocab, (2, length), generator=gen)
    if page.name == "longformer":
        ids[:, 2:4] = spec.separator
    source = torch.randint(4, getattr(spec, "source_vocab", spec.vocab), (2, length + 2), generator=gen)
    return module, ids, source if isinstance(module, EncoderDecoder) else None


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Counts the calls of the fused kernel."""
    calls, kernel = [0], F.scaled_dot_product_attention

    def counted(*args: Any, **rest: Any) -> Tensor:
        calls[0] += 1
        return kernel(*args, **rest)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    yield calls


def outputs(found: Any) -> list[Tensor]:
    return [value for value in vars(found).values() if isinstance(value, Tensor)]


@pytest.mark.parametrize(("page", "tiny"), CASES, ids=lambda value: value if isinstance(value, str) else value.name)
def test_watched_is_computed_by_hand(page: Family, tiny: str, fused: list[int]) -> None:
    """Every head of every layer to 1e-5, rows of sum 1, the fused kernel as busy as without, and the result equal to the bit."""
    module, ids, source = made(page, tiny, LONG.get(page.name, 9))
    found = [layer for layer in layers(module) if not isinstance(module.get_submodule(layer.path), After | Before)]
    names = [layer.name for layer in found]
    if not names:
        pytest.skip(f"{page.name} {tiny} has no attention over keys and values; what recurrent decoders look at is tested below")
    with torch.no_grad():
        plain = outputs(called(module, ids, source))
        quiet, fused[0] = fused[0], 0
        with watch(module, *names, *(f"{name}.head[1]" for name in names)) as seen:
            watched = outputs(called(module, ids, source))
    assert fused[0] == quiet > 0
    assert len(plain) == len(watched) > 0 and all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    naive = hands(module, ids, **({} if source is None else {"source": source}))
    for layer in found:
        uses = [one for one in found if one.path == layer.path]
        if len(uses) > 1:
            continue
        expected = naive[layer.name]
        assert (seen[layer.name] - expected).abs().max() <= 1e-5, layer.name
        assert (seen[f"{layer.name}.head[1]"] - expected[:, 1]).abs().max() <= 1e-5
        assert (seen[layer.name].sum(-1) - 1).abs().max() <= 1e-5
    assert all(len(seen.every(name)) == 1 for name in names)


THEIRS: dict[str, Any] = {
    "llama": lambda: mirror("LlamaForCausalLM", decoders.llama()),
    "gpt2": lambda: mirror("GPT2LMHeadModel", decoders.gpt2()),
    "opt": lambda: mirror("OPTForCausalLM", decoders.opt()),
    "deepseek_v3": lambda: mirror("DeepseekV3ForCausalLM", decoders.deepseek()),
    "bert": lambda: encoders.pair("BertForMaskedLM"),
    "albert": lambda: encoders.pair("AlbertForMaskedLM"),
    "deberta": lambda: encoders.pair("DebertaForMaskedLM"),
    "deberta v2": lambda: encoders.pair("DebertaV2ForMaskedLM"),
    "roformer": lambda: encoders.pair("RoFormerForMaskedLM"),
    "electra": lambda: encoders.pair("ElectraForMaskedLM"),
    "t5": lambda: mirror("T5ForConditionalGeneration", pairs.t5()),
    "bart": lambda: mirror("BartForConditionalGeneration", pairs.bart()),
    "transformer": lambda: mirror("MarianMTModel", pairs.marian()),
}


@pytest.mark.parametrize("name", THEIRS)
def test_watched_is_transformers_eager_attention(name: str) -> None:
    """The maps that transformers gives out when it computes attention eagerly."""
    m = THEIRS[name]()
    ids, source = m.ids(2, 9), None
    with torch.no_grad():
        if isinstance(m.ours.model, EncoderDecoder):
            source = m.ids(2, 11, seed=1)
            out = m.theirs(input_ids=source, decoder_input_ids=ids, output_attentions=True)
            theirs = {"encoder.attn": out.encoder_attentions, "attn": out.decoder_attentions, "cross": out.cross_attentions}
        else:
            theirs = {"attn": m.theirs(input_ids=ids, output_attentions=True).attentions}
        expected = {f"{kind}[{i}]": weights for kind, every in theirs.items() for i, weights in enumerate(every)}
        with watch(m.ours, *expected) as seen:
            called(m.ours, ids, source)
    assert {layer.name for layer in layers(m.ours.model)} == set(expected)
    for label, weights in expected.items():
        assert (seen[label] - weights).abs().max() <= 1e-5, label


@pytest.mark.parametrize("look", ["bahdanau", "luong"])
def test_recurrent_decoders_tell_what_they_look_at(look: str) -> None:
    """Each step's weights from the states around it (Bahdanau et al. 2014, appendix A.1.2; Luong et al. 2015, eq. 7 and 8)."""
    page = next(page for page in all_families() if page.name == "seq2seq")
    module, ids, source = made(page, look)
    with torch.no_grad(), watch(module, "cross[0]", "cross[0].head[0]", "cell.hidden") as seen:
        out = called(module, ids, source)
        plain = out.logits
    assert torch.equal(plain, called(module, ids, source).logits)
    memory, score = out.encoded, module.decoder.attend.score
    states = torch.cat(seen.every("cell.hidden"), 1)
    if look == "bahdanau":
        begin = module.decoder.begin(module.encode(source))
        states = torch.cat((begin[:, None], states[:, :-1]), 1)
    for b, t in ((b, t) for b in range(ids.shape[0]) for t in range(ids.shape[1])):
        h = states[b, t]
        if look == "bahdanau":
            scores = torch.stack([score.v.weight[0] @ (score.w.weight @ h + score.u.weight @ key).tanh() for key in memory[b]])
        else:
            scores = torch.stack([h @ (score.w.weight @ key) for key in memory[b]])
        grown = (scores - scores.max()).exp()
        assert (seen["cross[0]"][b, 0, t] - grown / grown.sum()).abs().max() <= 1e-5
    assert torch.equal(seen["cross[0].head[0]"], seen["cross[0]"][:, 0])


def test_a_layer_that_is_used_again_is_watched_each_time() -> None:
    """ALBERT's one layer at three depths: each depth has its own map, as transformers' model shows."""
    page = next(page for page in all_families() if page.name == "albert")
    module, ids, _ = made(page, "shared")
    depth = [layer.name for layer in layers(module)]
    with torch.no_grad(), watch(module, *depth, "block[*]") as seen:
        called(module, ids)
    assert len(depth) > 1 and all(len(seen.every(name)) == 1 for name in depth)
    x = seen["block[0]"]
    for i in range(1, len(depth)):
        assert (seen[depth[i]] - seen[depth[i - 1]]).abs().max() > 1e-4
        assert (seen[f"block[{i}]"] - x).abs().max() > 1e-4
        x = seen[f"block[{i}]"]
