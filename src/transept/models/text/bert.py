"""BERT (Devlin et al. 2018, arXiv 1810.04805). Rows 52, 53, 55, 56, 58-61; the sentence encoders built on it (MiniLM) too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from transept.blocks.attention import Attention, Bias
from transept.blocks.block import Block, Branch, Post
from transept.blocks.embeddings import TokenEmbedding
from transept.blocks.encoder import EncoderEmbedding
from transept.blocks.feedforward import MLP
from transept.blocks.norms import LayerNorm, NoNorm
from transept.blocks.positions import Learned, NoPosition
from transept.blocks.stack import Stack
from transept.core.registry import Family
from transept.core.spec import Spec
from transept.mapping import Drop, Given, Row
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
    following,
    layer,
    masked,
    mlm,
    pooled,
    pretrain,
    rows,
    span,
    wired,
    writer,
)
from transept.ops.activations import Act
from transept.ops.masks import Mask


@dataclass(frozen=True, kw_only=True)
class BertSpec(Spec):
    """A row of the paper's section 3, `width` being that of the embedding, `offset` the unused rows of its position table (RoBERTa's),
    `labels` the names of the classes where a head scores them."""

    vocab: int
    width: int
    dim: int
    layers: int
    heads: int
    ffn: int
    context: int
    segments: int
    eps: float = 1e-12
    act: Act = Act.GELU
    offset: int = 0
    labels: tuple[str, ...] = ()


def embedding(s: BertSpec, position: nn.Module | None) -> EncoderEmbedding:
    """Tokens + segments + positions, normed, and brought to the model's width where they are narrower."""
    return EncoderEmbedding(
        TokenEmbedding(s.vocab, s.width),
        LayerNorm(s.width, s.eps),
        segments=TokenEmbedding(s.segments, s.width) if s.segments else None,
        position=position,
        project=None if s.width == s.dim else nn.Linear(s.width, s.dim),
    )


def block(s: BertSpec, attn: nn.Module) -> Block:
    """Post-norm: attention, then a plain feed-forward network."""
    mlp = MLP(s.dim, s.ffn, s.act)
    return Block(attn=Branch(attn, LayerNorm(s.dim, s.eps), Post()), mlp=Branch(mlp, LayerNorm(s.dim, s.eps), Post()))


def attention(s: BertSpec, position: NoPosition | None = None, mask: Mask = BOTH_WAYS) -> Attention:
    """Every token sees every other, where the mask says no less; all projections carry a bias."""
    return Attention(s.dim, s.heads, s.heads, s.dim // s.heads, mask=mask, position=position, bias=Bias.ALL)


def parts(s: BertSpec, mask: Mask = BOTH_WAYS) -> tuple[EncoderEmbedding, Stack]:
    """The diagram below the head."""
    embed = embedding(s, Learned(s.context, s.width, s.offset))
    return embed, Stack([block(s, attention(s, mask=mask)) for _ in range(s.layers)], NoNorm())


build = wired(parts, pretrain)


def _size(vocab: int, dim: int, layers: int, heads: int, context: int = 512, **rest: Any) -> BertSpec:
    return BertSpec(
        **{
            "vocab": vocab,
            "width": dim,
            "dim": dim,
            "layers": layers,
            "heads": heads,
            "ffn": 4 * dim,
            "context": context,
            "segments": 2,
            **rest,
        }
    )


SIZES = {
    "bert-base": _size(30522, 768, 12, 12),
    "bert-large": _size(30522, 1024, 24, 16),
    "bert-base-cased": _size(28996, 768, 12, 12),
    "bert-base-multilingual-cased": _size(119547, 768, 12, 12),
    "bert-small": _size(30522, 512, 4, 8),
    "bert-tiny": _size(30522, 128, 2, 2),
    "minilm-l6": _size(30522, 384, 6, 12),
}
TINY = {"two": _size(96, 32, 2, 4, 64), "labels": _size(96, 32, 2, 2, 64, labels=("no", "yes", "maybe"))}

EMBED = (
    Row("embed.tokens.weight", "{root}embeddings.word_embeddings.weight"),
    *both("embed.norm", "{root}embeddings.LayerNorm"),
    Drop("{root}embeddings.position_ids"),
    Drop("{root}embeddings.token_type_ids"),
)
SEGMENTS = Row("embed.segments.weight", "{root}embeddings.token_type_embeddings.weight", when=lambda s: s.segments > 0)
POSITIONS = Row("embed.position.weight", "{root}embeddings.position_embeddings.weight")
LAYERS = layer(
    ("attn.q", "attention.self.query"),
    ("attn.k", "attention.self.key"),
    ("attn.v", "attention.self.value"),
    ("attn.out", "attention.output.dense"),
    ("attn_norm", "attention.output.LayerNorm"),
    ("mlp.up", "intermediate.dense"),
    ("mlp.down", "output.dense"),
    ("mlp_norm", "output.LayerNorm"),
    foreign="{root}encoder.layer.{l}",
)
POOL = both("head.pool", "{root}pooler.dense")
CLASSIFIER = both("head.out", "classifier")
QA = both("head.out", "qa_outputs")
MLM_NAMES = (
    "cls.predictions.transform.dense",
    "cls.predictions.transform.LayerNorm",
    "cls.predictions.bias",
    "cls.predictions.decoder.weight",
    "cls.predictions.decoder.bias",
)
MLM = masked(*MLM_NAMES)
NEXT = "cls.seq_relationship"

BERT = House(
    "bert",
    "bert.",
    rows=(*EMBED, SEGMENTS, POSITIONS, *LAYERS),
    fields=(*BERT_FIELDS, ("context", "max_position_embeddings"), Given("width", lambda c: c["hidden_size"])),
    fixed=BERT_FIXED,
)
MASKED = Kind("BertForMaskedLM", mlm, (*MLM, *drops("{root}pooler.dense", NEXT)))
KINDS = (
    Kind(
        "BertForPreTraining",
        pretrain,
        (*masked(*MLM_NAMES, native="head.mlm"), *both("head.next.pool", "{root}pooler.dense"), *both("head.next.out", NEXT)),
    ),
    MASKED,
    writer(MASKED, "BertLMHeadModel"),
    Kind("BertModel", pooled(), POOL),
    Kind("BertForNextSentencePrediction", following, (*POOL, *both("head.out", NEXT))),
    Kind("BertForSequenceClassification", rows(), (*POOL, *CLASSIFIER), labelled=True),
    Kind("BertForTokenClassification", classes, (*CLASSIFIER, *drops("{root}pooler.dense")), labelled=True),
    Kind("BertForQuestionAnswering", span, (*QA, *drops("{root}pooler.dense"))),
    Kind("BertForMultipleChoice", choice(), (*POOL, *CLASSIFIER)),
)

FAMILY = Family(
    name="bert",
    spec=BertSpec,
    build=build,
    sizes=SIZES,
    tiny=TINY,
    published=BERT.forms(parts, KINDS),
    source="https://arxiv.org/abs/1810.04805",
)
