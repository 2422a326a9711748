"""ALBERT (Lan et al. 2019, arXiv 1909.11942): one layer's weights for all, a narrow embedding, sentence order for next sentence. Row 66."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transept.blocks.encoder import EncoderEmbedding, SharedStack
from transept.blocks.positions import Learned
from transept.core.registry import Family
from transept.mapping import Row
from transept.models.encoders import (
    BERT_FIELDS,
    BERT_FIXED,
    House,
    Kind,
    both,
    choice,
    classes,
    drops,
    layer,
    masked,
    mlm,
    pooled,
    pretrain,
    rows,
    span,
    wired,
)
from transept.models.text.bert import CLASSIFIER, EMBED, POSITIONS, QA, SEGMENTS, BertSpec, attention, block, embedding
from transept.ops.activations import Act


@dataclass(frozen=True, kw_only=True)
class AlbertSpec(BertSpec):
    """A row of the paper's table 1: `groups` sets of weights, each of `inner` layers, serve all `layers`."""

    groups: int = 1
    inner: int = 1


def parts(s: AlbertSpec) -> tuple[EncoderEmbedding, SharedStack]:
    """The diagram below the head."""
    embed = embedding(s, Learned(s.context, s.width))
    groups = [[block(s, attention(s)) for _ in range(s.inner)] for _ in range(s.groups)]
    return embed, SharedStack(groups, [int(i / (s.layers / s.groups)) for i in range(s.layers)])


build = wired(parts, pretrain)


def _size(dim: int, layers: int, heads: int, ffn: int, vocab: int = 30000, context: int = 512, **rest: Any) -> AlbertSpec:
    sizes = {"vocab": vocab, "width": 128, "dim": dim, "layers": layers, "heads": heads, "ffn": ffn, "context": context}
    return AlbertSpec(**{**sizes, "segments": 2, "act": Act.GELU_TANH, **rest})


SIZES = {
    "albert-base": _size(768, 12, 12, 3072),
    "albert-large": _size(1024, 24, 16, 4096),
    "albert-xlarge": _size(2048, 24, 16, 8192),
    "albert-xxlarge": _size(4096, 12, 64, 16384),
}
TINY = {
    "shared": _size(32, 3, 4, 48, 96, 64, width=16),
    "groups": _size(32, 4, 2, 48, 96, 64, width=16, groups=2, inner=2),
    "labels": _size(32, 2, 2, 48, 96, 64, width=16, labels=("no", "yes", "maybe")),
}

LAYER = layer(
    ("attn.q", "attention.query"),
    ("attn.k", "attention.key"),
    ("attn.v", "attention.value"),
    ("attn.out", "attention.dense"),
    ("attn_norm", "attention.LayerNorm"),
    ("mlp.up", "ffn"),
    ("mlp.down", "ffn_output"),
    ("mlp_norm", "full_layer_layer_norm"),
    foreign="{root}encoder.albert_layer_groups.{g}.albert_layers.{i}",
    native="stack.layers.{g}.{i}",
)
POOL = both("head.pool", "{root}pooler")
PROJECT = tuple(Row(f"embed.project.{leaf}", f"{{root}}encoder.embedding_hidden_mapping_in.{leaf}") for leaf in ("weight", "bias"))
_MLM = ("predictions.dense", "predictions.LayerNorm", "predictions.bias", "predictions.decoder.weight", "predictions.decoder.bias")
_SOP = "sop_classifier.classifier"
_BARE = drops("{root}pooler", _SOP)
ALBERT = House(
    "albert",
    "albert.",
    rows=(*EMBED, SEGMENTS, POSITIONS, *PROJECT, *LAYER),
    fields=(
        *BERT_FIELDS,
        ("context", "max_position_embeddings"),
        ("width", "embedding_size"),
        ("groups", "num_hidden_groups", 1),
        ("inner", "inner_group_num", 1),
    ),
    fixed={**BERT_FIXED, "net_structure_type": 0, "num_memory_blocks": 0, "gap_size": 0, "down_scale_factor": 1},
    # Settings of generation that early libraries wrote into every configuration, and a rate of dropout.
    inert=(
        "classifier_dropout_prob",
        "num_beams",
        "num_return_sequences",
        "output_past",
        "max_length",
        "length_penalty",
        "repetition_penalty",
        "temperature",
        "top_k",
        "top_p",
        "do_sample",
    ),
    index={"g": lambda s: range(s.groups), "i": lambda s: range(s.inner)},
)
KINDS = (
    Kind(
        "AlbertForPreTraining",
        pretrain,
        (*masked(*_MLM, native="head.mlm"), *both("head.next.pool", "{root}pooler"), *both("head.next.out", _SOP)),
    ),
    Kind("AlbertForMaskedLM", mlm, (*masked(*_MLM), *_BARE)),
    Kind("AlbertModel", pooled(), POOL),
    Kind("AlbertForSequenceClassification", rows(), (*POOL, *CLASSIFIER), labelled=True),
    Kind("AlbertForTokenClassification", classes, (*CLASSIFIER, *_BARE), labelled=True),
    Kind("AlbertForQuestionAnswering", span, (*QA, *_BARE)),
    Kind("AlbertForMultipleChoice", choice(), (*POOL, *CLASSIFIER)),
)

FAMILY = Family(
    name="albert",
    spec=AlbertSpec,
    build=build,
    sizes=SIZES,
    tiny=TINY,
    published=ALBERT.forms(parts, KINDS),
    source="https://arxiv.org/abs/1909.11942",
)
