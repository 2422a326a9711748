"""The transformer of 2017 (Vaswani et al., "Attention is all you need", arXiv 1706.03762); loads Marian's translation models
(Junczys-Dowmunt et al. 2018, arXiv 1804.00344). Rows 18, 32, 37-39.

Sinusoidal positions, a norm after each sum, one table of tokens for source, target and scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from transept.blocks.attention import Attention, Bias
from transept.blocks.block import Block, Branch, Post
from transept.blocks.cross import CrossAttention
from transept.blocks.embeddings import Embedding, Scale, SharedTokens, TokenEmbedding
from transept.blocks.feedforward import MLP
from transept.blocks.heads import Shifted, TiedHead
from transept.blocks.norms import LayerNorm, NoNorm
from transept.blocks.positions import Sinusoidal
from transept.blocks.seq2seq import BareEncoderDecoder, EncoderDecoder, SourceEncoder
from transept.blocks.stack import Decoder, Trunk
from transept.core.registry import Family, Published
from transept.core.spec import Spec
from transept.mapping import Derived, Drop, Field, Fields, Map, Reshape, Row, Tied
from transept.models.published import act, act_name
from transept.ops.activations import Act
from transept.ops.masks import Causal, Full
from transept.ops.rotary import Layout


@dataclass(frozen=True, kw_only=True)
class TransformerSpec(Spec):
    """A row of the paper's table 3. The decoder may have other numbers than the encoder; `scaled` multiplies token vectors by sqrt(dim)."""

    vocab: int
    dim: int
    layers: int
    decoder_layers: int
    heads: int
    decoder_heads: int
    ffn: int
    decoder_ffn: int
    context: int
    act: Act = Act.RELU
    scaled: bool = True


def _embedding(s: TransformerSpec, tokens: TokenEmbedding | SharedTokens) -> Embedding:
    """The sines of a position come before its cosines, as Marian trains them."""
    return Embedding(tokens, Sinusoidal(s.dim, Layout.HALVES), project=Scale(s.dim**0.5) if s.scaled else None)


def _parts(s: TransformerSpec, tokens: TokenEmbedding) -> tuple[SourceEncoder, Trunk]:
    encoder = SourceEncoder(_embedding(s, tokens), [encoder_layer(s) for _ in range(s.layers)], NoNorm())
    return encoder, Trunk(_embedding(s, SharedTokens(tokens)), [decoder_layer(s) for _ in range(s.decoder_layers)], NoNorm())


def build(s: TransformerSpec) -> EncoderDecoder:
    """Figure 1 of the paper."""
    tokens = TokenEmbedding(s.vocab, s.dim)
    encoder, trunk = _parts(s, tokens)
    return EncoderDecoder(encoder, headed(trunk, Shifted(TiedHead(tokens), s.vocab)))


def build_bare(s: TransformerSpec) -> BareEncoderDecoder:
    """The figure without its head."""
    return BareEncoderDecoder(*_parts(s, TokenEmbedding(s.vocab, s.dim)))


def build_writer(s: TransformerSpec) -> Decoder:
    """The decoder alone, without its attention to a source."""
    return alone(s, _embedding(s, tokens := TokenEmbedding(s.vocab, s.dim)), tokens)


def alone(s: TransformerSpec, embed: Embedding, tokens: TokenEmbedding) -> Decoder:
    """A language model of the decoder's layers, which score by the table of tokens."""
    return Decoder(embed, [writer_layer(s) for _ in range(s.decoder_layers)], NoNorm(), TiedHead(tokens))


def headed(trunk: Trunk, head: nn.Module) -> Decoder:
    """The decoder of a trunk and a head."""
    blocks: list[Any] = [*trunk.stack.layers]
    return Decoder(trunk.embed, blocks, trunk.stack.norm, head)


def encoder_layer(s: TransformerSpec) -> Block:
    """Self-attention and a feed-forward network, each sum normed."""
    attn = Attention(s.dim, s.heads, s.heads, s.dim // s.heads, mask=Full(), bias=Bias.ALL)
    return Block(attn=Branch(attn, LayerNorm(s.dim), Post()), mlp=Branch(MLP(s.dim, s.ffn, s.act), LayerNorm(s.dim), Post()))


def decoder_layer(s: TransformerSpec) -> Block:
    """Masked self-attention, attention to the source, and a feed-forward network, each sum normed."""
    heads, width = s.decoder_heads, s.dim // s.decoder_heads
    return Block(
        attn=Branch(Attention(s.dim, heads, heads, width, mask=Causal(), bias=Bias.ALL), LayerNorm(s.dim), Post()),
        cross=Branch(CrossAttention(s.dim, heads, width, bias=Bias.ALL), LayerNorm(s.dim), Post()),
        mlp=Branch(MLP(s.dim, s.decoder_ffn, s.act), LayerNorm(s.dim), Post()),
    )


def writer_layer(s: TransformerSpec) -> Block:
    """The same without a source."""
    attn = Attention(s.dim, s.decoder_heads, s.decoder_heads, s.dim // s.decoder_heads, mask=Causal(), bias=Bias.ALL)
    return Block(attn=Branch(attn, LayerNorm(s.dim), Post()), mlp=Branch(MLP(s.dim, s.decoder_ffn, s.act), LayerNorm(s.dim), Post()))


def _size(vocab: int, dim: int, layers: int, heads: int, ffn: int, context: int, **rest: Any) -> TransformerSpec:
    both = {"decoder_layers": layers, "decoder_heads": heads, "decoder_ffn": ffn, **rest}
    return TransformerSpec(vocab=vocab, dim=dim, layers=layers, heads=heads, ffn=ffn, context=context, **both)


SIZES = {
    "transformer-base": _size(37000, 512, 6, 8, 2048, 1024),
    "transformer-big": _size(37000, 1024, 6, 16, 4096, 1024),
    "opus-mt-en-de": _size(58101, 512, 6, 8, 2048, 512, act=Act.SILU),
}
TINY = {
    "2017": _size(96, 32, 2, 4, 48, 64),
    "uneven": _size(96, 32, 3, 2, 48, 64, decoder_layers=1, decoder_heads=4, decoder_ffn=40, act=Act.SILU),
}

_PROJECTIONS = (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("out", "out_proj"))
_SELF = (*((f"attn.{a}", f"self_attn.{b}") for a, b in _PROJECTIONS), ("attn_norm", "self_attn_layer_norm"))
_CROSS = (*((f"cross.{a}", f"encoder_attn.{b}") for a, b in _PROJECTIONS), ("cross_norm", "encoder_attn_layer_norm"))
_MLP = (("mlp.up", "fc1"), ("mlp.down", "fc2"), ("mlp_norm", "final_layer_norm"))


def layers(side: str, index: str, root: str = "model.") -> list[Row]:
    """The rows of the layers of one side, as this family and those after it publish them."""
    names = (*_SELF, *(_CROSS if side == "decoder" else ()), *_MLP)
    return [Row(f"{side}.stack.layers.{{{index}}}.{ours}.{kind}", f"{root}{side}.layers.{{{index}}}.{theirs}.{kind}")
            for ours, theirs in names for kind in ("weight", "bias")]


INDEX = {"l": lambda s: range(s.layers), "m": lambda s: range(s.decoder_layers)}
TABLE = "encoder.embed.tokens.weight"


def trunk(root: str, *more: Row) -> tuple[Row | Tied | Drop, ...]:
    """The rows of both stacks; `root` is the prefix of the names, `more` what a family has besides."""
    sides = ("encoder", "decoder")
    return (
        Row(TABLE, f"{root}shared.weight"),
        *(Tied(TABLE, f"{root}{side}.embed_tokens.weight") for side in sides),
        *more,
        *layers("encoder", "l", root),
        *layers("decoder", "m", root),
    )


def _sines(root: str) -> tuple[Drop, ...]:
    """The tables of sines are worked out, not read."""
    return tuple(Drop(f"{root}{side}.embed_positions.weight") for side in ("encoder", "decoder"))


def alone_rows(*more: Row | Drop) -> tuple[Row | Tied | Drop, ...]:
    """The rows of the decoder alone. Its file may hold the attention to a source that it never has."""
    side, table = "model.decoder.", "embed.tokens.weight"
    return (
        Row(table, f"{side}embed_tokens.weight"),
        Tied(table, "lm_head.weight"),
        *more,
        *(Row(f"stack.layers.{{m}}.{ours}.{kind}", f"{side}layers.{{m}}.{theirs}.{kind}")
          for ours, theirs in (*_SELF, *_MLP) for kind in ("weight", "bias")),
        *(Drop(f"{side}layers.{{m}}.{theirs}.{kind}") for _, theirs in _CROSS for kind in ("weight", "bias")),
    )


SCORES = (
    Tied(TABLE, "lm_head.weight"),
    Row("decoder.head.shift", "final_logits_bias", Reshape(lambda s: (s.vocab,), lambda s: (1, s.vocab))),
)
MAP = Map(*trunk("model."), *_sines("model."), *SCORES, index=INDEX)
BARE_MAP = Map(*trunk(""), *_sines(""), index=INDEX)
ALONE_MAP = Map(*alone_rows(Drop("model.decoder.embed_positions.weight")), index=INDEX)


def _vocab(c: Mapping[str, Any]) -> int:
    vocab = c["vocab_size"]
    if c.get("decoder_vocab_size") not in (None, vocab):
        raise ValueError("source and target share one table in this family")
    return vocab


FIELD_NAMES = (
    ("dim", "d_model"),
    ("layers", "encoder_layers"),
    ("decoder_layers", "decoder_layers"),
    ("heads", "encoder_attention_heads"),
    ("decoder_heads", "decoder_attention_heads"),
    ("ffn", "encoder_ffn_dim"),
    ("decoder_ffn", "decoder_ffn_dim"),
    ("context", "max_position_embeddings"),
    Field("act", "activation_function", Act.GELU, load=act, save=act_name),
    ("scaled", "scale_embedding", False),
)
# What decides how tokens are chosen and not how they are scored, and what repeats another field.
GENERATION = tuple(
    """
    bad_words_ids num_beams max_length min_length length_penalty early_stopping no_repeat_ngram_size num_hidden_layers encoder_layerdrop
    decoder_layerdrop classif_dropout output_past force_bos_token_to_be_generated extra_pos_embeddings
    """.split()
)
_ALWAYS = ("share_encoder_decoder_embeddings", "static_position_embeddings", "tie_word_embeddings", "is_encoder_decoder")
_NAMES = (
    Derived("vocab", ("vocab_size", "decoder_vocab_size"), _vocab, lambda s: {"vocab_size": s.vocab, "decoder_vocab_size": s.vocab}),
    *FIELD_NAMES,
)
FIELDS = Fields(*_NAMES, fixed=dict.fromkeys(_ALWAYS, True), inert=GENERATION)
ALONE = {"is_encoder_decoder": False, "is_decoder": True}
ALONE_FIELDS = Fields(*_NAMES, fixed={**dict.fromkeys(_ALWAYS, True), **ALONE}, inert=GENERATION)

FAMILY = Family(
    name="transformer",
    spec=TransformerSpec,
    build=build,
    sizes=SIZES,
    tiny=TINY,
    published=(
        Published("MarianMTModel", MAP, FIELDS, model_type="marian"),
        Published("MarianModel", BARE_MAP, FIELDS, build_bare, model_type="marian"),
        Published("MarianForCausalLM", ALONE_MAP, ALONE_FIELDS, build_writer, model_type="marian"),
    ),
    source="https://arxiv.org/abs/1706.03762",
)
