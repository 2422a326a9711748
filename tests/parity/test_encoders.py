"""Every encoder family with every head against transformers, from its own random tiny models, both ways, with padding and segments."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from jaxtyping import TypeCheckError
from safetensors.torch import load_file, save_file
from torch import Tensor

import transept
from tests.parity.mirror import Mirror, mirror
from transept.core.errors import InputError
from transept.core.registry import family

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "max_position_embeddings": 40,
}
THREE = {"id2label": {0: "no", 1: "yes", 2: "maybe"}, "label2id": {"no": 0, "yes": 1, "maybe": 2}}
HEADS = ("ForMaskedLM", "Model", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
WRITERS = ("ForCausalLM", "LMHeadModel")
DEBERTA = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0, "position_biased_input": False}
V3 = {**DEBERTA, "position_buckets": 8, "max_relative_positions": 40, "norm_rel_ebd": "layer_norm", "share_att_key": True}

Case = tuple[str, dict[str, Any]]


def cases() -> dict[str, Case]:
    """Label -> (architecture, configuration fields)."""
    every: dict[str, Case] = {}
    more = {
        "Bert": ("ForPreTraining", "ForNextSentencePrediction", "ForMultipleChoice", "LMHeadModel"),
        "Roberta": ("ForMultipleChoice", "ForCausalLM"),
        "XLMRoberta": ("ForMultipleChoice", "ForCausalLM"),
        "DistilBert": ("ForMultipleChoice",),
        "Albert": ("ForPreTraining", "ForMultipleChoice"),
        "Electra": ("ForPreTraining", "ForMultipleChoice", "ForCausalLM"),
        "Deberta": (),
        "DebertaV2": ("ForMultipleChoice",),
        "RoFormer": ("ForMultipleChoice", "ForCausalLM"),
    }
    own = {
        "Deberta": DEBERTA,
        "DebertaV2": V3,
        "Albert": {"embedding_size": 24},
        "Electra": {"embedding_size": 24},
        "RoFormer": {"embedding_size": 24},
    }
    for name, heads in more.items():
        for head in (*HEADS, *heads):
            writes = {"is_decoder": True} if head in WRITERS else {}
            every[f"{name}{head}"] = (f"{name}{head}", {**own.get(name, {}), **writes})
    return every | {
        "bert, 8 layers, relu": ("BertForMaskedLM", {"num_hidden_layers": 8, "hidden_act": "relu"}),
        "roberta, 8 layers": ("RobertaForMaskedLM", {"num_hidden_layers": 8}),
        "albert, two groups of two": (
            "AlbertForMaskedLM",
            {"embedding_size": 24, "num_hidden_layers": 4, "num_hidden_groups": 2, "inner_group_num": 2},
        ),
        "electra, wide": ("ElectraForPreTraining", {"embedding_size": 64}),
        "roformer, wide": ("RoFormerForMaskedLM", {"embedding_size": 64}),
        "deberta, absolute and segments": ("DebertaForMaskedLM", {**DEBERTA, "position_biased_input": True, "type_vocab_size": 2}),
        "deberta, c2p only": ("DebertaModel", {**DEBERTA, "pos_att_type": ["c2p"]}),
        "deberta, p2c only": ("DebertaModel", {**DEBERTA, "pos_att_type": "p2c"}),
        "deberta, short span": ("DebertaModel", {**DEBERTA, "max_relative_positions": 6}),
        "deberta v2, convolution": ("DebertaV2ForMaskedLM", {**V3, "conv_kernel_size": 3, "conv_act": "tanh"}),
        "deberta v2, own position keys": (
            "DebertaV2ForMaskedLM",
            {**V3, "share_att_key": False, "norm_rel_ebd": "none", "position_buckets": -1},
        ),
        "deberta v3, 8 layers": ("DebertaV2ForMaskedLM", {**V3, "num_hidden_layers": 8}),
    }


CASES = cases()
NAMES = {
    "DistilBert": {
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "intermediate_size": "hidden_dim",
    }
}


def config(architecture: str, changes: dict[str, Any]) -> Any:
    """The tiny configuration of an architecture."""
    cls = getattr(tf, architecture).config_class
    known = {**SIZES, **changes, **(THREE if "Classification" in architecture else {})}
    renamed = NAMES.get("DistilBert", {}) if architecture.startswith("DistilBert") else {}
    return cls(**{renamed.get(name, name): value for name, value in known.items()})


@functools.cache
def pair(label: str) -> Mirror:
    architecture, changes = CASES[label]
    return mirror(architecture, config(architecture, changes))


every = pytest.mark.parametrize("label", CASES)


def inputs(m: Mirror, batch: int = 3, length: int = 33, seed: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:
    """ids, mask and segments: rows of different lengths, padded on the right with the family's padding token."""
    lengths = torch.tensor([length, length - 7, 5])[:batch]
    # RoFormer's choice reads the last column, whatever stands there.
    lengths = lengths.where(torch.tensor("RoFormerForMultipleChoice" != m.cls.__name__), torch.tensor(length))
    mask = torch.arange(length) < lengths[:, None]
    pad = m.theirs.config.pad_token_id or 0
    ids = m.ids(batch, length, seed).where(mask, torch.tensor(pad))
    segments = ((torch.arange(length) >= lengths[:, None] // 2) & mask).long()
    return ids, mask, segments if getattr(m.ours.spec, "segments", 0) > 1 else None


def theirs(m: Mirror, ids: Tensor, mask: Tensor, segments: Tensor | None) -> dict[str, Tensor]:
    """What transformers computes, under our names."""
    rest = {} if segments is None else {"token_type_ids": segments}
    choices = m.cls.__name__.endswith("ForMultipleChoice")
    if choices:
        ids, mask, rest = ids[None], mask[None], {name: value[None] for name, value in rest.items()}
    out = m.theirs(input_ids=ids, attention_mask=mask.long(), **rest)
    named = {
        "logits": ("logits", "prediction_logits"),
        "nsp": ("seq_relationship_logits", "sop_logits"),
        "start": ("start_logits",),
        "end": ("end_logits",),
        "hidden": ("last_hidden_state",),
        "pooled": ("pooler_output",),
    }
    found = {ours: out[name] for ours, names in named.items() for name in names if out.get(name) is not None}
    return {name: value.T if choices else value for name, value in found.items()}


def ours(m: Mirror, ids: Tensor, mask: Tensor, segments: Tensor | None) -> dict[str, Tensor]:
    return vars(m.ours.model(ids, mask=mask, segments=segments))


def compared(m: Mirror, ids: Tensor, mask: Tensor, segments: Tensor | None) -> list[tuple[str, Tensor, Tensor]]:
    """(name, ours, theirs) of every result, at the real tokens where it is one for each token."""
    expected, found = theirs(m, ids, mask, segments), ours(m, ids, mask, segments)
    assert expected and expected.keys() <= found.keys()
    per_token = {name for name, value in expected.items() if value.shape[:2] == mask.shape}
    return [
        (name, found[name][mask] if name in per_token else found[name], value[mask] if name in per_token else value)
        for name, value in expected.items()
    ]


@every
def test_outputs_are_equal(label: str) -> None:
    m = pair(label)
    with torch.no_grad():
        for name, found, expected in compared(m, *inputs(m)):
            assert found.shape == expected.shape, name
            assert expected.std() > 0.2 or expected.numel() < 20, f"{name} is too small for an absolute tolerance"
            off = (found - expected).abs().max().item()
            assert off <= (1e-4 if m.ours.spec.layers > 6 else 1e-5), f"{name} is off by {off:.1e}"


@every
def test_without_a_mask_or_segments(label: str) -> None:
    m = pair(label)
    ids = m.ids(2, 19, seed=3)
    with torch.no_grad():
        expected, found = theirs(m, ids, torch.ones_like(ids).bool(), None), vars(m.ours.model(ids))
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= (1e-4 if m.ours.spec.layers > 6 else 1e-5), name


@every
def test_gradients_are_equal(label: str) -> None:
    """Of a loss over every result, for every parameter, carried through the weight map."""
    architecture, changes = CASES[label]
    m = mirror(architecture, config(architecture, changes))
    loss, our_loss = torch.zeros(()), torch.zeros(())
    for name, found, expected in compared(m, *inputs(m)):
        weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(len(name)))
        loss, our_loss = loss + (weight * expected).mean(), our_loss + (weight * found).mean()
    largest = 0.0
    for name, (mine, other) in m.gradients(loss, our_loss).items():
        scale = other.abs().max().item()
        largest = max(largest, scale)
        # One vector added to all keys changes no softmax: what is left there is rounding.
        near = 1e-6 if name.endswith(("attn.k.bias",)) else 1e-4 * scale + 1e-7
        assert (mine - other).abs().max() <= near, name
    assert largest > 1e-3


@every
def test_transformers_reads_what_is_saved(label: str, tmp_path: Path) -> None:
    m = pair(label)
    transept.save(m.ours, tmp_path)
    again, info = m.cls.from_pretrained(tmp_path, output_loading_info=True, attn_implementation="eager")
    # RoFormer's table of sines is worked out on both sides.
    assert all(key.endswith("embed_positions.weight") for key in info["missing_keys"]) and not info["unexpected_keys"]
    ids, mask, segments = inputs(m, seed=5)
    with torch.no_grad():
        before = theirs(m, ids, mask, segments)
        m_again = Mirror.__new__(Mirror)
        m_again.__dict__.update({**vars(m), "theirs": again.eval()})
        for name, value in theirs(m_again, ids, mask, segments).items():
            assert (value - before[name]).abs().max() <= 1e-6, name
    if "Classification" in m.cls.__name__:
        assert m.ours.spec.labels == ("no", "yes", "maybe")
        assert again.config.id2label == {0: "no", 1: "yes", 2: "maybe"}


@pytest.mark.parametrize("label", [label for label in CASES if label.endswith(WRITERS)])
def test_what_writes_goes_on_as_transformers_does(label: str) -> None:
    """Word for word by whole calls: transformers' own loop counts RoBERTa's positions from 0, where its table has them from 2."""
    m = pair(label)
    for seed, length in enumerate((1, 9, 20)):
        ids = m.ids(1, length, seed)
        found = m.ours.generate(ids, max_tokens=15, ignore_end=True).ids
        with torch.no_grad():
            for _ in range(15):
                ids = torch.cat((ids, m.theirs(ids).logits[:, -1:].argmax(-1)), 1)
        assert found == ids[0, length:].tolist() and len(set(found)) > 1


PUBLISHED = {
    ("bert", "bert-base", "BertForPreTraining"): 110_106_428,
    ("bert", "bert-large", "BertForPreTraining"): 336_226_108,
    ("bert", "bert-base", "BertModel"): 109_482_240,
    ("bert", "bert-large", "BertModel"): 335_141_888,
    ("roberta", "roberta-base", "RobertaForMaskedLM"): 124_697_433,
    ("distilbert", "distilbert-base", "DistilBertModel"): 66_362_880,
    ("albert", "albert-base", "AlbertModel"): 11_683_584,
    ("electra", "electra-small", "ElectraForPreTraining"): 13_549_057,
    ("deberta", "deberta-base", "DebertaModel"): 138_601_728,
}


@pytest.mark.parametrize(("key", "expected"), PUBLISHED.items(), ids=lambda v: "-".join(v[1:]) if isinstance(v, tuple) else "")
def test_parameters_are_those_published(key: tuple[str, str, str], expected: int) -> None:
    fam, size, architecture = key
    page = family(fam)
    with torch.device("meta"):
        model = (page.form(architecture).build or page.build)(page.sizes[size])
    assert sum(p.numel() for p in model.parameters()) == expected


def test_every_form_is_here() -> None:
    """No published form of these families goes without a parity case."""
    tested = {architecture for architecture, _ in CASES.values()}
    for name in ("bert", "roberta", "distilbert", "albert", "electra", "deberta", "roformer"):
        assert {form.architecture for form in family(name).published} <= tested


def test_old_spelling_is_read(tmp_path: Path) -> None:
    """The first BERT checkpoints say gamma and beta for a norm's weight and bias."""
    m = pair("BertForMaskedLM")
    tensors = load_file(m.folder / "model.safetensors")
    save_file(
        {k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v for k, v in tensors.items()},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    (tmp_path / "config.json").write_text((m.folder / "config.json").read_text())
    again = transept.load(tmp_path).model.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in m.ours.model.state_dict().items())


def test_wrong_segments_are_refused() -> None:
    m = pair("BertModel")
    ids = m.ids(2, 6)
    # The shape checker of the tests is quicker than the module.
    with pytest.raises((InputError, TypeCheckError), match="segments"):
        m.ours.model(ids, segments=torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(InputError, match="token id 2"):
        m.ours.model(ids, segments=torch.full_like(ids, 2))
    with pytest.raises(InputError, match="second segment"):
        pair("DistilBertModel").ours.model(ids, segments=torch.ones_like(ids))
    with pytest.raises(InputError, match="41.*40|40.*41"):
        m.ours.model(m.ids(1, 41))
