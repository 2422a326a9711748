"""RoFormer (Su et al. 2021, arXiv 2104.09864): BERT with rotary positions, neighbours turned in pairs. Row 36."""

from __future__ import annotations

from typing import Any

from transept.blocks.encoder import EncoderEmbedding, Last, Pool
from transept.blocks.norms import NoNorm
from transept.blocks.positions import Rotary
from transept.blocks.stack import Stack
from transept.core.registry import Family
from transept.mapping import Drop
from transept.models.encoders import (
    BERT_FIELDS,
    BERT_FIXED,
    BOTH_WAYS,
    House,
    Kind,
    bare,
    both,
    choice,
    classes,
    masked,
    mlm,
    rows,
    span,
    wired,
    writer,
)
from transept.models.text.bert import CLASSIFIER, EMBED, LAYERS, MLM_NAMES, QA, SEGMENTS, BertSpec, attention, block, embedding
from transept.models.text.electra import PROJECT
from transept.ops.masks import Mask
from transept.ops.rotary import Layout, RopeSpec


def parts(s: BertSpec, mask: Mask = BOTH_WAYS) -> tuple[EncoderEmbedding, Stack]:
    """The diagram below the head: nothing is added to the embedding, every layer turns its queries and keys."""
    position = Rotary(RopeSpec(theta=10000.0, dims=s.dim // s.heads, layout=Layout.PAIRS))
    return embedding(s, None), Stack([block(s, attention(s, position, mask)) for _ in range(s.layers)], NoNorm())


def last(s: BertSpec) -> Last:
    """No pooler: the last column, what the published code takes where the configuration says nothing."""
    return Last()


def own(s: BertSpec) -> Pool:
    """A pooler with the activation of the layers."""
    return Pool(s.dim, s.act)


build = wired(parts, mlm)


def _size(width: int, dim: int, layers: int, heads: int, vocab: int = 50000, context: int = 1536, **rest: Any) -> BertSpec:
    sizes = {"vocab": vocab, "width": width, "dim": dim, "layers": layers, "heads": heads, "ffn": 4 * dim, "context": context}
    return BertSpec(**{**sizes, "segments": 2, **rest})


SIZES = {"roformer-base": _size(768, 768, 12, 12), "roformer-small": _size(384, 384, 6, 6)}
TINY = {
    "wide": _size(32, 32, 2, 4, 96, 64),
    "narrow": _size(16, 32, 2, 2, 96, 64),
    "labels": _size(32, 32, 2, 2, 96, 64, labels=("no", "yes", "maybe")),
}

ROFORMER = House(
    "roformer",
    "roformer.",
    # The table of sines is worked out, not read.
    rows=(*EMBED, SEGMENTS, *PROJECT, *LAYERS, Drop("{root}encoder.embed_positions.weight")),
    fields=(*BERT_FIELDS, ("context", "max_position_embeddings"), ("width", "embedding_size")),
    fixed={**BERT_FIXED, "rotary_value": False, "summary_type": "last", "summary_use_proj": False},
)
MASKED = Kind("RoFormerForMaskedLM", mlm, masked(*MLM_NAMES))
KINDS = (
    MASKED,
    writer(MASKED, "RoFormerForCausalLM"),
    Kind("RoFormerModel", bare),
    Kind(
        "RoFormerForSequenceClassification",
        rows(own),
        (*both("head.pool", "classifier.dense"), *both("head.out", "classifier.out_proj")),
        labelled=True,
    ),
    Kind("RoFormerForTokenClassification", classes, CLASSIFIER, labelled=True),
    Kind("RoFormerForQuestionAnswering", span, QA),
    Kind("RoFormerForMultipleChoice", choice(last), CLASSIFIER),
)

FAMILY = Family(
    name="roformer",
    spec=BertSpec,
    build=build,
    sizes=SIZES,
    tiny=TINY,
    published=ROFORMER.forms(parts, KINDS),
    source="https://arxiv.org/abs/2104.09864",
)
