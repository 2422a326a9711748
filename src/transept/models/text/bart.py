"""BART (Lewis et al. 2019, "Denoising sequence-to-sequence pre-training", arXiv 1910.13461). Rows 33, 38, 70.

The transformer of 2017 with learned positions, a norm after the embedding, and GELU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from transept.blocks.embeddings import Embedding, Scale, SharedTokens, TokenEmbedding
from transept.blocks.heads import Shifted, TiedHead
from transept.blocks.norms import LayerNorm, NoNorm
from transept.blocks.positions import Learned
from transept.blocks.seq2seq import EncoderDecoder, SentenceEncoderDecoder, SentenceHead, SourceEncoder
from transept.blocks.stack import Decoder
from transept.core.registry import Family, Published
from transept.mapping import Derived, Fields, Map, Reshape, Row, Tied
from transept.models.text.transformer import FIELD_NAMES, GENERATION, INDEX, TABLE, TransformerSpec, decoder_layer, encoder_layer, layers
from transept.ops.activations import Act

OFFSET = 2
"""Rows at the start of the table of positions that no position uses."""


@dataclass(frozen=True, kw_only=True)
class BartSpec(TransformerSpec):
    """The transformer's numbers, and of the head for whole texts: its `classes`, the token it reads, and the token the decoder begins
    with."""

    classes: int = 3
    end: int = 2
    start: int = 2


def _parts(s: BartSpec) -> tuple[SourceEncoder, Decoder]:
    def embedding(tokens: TokenEmbedding | SharedTokens) -> Embedding:
        return Embedding(tokens, Learned(s.context, s.dim, OFFSET), project=Scale(s.dim**0.5) if s.scaled else None, norm=LayerNorm(s.dim))

    tokens = TokenEmbedding(s.vocab, s.dim)
    encoder = SourceEncoder(embedding(tokens), [encoder_layer(s) for _ in range(s.layers)], NoNorm())
    head = Shifted(TiedHead(tokens), s.vocab)
    return encoder, Decoder(embedding(SharedTokens(tokens)), [decoder_layer(s) for _ in range(s.decoder_layers)], NoNorm(), head)


def build(s: BartSpec) -> EncoderDecoder:
    """The diagram, from bottom to top."""
    return EncoderDecoder(*_parts(s))


def build_classifier(s: BartSpec) -> nn.Module:
    """The same, scoring classes by the decoder's state at the last end token (section 3.1 of the paper)."""
    encoder, decoder = _parts(s)
    decoder.head = SentenceHead(s.dim, s.classes)
    return SentenceEncoderDecoder(encoder, decoder, s.end, s.start)


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
_TRUNK = (
    Row(TABLE, "model.shared.weight"),
    Tied(TABLE, "model.encoder.embed_tokens.weight"),
    Tied(TABLE, "model.decoder.embed_tokens.weight"),
    *(Row(f"{side}.{ours}", f"model.{side}.{theirs}") for side in ("encoder", "decoder") for ours, theirs in _EMBED),
    *layers("encoder", "l"),
    *layers("decoder", "m"),
)
MAP = Map(
    *_TRUNK,
    Tied(TABLE, "lm_head.weight"),
    Row("decoder.head.shift", "final_logits_bias", Reshape(lambda s: (s.vocab,), lambda s: (1, s.vocab))),
    index=INDEX,
)
CLASS_MAP = Map(
    *_TRUNK,
    *(Row(f"decoder.head.{ours}.{kind}", f"classification_head.{theirs}.{kind}")
      for ours, theirs in (("dense", "dense"), ("out", "out_proj")) for kind in ("weight", "bias")),
    index=INDEX,
)

_FIXED = {"tie_word_embeddings": True, "is_encoder_decoder": True, "normalize_embedding": True}
FIELDS = Fields(("vocab", "vocab_size"), *FIELD_NAMES, fixed=_FIXED, inert=GENERATION)
CLASS_FIELDS = Fields(
    ("vocab", "vocab_size"),
    *FIELD_NAMES,
    Derived("classes", ("id2label", "num_labels"), lambda c: len(c.get("id2label") or range(c.get("num_labels") or 3)),
            lambda s: {"id2label": {str(i): f"LABEL_{i}" for i in range(s.classes)}}),
    ("end", "eos_token_id", 2),
    ("start", "decoder_start_token_id", 2),
    fixed=_FIXED,
    inert=GENERATION,
)

FAMILY = Family(
    name="bart",
    spec=BartSpec,
    build=build,
    sizes=SIZES,
    tiny=TINY,
    published=(
        Published("BartForConditionalGeneration", MAP, FIELDS, model_type="bart"),
        Published("BartForSequenceClassification", CLASS_MAP, CLASS_FIELDS, build_classifier, model_type="bart"),
    ),
    source="https://arxiv.org/abs/1910.13461",
)
