"""ELECTRA (Clark et al. 2020, arXiv 2003.10555): a generator fills masks, a discriminator finds which tokens it replaced. Row 67."""

from __future__ import annotations

from typing import Any

from transept.blocks.embeddings import TokenEmbedding
from transept.blocks.encoder import ReplacedHead
from transept.core.registry import Family
from transept.mapping import Row
from transept.models.encoders import (
    BERT_FIELDS,
    BERT_FIXED,
    House,
    Kind,
    bare,
    both,
    choice,
    classes,
    gelu,
    masked,
    mlm_gelu,
    next_word_gelu,
    rows,
    span,
    wired,
    writer,
)
from transept.models.text.bert import CLASSIFIER, EMBED, LAYERS, POSITIONS, QA, SEGMENTS, BertSpec, parts


def replaced(s: BertSpec, tokens: TokenEmbedding) -> ReplacedHead:
    """The discriminator's head."""
    return ReplacedHead(s.dim, s.act)


build = wired(parts, replaced)


def _size(width: int, dim: int, layers: int, heads: int, ffn: int, vocab: int = 30522, context: int = 512, **rest: Any) -> BertSpec:
    sizes = {"vocab": vocab, "width": width, "dim": dim, "layers": layers, "heads": heads, "ffn": ffn, "context": context}
    return BertSpec(**{**sizes, "segments": 2, **rest})


SIZES = {
    "electra-small": _size(128, 256, 12, 4, 1024),
    "electra-base": _size(768, 768, 12, 12, 3072),
    "electra-large": _size(1024, 1024, 24, 16, 4096),
    "electra-small-generator": _size(128, 256, 12, 4, 1024),
    "electra-base-generator": _size(768, 256, 12, 4, 1024),
    "electra-large-generator": _size(1024, 256, 24, 4, 1024),
}
TINY = {
    "narrow": _size(16, 32, 2, 4, 48, 96, 64),
    "wide": _size(32, 32, 2, 2, 48, 96, 64),
    "labels": _size(16, 32, 2, 2, 48, 96, 64, labels=("no", "yes", "maybe")),
}

PROJECT = tuple(
    Row(f"embed.project.{leaf}", f"{{root}}embeddings_project.{leaf}", when=lambda s: s.width != s.dim) for leaf in ("weight", "bias")
)
ELECTRA = House(
    "electra",
    "electra.",
    rows=(*EMBED, SEGMENTS, POSITIONS, *PROJECT, *LAYERS),
    fields=(*BERT_FIELDS, ("context", "max_position_embeddings"), ("width", "embedding_size")),
    fixed={**BERT_FIXED, "summary_type": "first", "summary_use_proj": True, "summary_activation": "gelu"},
    inert=("summary_last_dropout",),
)
_GENERATOR = masked("generator_predictions.dense", "generator_predictions.LayerNorm", "generator_lm_head.bias", "generator_lm_head.weight")
MASKED = Kind("ElectraForMaskedLM", mlm_gelu, _GENERATOR)
KINDS = (
    Kind(
        "ElectraForPreTraining",
        replaced,
        (*both("head.dense", "discriminator_predictions.dense"), *both("head.out", "discriminator_predictions.dense_prediction")),
    ),
    MASKED,
    writer(MASKED, "ElectraForCausalLM", next_word_gelu),
    Kind("ElectraModel", bare),
    Kind(
        "ElectraForSequenceClassification",
        rows(gelu),
        (*both("head.pool", "classifier.dense"), *both("head.out", "classifier.out_proj")),
        labelled=True,
    ),
    Kind("ElectraForTokenClassification", classes, CLASSIFIER, labelled=True),
    Kind("ElectraForQuestionAnswering", span, QA),
    Kind("ElectraForMultipleChoice", choice(gelu), (*both("head.pool", "sequence_summary.summary"), *CLASSIFIER)),
)

FAMILY = Family(
    name="electra",
    spec=BertSpec,
    build=build,
    sizes=SIZES,
    tiny=TINY,
    published=ELECTRA.forms(parts, KINDS),
    source="https://arxiv.org/abs/2003.10555",
)
