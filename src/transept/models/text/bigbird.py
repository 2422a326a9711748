"""BigBird (Zaheer et al. 2020, arXiv 2007.14062), internal construction: BERT whose blocks see global, near and random blocks. Rows
43-46.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from transept.blocks.bigbird import AskedEncoder, BlockSparseAttention, DeepSpanHead
from transept.blocks.embeddings import TokenEmbedding
from transept.blocks.encoder import EncoderEmbedding, Pool
from transept.blocks.norms import NoNorm
from transept.blocks.positions import Learned
from transept.blocks.stack import Stack
from transept.core.errors import ConfigError
from transept.core.registry import Family, Published
from transept.mapping import Derived, Given
from transept.models.encoders import (
    BERT_FIELDS,
    BERT_FIXED,
    BOTH_WAYS,
    House,
    Kind,
    both,
    choice,
    classes,
    drops,
    masked,
    mlm,
    pooled,
    pretrain,
    rows,
    wired,
    writer,
)
from transept.models.text.bert import (
    CLASSIFIER,
    EMBED,
    LAYERS,
    MLM,
    MLM_NAMES,
    NEXT,
    POSITIONS,
    SEGMENTS,
    BertSpec,
    attention,
    block,
    embedding,
)
from transept.ops.activations import Act
from transept.ops.masks import Mask


@dataclass(frozen=True, kw_only=True)
class BigBirdSpec(BertSpec):
    """BERT's numbers, the size of a `block` (None: everything sees everything), how many `random` blocks each block sees besides, and the
    token `separator` that ends a question.
    """

    block: int | None = 64
    random: int = 3
    separator: int = 66


def _mixer(s: BigBirdSpec, index: int, mask: Mask) -> nn.Module:
    if s.block is None:
        return attention(s, mask=mask)
    if mask != BOTH_WAYS:
        raise ConfigError("BigBird in blocks reads both ways, so it does not write: attention_type 'original_full' was expected")
    return BlockSparseAttention(s.dim, s.heads, s.block, s.random, seed=index, longest=s.context)


def parts(s: BigBirdSpec, mask: Mask = BOTH_WAYS) -> tuple[EncoderEmbedding, Stack]:
    """The diagram below the head."""
    return embedding(s, Learned(s.context, s.width)), Stack([block(s, _mixer(s, i, mask)) for i in range(s.layers)], NoNorm())


def deep(s: BigBirdSpec, tokens: TokenEmbedding) -> DeepSpanHead:
    """Where an answer starts and ends, by a layer of its own."""
    return DeepSpanHead(s.dim, s.ffn, s.act, s.eps)


def asked(s: BigBirdSpec) -> AskedEncoder:
    """The same diagram, which knows where the question ends."""
    embed, stack = parts(s)
    return AskedEncoder(embed, stack, deep(s, embed.tokens), s.separator)


build = wired(parts, pretrain)


def _size(dim: int, layers: int, heads: int, vocab: int = 50358, context: int = 4096, **rest: Any) -> BigBirdSpec:
    sizes = {"vocab": vocab, "width": dim, "dim": dim, "layers": layers, "heads": heads, "ffn": 4 * dim, "context": context}
    return BigBirdSpec(**{**sizes, "segments": 2, "act": Act.GELU_TANH, **rest})


SIZES = {"bigbird-base": _size(768, 12, 12), "bigbird-large": _size(1024, 24, 16)}
TINY = {
    "blocks": _size(32, 2, 4, 96, 64, block=4, random=1),
    "full": _size(32, 2, 4, 96, 64, block=None),
    "labels": _size(32, 2, 2, 96, 64, block=4, random=1, labels=("no", "yes", "maybe")),
}


def _block(c: Mapping[str, Any]) -> int | None:
    kinds = {"block_sparse": c.get("block_size", 64), "original_full": None}
    return kinds[c.get("attention_type", "block_sparse")]


def _act_pool(s: BigBirdSpec) -> Pool:
    return Pool(s.dim, s.act)


HOUSE = House(
    "big_bird",
    "bert.",
    rows=(*EMBED, SEGMENTS, POSITIONS, *LAYERS),
    fields=(
        *BERT_FIELDS,
        ("context", "max_position_embeddings"),
        Given("width", lambda c: c["hidden_size"]),
        Derived(
            "block",
            ("attention_type", "block_size"),
            _block,
            lambda s: {"attention_type": "original_full"} if s.block is None else {"attention_type": "block_sparse", "block_size": s.block},
        ),
        ("random", "num_random_blocks", 3),
        ("separator", "sep_token_id", 66),
    ),
    fixed={**BERT_FIXED, "use_bias": True, "rescale_embeddings": False},
)
_POOL = "{root}pooler"
_BARE = drops(_POOL)
MASKED = Kind("BigBirdForMaskedLM", mlm, (*MLM, *drops(_POOL, NEXT)))
KINDS = (
    Kind(
        "BigBirdForPreTraining",
        pretrain,
        (*masked(*MLM_NAMES, native="head.mlm"), *both("head.next.pool", _POOL), *both("head.next.out", NEXT)),
    ),
    MASKED,
    writer(MASKED, "BigBirdForCausalLM", attention_type="original_full"),
    Kind("BigBirdModel", pooled(), both("head.pool", _POOL)),
    Kind(
        "BigBirdForSequenceClassification",
        rows(_act_pool),
        (*both("head.pool", "classifier.dense"), *both("head.out", "classifier.out_proj"), *_BARE),
        labelled=True,
    ),
    Kind("BigBirdForTokenClassification", classes, (*CLASSIFIER, *_BARE), labelled=True),
    Kind("BigBirdForMultipleChoice", choice(), (*both("head.pool", _POOL), *CLASSIFIER)),
    Kind(
        "BigBirdForQuestionAnswering",
        deep,
        (
            *both("head.mlp.up", "qa_classifier.intermediate.dense"),
            *both("head.mlp.down", "qa_classifier.output.dense"),
            *both("head.norm", "qa_classifier.output.LayerNorm"),
            *both("head.out", "qa_classifier.qa_outputs"),
            *_BARE,
        ),
    ),
)


def _form(form: Published) -> Published:
    return replace(form, build=asked) if form.architecture.endswith("QuestionAnswering") else form


FAMILY = Family(
    name="bigbird",
    spec=BigBirdSpec,
    build=build,
    sizes=SIZES,
    tiny=TINY,
    published=tuple(_form(form) for form in HOUSE.forms(parts, KINDS)),
    source="https://arxiv.org/abs/2007.14062",
)
