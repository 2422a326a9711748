"""BART (Lewis et al. 2019, "Denoising sequence-to-sequence pre-training", arXiv 1910.13461). Rows 33, 38, 70.

The transformer of 2017 with learned positions, a norm after the embedding, and GELU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transept.blocks.embeddings import Embedding, Scale, SharedTokens, TokenEmbedding
from transept.blocks.encoder import SpanHead
from transept.blocks.heads import Shifted, TiedHead
from transept.blocks.norms import LayerNorm, NoNorm
from transept.blocks.positions import Learned
from transept.blocks.seq2seq import (
    BareEncoderDecoder,
    EncoderDecoder,
    SentenceEncoderDecoder,
    SentenceHead,
    SourceEncoder,
    TextEncoderDecoder,
)
from transept.blocks.stack import Decoder, Trunk
from transept.core.registry import Family, Published
from transept.mapping import Fields, Map, Row
from transept.models.encoders import both, labels
from transept.models.text.transformer import (
    ALONE,
    FIELD_NAMES,
    GENERATION,
    INDEX,
    SCORES,
    TransformerSpec,
    alone,
    alone_rows,
    decoder_layer,
    encoder_layer,
    headed,
    trunk,
)
from transept.ops.activations import Act

OFFSET = 2
"""Rows at the start of the table of positions that no position uses."""


@dataclass(frozen=True, kw_only=True)
class BartSpec(TransformerSpec):
    """The transformer's numbers, and of the heads for whole texts: the names of their classes, the token that is read, and the token the
    decoder begins with."""

    labels: tuple[str, ...] = ()
    end: int = 2
    start: int = 2


def _embedding(s: BartSpec, tokens: TokenEmbedding | SharedTokens) -> Embedding:
    return Embedding(tokens, Learned(s.context, s.dim, OFFSET), project=Scale(s.dim**0.5) if s.scaled else None, norm=LayerNorm(s.dim))


def _parts(s: BartSpec, tokens: TokenEmbedding) -> tuple[SourceEncoder, Trunk]:
    encoder = SourceEncoder(_embedding(s, tokens), [encoder_layer(s) for _ in range(s.layers)], NoNorm())
    return encoder, Trunk(_embedding(s, SharedTokens(tokens)), [decoder_layer(s) for _ in range(s.decoder_layers)], NoNorm())


def build(s: BartSpec) -> EncoderDecoder:
    """The diagram, from bottom to top."""
    tokens = TokenEmbedding(s.vocab, s.dim)
    encoder, written = _parts(s, tokens)
    return EncoderDecoder(encoder, headed(written, Shifted(TiedHead(tokens), s.vocab)))


def build_bare(s: BartSpec) -> BareEncoderDecoder:
    """The diagram without its head."""
    return BareEncoderDecoder(*_parts(s, TokenEmbedding(s.vocab, s.dim)))


def build_writer(s: BartSpec) -> Decoder:
    """The decoder alone, without its attention to a source."""
    return alone(s, _embedding(s, tokens := TokenEmbedding(s.vocab, s.dim)), tokens)


def build_classifier(s: BartSpec) -> SentenceEncoderDecoder:
    """The same, scoring classes by the decoder's state at the last end token (section 3.1 of the paper)."""
    encoder, read = _parts(s, TokenEmbedding(s.vocab, s.dim))
    return SentenceEncoderDecoder(encoder, headed(read, SentenceHead(s.dim, len(s.labels))), s.end, s.start)


def build_answers(s: BartSpec) -> TextEncoderDecoder:
    """The same, scoring each token as the first and the last of an answer (section 3.2 of the paper)."""
    encoder, read = _parts(s, TokenEmbedding(s.vocab, s.dim))
    return TextEncoderDecoder(encoder, headed(read, SpanHead(s.dim)), s.start)


def _size(vocab: int, dim: int, layers: int, heads: int, ffn: int, context: int, **rest: Any) -> BartSpec:
    both = {"decoder_layers": layers, "decoder_heads": heads, "decoder_ffn": ffn, "act": Act.GELU, "scaled": False, **rest}
    return BartSpec(vocab=vocab, dim=dim, layers=layers, heads=heads, ffn=ffn, context=context, **both)


SIZES = {
    "bart-base": _size(50265, 768, 6, 12, 3072, 1024),
    "bart-large": _size(50265, 1024, 12, 16, 4096, 1024),
}
TINY = {
    "even": _size(96, 32, 2, 4, 48, 64),
    "uneven": _size(96, 32, 1, 2, 48, 64, decoder_layers=2, decoder_heads=4, decoder_ffn=40, scaled=True),
}

_EMBED = (("embed.position.weight", "embed_positions.weight"), ("embed.norm.weight", "layernorm_embedding.weight"),
          ("embed.norm.bias", "layernorm_embedding.bias"))


def _trunk(root: str) -> tuple[Any, ...]:
    return trunk(root, *(Row(f"{side}.{ours}", f"{root}{side}.{theirs}") for side in ("encoder", "decoder") for ours, theirs in _EMBED))


MAP = Map(*_trunk("model."), *SCORES, index=INDEX)
BARE_MAP = Map(*_trunk(""), index=INDEX)
CLASS_MAP = Map(
    *_trunk("model."),
    *both("decoder.head.dense", "classification_head.dense"),
    *both("decoder.head.out", "classification_head.out_proj"),
    index=INDEX,
)
ALONE_MAP = Map(*alone_rows(*(Row(ours, f"model.decoder.{theirs}") for ours, theirs in _EMBED)), index=INDEX)
SPAN_MAP = Map(*_trunk("model."), *both("decoder.head.out", "qa_outputs"), index=INDEX)

_FIXED = {"tie_word_embeddings": True, "is_encoder_decoder": True, "normalize_embedding": True}
_START = ("start", "decoder_start_token_id", 2)
_NAMES = (("vocab", "vocab_size"), *FIELD_NAMES)
FIELDS = Fields(*_NAMES, fixed=_FIXED, inert=GENERATION)
ALONE_FIELDS = Fields(*_NAMES, fixed={**_FIXED, **ALONE}, inert=GENERATION)
CLASS_FIELDS = Fields(*_NAMES, labels(3), ("end", "eos_token_id", 2), _START, fixed=_FIXED, inert=GENERATION)
SPAN_FIELDS = Fields(*_NAMES, _START, fixed=_FIXED, inert=GENERATION)

FAMILY = Family(
    name="bart",
    spec=BartSpec,
    build=build,
    sizes=SIZES,
    tiny=TINY,
    published=(
        Published("BartForConditionalGeneration", MAP, FIELDS, model_type="bart"),
        Published("BartModel", BARE_MAP, FIELDS, build_bare, model_type="bart"),
        Published("BartForCausalLM", ALONE_MAP, ALONE_FIELDS, build_writer, model_type="bart"),
        Published("BartForSequenceClassification", CLASS_MAP, CLASS_FIELDS, build_classifier, model_type="bart"),
        Published("BartForQuestionAnswering", SPAN_MAP, SPAN_FIELDS, build_answers, model_type="bart"),
    ),
    source="https://arxiv.org/abs/1910.13461",
)
