"""Longformer and BigBird against transformers; the Sparse Transformer, which it lacks, against a naive loop (rows 43-49)."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

import transept
from tests.parity.mirror import Mirror, mirror
from transept.core.errors import ConfigError, InputError
from transept.core.registry import family, size
from transept.core.tap import listening

SIZES = {"vocab_size": 96, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 80, "num_hidden_layers": 2}
THREE = {"id2label": {0: "no", 1: "yes", 2: "maybe"}, "label2id": {"no": 0, "yes": 1, "maybe": 2}}
DROPLESS = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LONG = {
    **SIZES,
    "max_position_embeddings": 706,
    "attention_window": [16, 32],
    "pad_token_id": 1,
    "sep_token_id": 2,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
}
BIG = {**SIZES, "max_position_embeddings": 1100, "block_size": 16, "num_random_blocks": 2, "pad_token_id": 0, **DROPLESS}
LONG_FORMS = ("MaskedLM", "SequenceClassification", "QuestionAnswering", "TokenClassification", "MultipleChoice")
BIG_FORMS = (
    "ForPreTraining",
    "ForMaskedLM",
    "Model",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForMultipleChoice",
    "ForQuestionAnswering",
)


@functools.cache
def longformer(form: str) -> Mirror:
    more = THREE if "Classification" in form else {}
    return mirror(f"Longformer{form}", tf.LongformerConfig(**{**LONG, **more}))


@functools.cache
def bigbird(form: str, kind: str = "block_sparse") -> Mirror:
    more = THREE if "Classification" in form else {}
    return mirror(f"BigBird{form}", tf.BigBirdConfig(**{**BIG, **more, "attention_type": kind}))


def inputs(m: Mirror, length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two rows, the second padded on the right."""
    ids = m.ids(2, length, seed)
    mask = torch.arange(length) < torch.tensor([[length], [length - length // 3]])
    return ids.where(mask, torch.tensor(m.theirs.config.pad_token_id)), mask


def near(ours: Tensor, theirs: Tensor, limit: float = 1e-5) -> None:
    assert ours.shape == theirs.shape and theirs.abs().mean() > 0.01
    off = (ours - theirs).abs().max().item()
    assert off <= limit, f"off by {off:.2e}"


def same_gradients(m: Mirror, theirs: Tensor, ours: Tensor) -> None:
    pull = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(3))
    for name, (mine, other) in m.gradients((theirs * pull).mean(), (ours * pull).mean()).items():
        if name.endswith((".k.bias", ".k_all.bias")):
            # one vector added to all keys moves all scores of a query alike: this gradient is nothing but rounding
            continue
        off = (mine - other).norm() / other.norm().clamp(min=1e-5)
        assert off <= 1e-4, f"{name}: relative {off:.2e}"
    m.theirs.zero_grad(set_to_none=True)
    m.ours.model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("length", [64, 41, 640])
@pytest.mark.parametrize("form", ["Model", "ForMaskedLM"])
def test_longformer_with_local_attention_and_with_global_tokens(form: str, length: int) -> None:
    """640 tokens take the sparse way, the others the dense one."""
    m = longformer(form)
    ids, mask = inputs(m, length)
    chosen = torch.zeros_like(mask)
    chosen[0, [0, 7, length - 1]] = chosen[1, 3] = True
    for everywhere in (None, chosen):
        flags = None if everywhere is None else everywhere.long()
        with torch.no_grad():
            theirs = m.theirs(input_ids=ids, attention_mask=mask.long(), global_attention_mask=flags)
            ours = m.ours.model(ids, mask=mask, everywhere=everywhere)
        if form == "Model":
            near(ours.hidden[mask], theirs.last_hidden_state[mask])
            near(ours.pooled, theirs.pooler_output)
        else:
            near(ours.logits[mask], theirs.logits[mask])


def test_longformer_gradients() -> None:
    m = longformer("ForMaskedLM")
    ids, mask = inputs(m, 640)
    chosen = torch.zeros_like(mask)
    chosen[:, [0, 5]] = True
    theirs = m.theirs(input_ids=ids, attention_mask=mask.long(), global_attention_mask=chosen.long()).logits[mask]
    same_gradients(m, theirs, m.ours.model(ids, mask=mask, everywhere=chosen).logits[mask])


@pytest.mark.parametrize("form", LONG_FORMS[1:])
def test_longformer_heads_choose_their_global_tokens(form: str) -> None:
    m = longformer(f"For{form}")
    ids, mask = inputs(m, 64)
    if form in ("QuestionAnswering", "MultipleChoice"):
        ids = ids.where(ids != 2, torch.tensor(5))
        ids[0, [9, 10, 60]] = ids[1, [4, 5, 40]] = 2
    if form == "MultipleChoice":
        theirs = m.theirs(input_ids=ids[None], attention_mask=mask.long()[None]).logits.T
        near(m.ours.model(ids, mask=mask).logits, theirs)
        return
    theirs, ours = m.theirs(input_ids=ids, attention_mask=mask.long()), m.ours.model(ids, mask=mask)
    if form == "QuestionAnswering":
        near(ours.start[mask], theirs.start_logits[mask])
        near(ours.end[mask], theirs.end_logits[mask])
        with pytest.raises(InputError, match="separator 2"):
            m.ours.model(torch.full((1, 8), 5))
    elif form == "TokenClassification":
        near(ours.logits[mask], theirs.logits[mask])
    else:
        near(ours.logits, theirs.logits)
        same_gradients(m, theirs.logits, ours.logits)


@pytest.mark.parametrize("form", ["Model", *(f"For{form}" for form in LONG_FORMS)])
def test_transformers_loads_the_longformer_that_this_library_saves(form: str, tmp_path: Path) -> None:
    m = longformer(form)
    again = m.reloaded(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), m.theirs.state_dict().values(), strict=True))


def test_a_dilated_layer_sees_its_steps() -> None:
    page = family("longformer")
    model = page.build(page.tiny["dilated"]).eval()
    heard: dict[str, Tensor] = {}

    class Ear:
        def wants(self, owner: object, name: str) -> bool:
            return name == "weights"

        def hear(self, owner: object, name: str, value: Any) -> Any:
            if name == "weights":
                heard[str(len(heard))] = value
            return value

    with listening(Ear()), torch.no_grad():
        model(torch.arange(40)[None])
    for weights, (reach, step) in zip(heard.values(), ((2, 1), (4, 2)), strict=True):
        seen = [[abs(q - k) % step == 0 and abs(q - k) <= reach * step for k in range(40)] for q in range(40)]
        assert (weights[0, 0] > 0).tolist() == seen


def results(m: Mirror, ids: Tensor, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
    choices = "MultipleChoice" in m.cls.__name__
    if "QuestionAnswering" in m.cls.__name__:
        ids = ids.where(ids != 66, torch.tensor(5))
        ids[0, [9, 40]] = ids[1, [4, 30]] = 66
    theirs = m.theirs(input_ids=ids[None] if choices else ids, attention_mask=mask.long()[None] if choices else mask.long())
    ours = m.ours.model(ids, mask=mask)
    if choices:
        return [(ours.logits, theirs.logits.T)]
    pairs = [
        (getattr(ours, a), theirs[b])
        for a, b in (
            ("logits", "logits"),
            ("logits", "prediction_logits"),
            ("nsp", "seq_relationship_logits"),
            ("pooled", "pooler_output"),
            ("hidden", "last_hidden_state"),
            ("start", "start_logits"),
            ("end", "end_logits"),
        )
        if b in theirs
    ]
    assert pairs
    return [(a[mask], b[mask]) if a.shape[:2] == mask.shape else (a, b) for a, b in pairs]


@pytest.mark.parametrize("kind", ["original_full", "block_sparse"])
@pytest.mark.parametrize("form", BIG_FORMS)
def test_bigbird_in_evaluation(form: str, kind: str) -> None:
    """160 tokens are ten blocks, one more than see everything; 150 leave the last block short; 608 take the sparse way."""
    for length in (160, 150, 608) if form == "ForMaskedLM" else (150,):
        m = bigbird(form, kind)
        with torch.no_grad():
            for ours, theirs in results(m, *inputs(m, length)):
                # The question's scores are a million lower, where float32 has no room for 1e-5.
                far = theirs < -1e5
                assert torch.equal(ours < -1e5, far) and bool(far.any()) == (form == "ForQuestionAnswering")
                near(ours[~far], theirs[~far])


def test_bigbird_that_writes_sees_everything_before() -> None:
    m = mirror("BigBirdForCausalLM", tf.BigBirdConfig(**{**BIG, "attention_type": "original_full", "is_decoder": True}))
    ids, mask = inputs(m, 70)
    theirs = m.theirs(input_ids=ids, attention_mask=mask.long()).logits
    ours = m.ours.model(ids, mask=mask).logits
    near(ours[mask].detach(), theirs[mask].detach())
    same_gradients(m, theirs[mask], ours[mask])
    with pytest.raises(ConfigError, match="original_full"):
        family("bigbird").form("BigBirdForCausalLM").build(m.ours.spec.replace(block=16))  # type: ignore[misc]


def test_bigbird_draws_the_published_random_blocks_in_training() -> None:
    m = bigbird("ForMaskedLM")
    m.theirs.train()
    m.ours.model.train()
    try:
        for length in (150, 600):
            ids, mask = inputs(m, length)
            ((ours, theirs),) = results(m, ids, mask)
            near(ours.detach(), theirs.detach())
            if length < 200:
                same_gradients(m, theirs, ours)
    finally:
        m.theirs.eval()
        m.ours.model.eval()


def test_the_early_plan_of_3072_tokens_is_the_published_one() -> None:
    config = tf.BigBirdConfig(**{**BIG, "block_size": 64, "max_position_embeddings": 4096, "num_hidden_layers": 1, "num_random_blocks": 3})
    m = mirror("BigBirdModel", config)
    m.theirs.train()
    m.ours.model.train()
    ids = m.ids(1, 3072)
    with torch.no_grad():
        near(m.ours.model(ids).hidden, m.theirs(input_ids=ids).last_hidden_state)


@pytest.mark.parametrize("form", BIG_FORMS)
def test_transformers_loads_the_bigbird_that_this_library_saves(form: str, tmp_path: Path) -> None:
    m = bigbird(form)
    transept.save(m.ours, tmp_path)
    again, info = m.cls.from_pretrained(tmp_path, output_loading_info=True)
    # its masked-word model owns a pooler that it never uses
    assert not info["unexpected_keys"] and all("pooler" in name for name in info["missing_keys"])
    if form in ("ForPreTraining", "Model", "ForMultipleChoice"):
        assert not info["missing_keys"]
    m2 = transept.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(m2.model.state_dict().values(), m.ours.model.state_dict().values(), strict=True))
    assert again.config.attention_type == "block_sparse"


@pytest.mark.parametrize(
    ("name", "architecture", "millions"),
    [
        ("longformer-base", "LongformerForMaskedLM", 148.7),
        ("bigbird-base", "BigBirdModel", 127.5),
        ("bigbird-base", "BigBirdForPreTraining", 128.1),
    ],
)
def test_parameter_counts(name: str, architecture: str, millions: float) -> None:
    page, spec = size(name)
    config = (
        tf.LongformerConfig(vocab_size=50265, max_position_embeddings=4098, type_vocab_size=1) if "long" in name else tf.BigBirdConfig()
    )
    with torch.device("meta"):
        theirs, ours = getattr(tf, architecture)(config), (page.form(architecture).build or page.build)(spec)
    count = sum(p.numel() for p in ours.parameters())
    assert count == sum(p.numel() for p in theirs.parameters())
    print(name, count)
    assert round(count / 1e6, 1) == millions


def naive(model: Any, ids: Tensor) -> Tensor:
    """The Sparse Transformer again, one token and one head at a time."""
    x = model.embed.tokens.weight[ids] + model.embed.position.weight[: len(ids)]
    for layer in model.stack.layers:
        attn, y = layer.attn, layer.attn_norm(x)
        out = torch.zeros_like(x)
        width = attn.head_dim
        for i in range(len(ids)):
            for h, rule in enumerate(attn.mask.masks):
                at = slice(h * width, (h + 1) * width)
                seen = [j for j in range(len(ids)) if rule.allow(torch.tensor(i), torch.tensor(j))]
                q, k, v = attn.q(y[i])[at], attn.k(y[seen])[:, at], attn.v(y[seen])[:, at]
                out[i, at] = (k @ q / width**0.5).softmax(0) @ v
        x = x + attn.out(out)
        x = x + layer.mlp(layer.mlp_norm(x))
    return model.head(model.stack.norm(x))


@pytest.mark.parametrize("tiny", ["fixed", "strided"])
def test_the_sparse_transformer_equals_a_naive_loop(tiny: str) -> None:
    page = family("sparse")
    torch.manual_seed(0)
    model = page.build(page.tiny[tiny]).eval()
    ids = torch.randint(96, (1, 18))
    with torch.no_grad():
        near(model(ids).logits[0], naive(model, ids[0]))


@pytest.mark.parametrize("tiny", ["fixed", "strided"])
def test_the_sparse_transformer_is_the_same_on_the_sparse_way(tiny: str) -> None:
    """At 640 tokens attention is computed by blocks; a short prefix, dense, must agree with it."""
    page = family("sparse")
    torch.manual_seed(0)
    model = page.build(page.tiny[tiny].replace(context=640, stride=32)).eval()
    ids = torch.randint(96, (1, 640))
    with torch.no_grad():
        near(model(ids).logits[:, :400], model(ids[:, :400]).logits)
        cache = model.cache(1)
        steps = torch.cat([model(part, cache=cache).logits for part in ids.split(90, 1)], 1)
        near(steps, model(ids).logits)
