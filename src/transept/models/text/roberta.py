"""RoBERTa (Liu et al. 2019, arXiv 1907.11692): BERT without segments and next sentence, trained longer on dynamic masks. Row 65."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transept.core.registry import Family
from transept.mapping import Derived, Given
from transept.models.encoders import (
    BERT_FIELDS,
    BERT_FIXED,
    House,
    Kind,
    both,
    choice,
    classes,
    drops,
    masked,
    mlm_gelu,
    next_word_gelu,
    pooled,
    rows,
    span,
    wired,
    writer,
)
from transept.models.text.bert import CLASSIFIER, EMBED, LAYERS, POOL, POSITIONS, QA, SEGMENTS, BertSpec, parts

build = wired(parts, mlm_gelu)


def _size(vocab: int, dim: int, layers: int, heads: int, context: int = 512, **rest: Any) -> BertSpec:
    sizes = {"vocab": vocab, "width": dim, "dim": dim, "layers": layers, "heads": heads, "ffn": 4 * dim, "context": context}
    return BertSpec(**{**sizes, "segments": 1, "eps": 1e-5, "offset": 2, **rest})


SIZES = {
    "roberta-base": _size(50265, 768, 12, 12),
    "roberta-large": _size(50265, 1024, 24, 16),
    "xlm-roberta-base": _size(250002, 768, 12, 12),
    "xlm-roberta-large": _size(250002, 1024, 24, 16),
}
TINY = {"two": _size(96, 32, 2, 4, 64), "labels": _size(96, 32, 2, 2, 64, labels=("no", "yes", "maybe"))}


def _offset(c: Any) -> int:
    """The first token stands at row pad + 1 of the table."""
    return int(c.get("pad_token_id", 1)) + 1


FIELDS = (
    *BERT_FIELDS,
    Given("width", lambda c: c["hidden_size"]),
    Derived("offset", ("pad_token_id",), _offset, lambda s: {"pad_token_id": s.offset - 1}),
    Derived(
        "context",
        ("max_position_embeddings", "pad_token_id"),
        lambda c: c["max_position_embeddings"] - _offset(c),
        lambda s: {"max_position_embeddings": s.context + s.offset},
    ),
)
BODY = (*EMBED, SEGMENTS, POSITIONS, *LAYERS)
_BARE = drops("{root}pooler.dense")
_NAMES = ("lm_head.dense", "lm_head.layer_norm", "lm_head.bias", "lm_head.decoder.weight", "lm_head.decoder.bias")
KINDS = (
    Kind("RobertaForMaskedLM", mlm_gelu, (*masked(*_NAMES), *_BARE)),
    Kind("RobertaModel", pooled(), POOL),
    Kind(
        "RobertaForSequenceClassification",
        rows(),
        (*both("head.pool", "classifier.dense"), *both("head.out", "classifier.out_proj"), *_BARE),
        labelled=True,
    ),
    Kind("RobertaForTokenClassification", classes, (*CLASSIFIER, *_BARE), labelled=True),
    Kind("RobertaForQuestionAnswering", span, (*QA, *_BARE)),
    Kind("RobertaForMultipleChoice", choice(), (*POOL, *CLASSIFIER)),
)
_XLM = (
    "XLMRobertaForMaskedLM",
    "XLMRobertaModel",
    "XLMRobertaForSequenceClassification",
    "XLMRobertaForTokenClassification",
    "XLMRobertaForQuestionAnswering",
    "XLMRobertaForMultipleChoice",
)
XLM_KINDS = tuple(replace(kind, architecture=name) for kind, name in zip(KINDS, _XLM, strict=True))
WRITER, XLM_WRITER = (writer(KINDS[0], f"{name}ForCausalLM", next_word_gelu) for name in ("Roberta", "XLMRoberta"))
ROBERTA = House("roberta", "roberta.", rows=BODY, fields=FIELDS, fixed=BERT_FIXED)
XLM_ROBERTA = replace(ROBERTA, model_type="xlm-roberta")

FAMILY = Family(
    name="roberta",
    spec=BertSpec,
    build=build,
    sizes=SIZES,
    tiny=TINY,
    published=(*ROBERTA.forms(parts, (*KINDS, WRITER)), *XLM_ROBERTA.forms(parts, (*XLM_KINDS, XLM_WRITER))),
    source="https://arxiv.org/abs/1907.11692",
)
