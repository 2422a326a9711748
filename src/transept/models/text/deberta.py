"""DeBERTa v1 and v2/v3 (He et al. 2020, arXiv 2006.03654; 2021, 2111.09543): content and relative position attend separately. Row 68."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from transept.blocks.disentangled import DisentangledAttention, LocalConv, RelativeSpec, RelativeStack, RelativeTable
from transept.blocks.embeddings import TokenEmbedding
from transept.blocks.encoder import MaskedEmbedding
from transept.blocks.norms import LayerNorm
from transept.blocks.positions import Learned
from transept.core.errors import ConfigError
from transept.core.registry import Family
from transept.mapping import Derived, Drop, Given, Row, SplitHeads
from transept.models.encoders import (
    BERT_FIELDS,
    BERT_FIXED,
    House,
    Kind,
    bare,
    both,
    choice,
    classes,
    drops,
    gelu,
    layer,
    masked,
    mlm,
    rows,
    span,
    wired,
)
from transept.models.text.bert import CLASSIFIER, EMBED, MLM_NAMES, QA, BertSpec, block
from transept.ops.activations import Act


@dataclass(frozen=True, kw_only=True)
class DebertaSpec(BertSpec):
    """`relative` says how position enters attention; `absolute` adds it to the embedding too; `conv` is the width of v2's, 0 for none."""

    relative: RelativeSpec
    absolute: bool = False
    conv: int = 0


def parts(s: DebertaSpec) -> tuple[MaskedEmbedding, RelativeStack]:
    """The diagram below the head."""
    embed = MaskedEmbedding(
        TokenEmbedding(s.vocab, s.dim),
        LayerNorm(s.dim, s.eps),
        segments=TokenEmbedding(s.segments, s.dim) if s.segments else None,
        position=Learned(s.context, s.dim) if s.absolute else None,
    )
    table = RelativeTable(s.relative, s.dim, s.eps)
    layers = [block(s, DisentangledAttention(s.dim, s.heads, s.relative, table)) for _ in range(s.layers)]
    return embed, RelativeStack(layers, table, LocalConv(s.dim, s.conv, Act.TANH, s.eps) if s.conv else None)


build = wired(parts, mlm)

_V1 = RelativeSpec(span=512, limit=512)
_V3 = RelativeSpec(span=256, limit=512, buckets=True, shared=True, biased=True, normed=True)


def _size(vocab: int, dim: int, layers: int, heads: int, relative: RelativeSpec, context: int = 512, **rest: Any) -> DebertaSpec:
    sizes = {"vocab": vocab, "width": dim, "dim": dim, "layers": layers, "heads": heads, "ffn": 4 * dim, "context": context}
    return DebertaSpec(**{**sizes, "segments": 0, "eps": 1e-7, "relative": relative, **rest})


SIZES = {
    "deberta-base": _size(50265, 768, 12, 12, _V1),
    "deberta-large": _size(50265, 1024, 24, 16, _V1),
    "deberta-v2-xlarge": _size(128100, 1536, 24, 24, _V3, conv=3),
    "deberta-v3-xsmall": _size(128100, 384, 12, 6, _V3),
    "deberta-v3-small": _size(128100, 768, 6, 12, _V3),
    "deberta-v3-base": _size(128100, 768, 12, 12, _V3),
    "deberta-v3-large": _size(128100, 1024, 24, 16, _V3),
}
_TINY_V3 = RelativeSpec(span=8, limit=64, buckets=True, shared=True, biased=True, normed=True)
TINY = {
    "v1": _size(96, 32, 2, 4, RelativeSpec(span=16, limit=16), 64),
    "v2": _size(96, 32, 2, 4, _TINY_V3, 64, conv=3),
    "v3": _size(96, 32, 2, 2, _TINY_V3, 64),
    "labels": _size(96, 32, 2, 2, RelativeSpec(span=64, limit=64), 64, labels=("no", "yes", "maybe")),
}

_REST = (
    ("attn.out", "attention.output.dense"),
    ("attn_norm", "attention.output.LayerNorm"),
    ("mlp.up", "intermediate.dense"),
    ("mlp.down", "output.dense"),
    ("mlp_norm", "output.LayerNorm"),
)
_OURS, _THEIRS = "stack.layers.{l}.attn.", "{root}encoder.layer.{l}.attention.self."
_BODY = (
    *EMBED,
    Row("embed.segments.weight", "{root}embeddings.token_type_embeddings.weight", when=lambda s: s.segments > 0),
    Row("embed.position.weight", "{root}embeddings.position_embeddings.weight", when=lambda s: s.absolute),
    Drop("{root}embeddings.position_embeddings.weight"),
    Row("stack.table.weight", "{root}encoder.rel_embeddings.weight"),
    *layer(*_REST, foreign="{root}encoder.layer.{l}"),
)
_V1_ROWS = (
    *_BODY,
    Row(
        (f"{_OURS}q.weight", f"{_OURS}k.weight", f"{_OURS}v.weight"),
        f"{_THEIRS}in_proj.weight",
        SplitHeads(lambda s: s.heads, lambda s: [s.dim // s.heads] * 3),
    ),
    Row(f"{_OURS}q.bias", f"{_THEIRS}q_bias"),
    Row(f"{_OURS}v.bias", f"{_THEIRS}v_bias"),
    Row(f"{_OURS}k_position.weight", f"{_THEIRS}pos_proj.weight", when=lambda s: s.relative.c2p),
    *(Row(f"{_OURS}q_position.{leaf}", f"{_THEIRS}pos_q_proj.{leaf}", when=lambda s: s.relative.p2c) for leaf in ("weight", "bias")),
)
_V2_ROWS = (
    *_BODY,
    *layer(("q", "query_proj"), ("k", "key_proj"), ("v", "value_proj"), foreign=_THEIRS[:-1], native=_OURS[:-1]),
    *(
        Row(f"{_OURS}k_position.{leaf}", f"{_THEIRS}pos_key_proj.{leaf}", when=lambda s: s.relative.c2p and not s.relative.shared)
        for leaf in ("weight", "bias")
    ),
    *(
        Row(f"{_OURS}q_position.{leaf}", f"{_THEIRS}pos_query_proj.{leaf}", when=lambda s: s.relative.p2c and not s.relative.shared)
        for leaf in ("weight", "bias")
    ),
    *(
        Row(f"stack.table.norm.{leaf}", f"{{root}}encoder.LayerNorm.{leaf}", when=lambda s: s.relative.normed)
        for leaf in ("weight", "bias")
    ),
    *(
        Row(f"stack.conv.{ours}.{leaf}", f"{{root}}encoder.conv.{theirs}.{leaf}", when=lambda s: s.conv > 0)
        for ours, theirs in (("conv", "conv"), ("norm", "LayerNorm"))
        for leaf in ("weight", "bias")
    ),
)
_KEYS = (
    "relative_attention",
    "max_relative_positions",
    "position_buckets",
    "pos_att_type",
    "share_att_key",
    "norm_rel_ebd",
    "attention_head_size",
)


def _relative(c: Mapping[str, Any], second: bool) -> RelativeSpec:
    if not c.get("relative_attention"):
        raise ConfigError("the configuration has no relative_attention; DeBERTa without it is not computed here")
    products = c.get("pos_att_type") or []
    products = products.split("|") if isinstance(products, str) else products
    if not products or set(products) - {"c2p", "p2c"}:
        raise ConfigError(f"the configuration's pos_att_type is {products!r}; 'c2p', 'p2c' or both were expected")
    if c.get("attention_head_size", c["hidden_size"] // c["num_attention_heads"]) * c["num_attention_heads"] != c["hidden_size"]:
        raise ConfigError(
            f"the configuration's attention_head_size is {c['attention_head_size']}; hidden_size / num_attention_heads was expected"
        )
    reach, buckets = c.get("max_relative_positions", -1), c.get("position_buckets", -1) if second else -1
    limit = reach if reach > 0 else c["max_position_embeddings"]
    return RelativeSpec(
        span=buckets if buckets > 0 else limit,
        limit=limit,
        buckets=buckets > 0,
        c2p="c2p" in products,
        p2c="p2c" in products,
        biased=second,
        shared=second and bool(c.get("share_att_key")),
        normed=second and "layer_norm" in str(c.get("norm_rel_ebd", "none")).lower(),
    )


def _relative_v1(c: Mapping[str, Any]) -> RelativeSpec:
    return _relative(c, False)


def _relative_v2(c: Mapping[str, Any]) -> RelativeSpec:
    return _relative(c, True)


def _published(s: DebertaSpec, second: bool) -> dict[str, Any]:
    r = s.relative
    products = [name for name, there in (("c2p", r.c2p), ("p2c", r.p2c)) if there]
    told = {"relative_attention": True, "max_relative_positions": r.limit, "pos_att_type": products}
    if not second:
        return told
    return {
        **told,
        "position_buckets": r.span if r.buckets else -1,
        "share_att_key": r.shared,
        "norm_rel_ebd": "layer_norm" if r.normed else "none",
    }


_FIELDS = (
    *BERT_FIELDS[:5],
    ("segments", "type_vocab_size", 0),
    ("eps", "layer_norm_eps", 1e-7),
    BERT_FIELDS[7],
    ("context", "max_position_embeddings"),
    Given("width", lambda c: c["hidden_size"]),
    ("absolute", "position_biased_input", True),
)
_V1_FIELDS = (*_FIELDS, Derived("relative", _KEYS[:2] + _KEYS[3:4], _relative_v1, lambda s: _published(s, False)))
_V2_FIELDS = (
    *_FIELDS,
    Derived("relative", _KEYS, _relative_v2, lambda s: _published(s, True)),
    Derived(
        "conv",
        ("conv_kernel_size", "conv_act"),
        lambda c: c.get("conv_kernel_size") or 0,
        lambda s: {"conv_kernel_size": s.conv, "conv_act": "tanh"} if s.conv else {},
    ),
)
_FIXED = {**BERT_FIXED, "pooler_hidden_act": "gelu", "legacy": True, "conv_groups": 1, "talking_head": False}
_INERT = ("pooler_hidden_size", "pooler_dropout")
DEBERTA = House("deberta", "deberta.", rows=_V1_ROWS, fields=_V1_FIELDS, fixed=_FIXED, inert=_INERT)
DEBERTA_V2 = House("deberta-v2", "deberta.", rows=_V2_ROWS, fields=_V2_FIELDS, fixed=_FIXED, inert=_INERT)
# Heads of the publisher's own pre-training, in the files of the bare model.
_OTHERS = (
    *drops(
        "lm_predictions.lm_head.dense",
        "lm_predictions.lm_head.LayerNorm",
        "mask_predictions.dense",
        "mask_predictions.LayerNorm",
        "mask_predictions.classifier",
    ),
    Drop("lm_predictions.lm_head.bias"),
)
_ROW = (*both("head.pool", "pooler.dense"), *CLASSIFIER)
KINDS = (
    Kind("DebertaForMaskedLM", mlm, masked(*MLM_NAMES)),
    Kind("DebertaModel", bare, _OTHERS),
    Kind("DebertaForSequenceClassification", rows(gelu), _ROW, labelled=True),
    Kind("DebertaForTokenClassification", classes, CLASSIFIER, labelled=True),
    Kind("DebertaForQuestionAnswering", span, QA),
)
_V2 = (
    "DebertaV2ForMaskedLM",
    "DebertaV2Model",
    "DebertaV2ForSequenceClassification",
    "DebertaV2ForTokenClassification",
    "DebertaV2ForQuestionAnswering",
)
V2_KINDS = (
    *(replace(kind, architecture=name) for kind, name in zip(KINDS, _V2, strict=True)),
    Kind("DebertaV2ForMultipleChoice", choice(gelu), _ROW),
)

FAMILY = Family(
    name="deberta",
    spec=DebertaSpec,
    build=build,
    sizes=SIZES,
    tiny=TINY,
    published=(*DEBERTA.forms(parts, KINDS), *DEBERTA_V2.forms(parts, V2_KINDS)),
    source="https://arxiv.org/abs/2006.03654",
)
