"""T5 (Raffel et al. 2019, arXiv 1910.10683), T5 v1.1 and Flan-T5 (Shazeer 2020, arXiv 2002.05202; Chung et al. 2022, 2210.11416). Rows 35,
38.

Relative positions in the scores, RMS norm before each function, no biases, and scores q k^T that are not divided by sqrt(head_dim).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from transept.blocks.attention import Attention
from transept.blocks.block import Block, Branch, Pre
from transept.blocks.cross import CrossAttention
from transept.blocks.embeddings import Embedding, SharedTokens, TokenEmbedding
from transept.blocks.feedforward import MLP, GatedMLP
from transept.blocks.heads import Head, TiedHead
from transept.blocks.norms import RMSNorm
from transept.blocks.positions import NoPosition, Relative, Shared
from transept.blocks.seq2seq import EncoderDecoder, SourceEncoder
from transept.blocks.stack import Decoder
from transept.core.registry import Family, Published
from transept.core.spec import Spec
from transept.mapping import Derived, Drop, Fields, Map, Row, Spare, Tied
from transept.models.published import act, act_name
from transept.ops.activations import Act
from transept.ops.masks import Causal, Full, Mask
from transept.ops.relative import BucketSpec


@dataclass(frozen=True, kw_only=True)
class T5Spec(Spec):
    """A row of the paper's section 3.7. v1.1 is `gated` and not `tied`: it scores by a table of its own, and states are not divided by
    sqrt(dim)."""

    vocab: int
    dim: int
    layers: int
    decoder_layers: int
    heads: int
    head_dim: int
    ffn: int
    buckets: int = 32
    distance: int = 128
    eps: float = 1e-6
    act: Act = Act.RELU
    gated: bool = False
    tied: bool = True


def _encoder(s: T5Spec, tokens: TokenEmbedding) -> SourceEncoder:
    layers = [_layer(s, Full(), p, cross=False) for p in _positions(s, s.layers, True)]
    return SourceEncoder(Embedding(tokens), layers, RMSNorm(s.dim, s.eps))


def build(s: T5Spec) -> EncoderDecoder:
    """The diagram, from bottom to top."""
    tokens = TokenEmbedding(s.vocab, s.dim)
    decoder_layers = [_layer(s, Causal(), p, cross=True) for p in _positions(s, s.decoder_layers, False)]
    head = TiedHead(tokens, s.dim**-0.5) if s.tied else Head(s.dim, s.vocab)
    return EncoderDecoder(_encoder(s, tokens), Decoder(Embedding(SharedTokens(tokens)), decoder_layers, RMSNorm(s.dim, s.eps), head))


def build_encoder(s: T5Spec) -> SourceEncoder:
    """The encoder alone."""
    return _encoder(s, TokenEmbedding(s.vocab, s.dim))


def _positions(s: T5Spec, layers: int, both: bool) -> list[NoPosition]:
    """One table of distances per stack, held by its first layer."""
    first = Relative(s.heads, BucketSpec(buckets=s.buckets, distance=s.distance, both=both))
    return [first, *(Shared(first) for _ in range(layers - 1))]


def _layer(s: T5Spec, mask: Mask, position: NoPosition, cross: bool) -> Block:
    attn = Attention(s.dim, s.heads, s.heads, s.head_dim, mask=mask, position=position, scale=1.0)
    beside = {"cross": CrossAttention(s.dim, s.heads, s.head_dim, scale=1.0)} if cross else {}
    mlp = GatedMLP(s.dim, s.ffn, s.act) if s.gated else MLP(s.dim, s.ffn, s.act, bias=False)
    functions: dict[str, nn.Module] = {"attn": attn, **beside, "mlp": mlp}
    return Block(**{name: Branch(f, RMSNorm(s.dim, s.eps), Pre()) for name, f in functions.items()})


def _size(dim: int, layers: int, heads: int, head_dim: int, ffn: int, **rest: Any) -> T5Spec:
    return T5Spec(dim=dim, layers=layers, decoder_layers=layers, heads=heads, head_dim=head_dim, ffn=ffn, **{"vocab": 32128, **rest})


_V11: dict[str, Any] = {"gated": True, "act": Act.GELU_TANH, "tied": False}
SIZES = {
    "t5-small": _size(512, 6, 8, 64, 2048),
    "t5-base": _size(768, 12, 12, 64, 3072),
    "t5-large": _size(1024, 24, 16, 64, 4096),
    "t5-3b": _size(1024, 24, 32, 128, 16384),
    "t5-11b": _size(1024, 24, 128, 128, 65536),
    "flan-t5-small": _size(512, 8, 6, 64, 1024, **_V11),
    "flan-t5-base": _size(768, 12, 12, 64, 2048, **_V11),
    "flan-t5-large": _size(1024, 24, 16, 64, 2816, **_V11),
    "flan-t5-xl": _size(2048, 24, 32, 64, 5120, **_V11),
    "flan-t5-xxl": _size(4096, 24, 64, 64, 10240, **_V11),
}
_FEW = {"vocab": 96, "buckets": 8, "distance": 16}
TINY = {
    "2019": _size(32, 2, 4, 8, 48, **_FEW),
    "v1.1": _size(32, 2, 2, 8, 48, **_FEW, **_V11),
}

TABLE = "embed.tokens.weight"


def _stack(side: str, ours: str, index: str) -> list[Row]:
    """The rows of one stack; its functions are numbered in the files, and the decoder has one more."""
    mixers = (("attn", "SelfAttention"), ("cross", "EncDecAttention"))[: 2 if side == "decoder" else 1]
    last = len(mixers)
    names = [(f"{a}.{x}", f"{n}.{b}.{y}") for n, (a, b) in enumerate(mixers) for x, y in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "o"))]
    names += [(f"{a}_norm", f"{n}.layer_norm") for n, a in enumerate((*(a for a, _ in mixers), "mlp"))]
    names += [("mlp.down", f"{last}.DenseReluDense.wo")]
    at, block = f"{ours}stack.layers.{{{index}}}", f"{side}.block.{{{index}}}.layer"
    up = f"{block}.{last}.DenseReluDense"
    return [
        Row(f"{ours}stack.layers.0.attn.position.weight", f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
        *(Row(f"{at}.{a}.weight", f"{block}.{b}.weight") for a, b in names),
        Row(f"{at}.mlp.up.weight", f"{up}.wi.weight", when=lambda s: not s.gated),
        Row(f"{at}.mlp.gate.weight", f"{up}.wi_0.weight", when=lambda s: s.gated),
        Row(f"{at}.mlp.up.weight", f"{up}.wi_1.weight", when=lambda s: s.gated),
        Row(f"{ours}stack.norm.weight", f"{side}.final_layer_norm.weight"),
    ]


MAP = Map(
    Row(f"encoder.{TABLE}", "shared.weight"),
    Tied(f"encoder.{TABLE}", "encoder.embed_tokens.weight"),
    Tied(f"encoder.{TABLE}", "decoder.embed_tokens.weight"),
    *_stack("encoder", "encoder.", "l"),
    *_stack("decoder", "decoder.", "m"),
    Row("decoder.head.weight", "lm_head.weight", when=lambda s: not s.tied),
    Spare("decoder.head.weight", "shared.weight", when=lambda s: not s.tied),
    Tied(f"encoder.{TABLE}", "lm_head.weight", when=lambda s: s.tied),
    # Early files hold a table that cross-attention never used.
    Drop("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"),
    index={"l": lambda s: range(s.layers), "m": lambda s: range(s.decoder_layers)},
)
ENCODER_MAP = Map(
    Row(TABLE, "shared.weight"),
    Tied(TABLE, "encoder.embed_tokens.weight"),
    *_stack("encoder", "", "l"),
    index={"l": lambda s: range(s.layers)},
)


def _activation(c: Mapping[str, Any]) -> tuple[Act, bool]:
    """The activation and whether it gates; 'gated-gelu' is the tanh form."""
    words = c.get("feed_forward_proj", "relu").split("-")
    if len(words) > 2 or (len(words) == 2 and words[0] != "gated"):
        raise ValueError("expected 'relu' or another activation, or 'gated-' and an activation")
    return Act.GELU_TANH if words == ["gated", "gelu"] else act(words[-1]), len(words) == 2


def _written(s: T5Spec) -> dict[str, Any]:
    name = act_name(s.act)
    gated = "gated-gelu" if s.act is Act.GELU_TANH else f"gated-{name}"
    return {"feed_forward_proj": gated if s.gated else name}


def _tied(c: Mapping[str, Any]) -> bool:
    """transformers 5 always writes that the head is tied, and says in another field whether states are divided by sqrt(dim)."""
    return c.get("tie_word_embeddings", True) is not False and c.get("scale_decoder_outputs", True) is not False


_FIELDS = (
    ("vocab", "vocab_size"),
    ("dim", "d_model"),
    ("layers", "num_layers"),
    Derived("decoder_layers", ("num_decoder_layers", "num_layers"), lambda c: c.get("num_decoder_layers") or c["num_layers"],
            lambda s: {"num_decoder_layers": s.decoder_layers}),
    ("heads", "num_heads"),
    ("head_dim", "d_kv"),
    ("ffn", "d_ff"),
    ("buckets", "relative_attention_num_buckets", 32),
    ("distance", "relative_attention_max_distance", 128),
    ("eps", "layer_norm_epsilon"),
    Derived("act", ("feed_forward_proj",), lambda c: _activation(c)[0], _written),
    Derived("gated", ("feed_forward_proj",), lambda c: _activation(c)[1], _written),
    Derived("tied", ("tie_word_embeddings", "scale_decoder_outputs"), _tied, lambda s: {"tie_word_embeddings": s.tied}),
)
_INERT = ("dense_act_fn", "is_gated_act", "n_positions", "output_past", "dropout_rate", "initializer_factor", "is_decoder")
FIELDS = Fields(*_FIELDS, fixed={"is_encoder_decoder": True}, inert=_INERT)
ENCODER_FIELDS = Fields(*_FIELDS, inert=_INERT)

FAMILY = Family(
    name="t5",
    spec=T5Spec,
    build=build,
    sizes=SIZES,
    tiny=TINY,
    published=(
        Published("T5ForConditionalGeneration", MAP, FIELDS, model_type="t5"),
        Published("T5EncoderModel", ENCODER_MAP, ENCODER_FIELDS, build_encoder, model_type="t5"),
    ),
    source="https://arxiv.org/abs/1910.10683",
)
