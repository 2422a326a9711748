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
from transept.blocks.encoder import SpanHead, TokenHead
from transept.blocks.feedforward import MLP, GatedMLP
from transept.blocks.heads import Head, TiedHead
from transept.blocks.norms import RMSNorm
from transept.blocks.positions import NoPosition, Relative, Shared
from transept.blocks.seq2seq import (
    BareEncoderDecoder,
    EncoderDecoder,
    HeadedSource,
    SentenceEncoderDecoder,
    SentenceHead,
    SourceEncoder,
    TextEncoderDecoder,
)
from transept.blocks.stack import Trunk
from transept.core.registry import Family, Published
from transept.core.spec import Spec
from transept.mapping import Derived, Drop, Fields, Map, Row, Spare, Tied
from transept.models.encoders import both, labels
from transept.models.published import act, act_name
from transept.models.text.transformer import headed
from transept.ops.activations import Act
from transept.ops.masks import Causal, Full, Mask
from transept.ops.relative import BucketSpec


@dataclass(frozen=True, kw_only=True)
class T5Spec(Spec):
    """A row of the paper's section 3.7. v1.1 is `gated` and not `tied`: it scores by a table of its own, and states are not divided by
    sqrt(dim). The heads for whole texts have classes (`labels`), the token that is read, and the token the decoder begins with."""

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
    labels: tuple[str, ...] = ()
    end: int = 1
    start: int = 0


def _parts(s: T5Spec, tokens: TokenEmbedding) -> tuple[SourceEncoder, Trunk]:
    encoder = SourceEncoder(*_source(s, tokens))
    written = [_layer(s, Causal(), p, cross=True) for p in _positions(s, s.decoder_layers, False)]
    return encoder, Trunk(Embedding(SharedTokens(tokens)), written, RMSNorm(s.dim, s.eps))


def _source(s: T5Spec, tokens: TokenEmbedding) -> tuple[nn.Module, list[Block], nn.Module]:
    return Embedding(tokens), [_layer(s, Full(), p, cross=False) for p in _positions(s, s.layers, True)], RMSNorm(s.dim, s.eps)


def build(s: T5Spec) -> EncoderDecoder:
    """The diagram, from bottom to top."""
    tokens = TokenEmbedding(s.vocab, s.dim)
    encoder, written = _parts(s, tokens)
    return EncoderDecoder(encoder, headed(written, TiedHead(tokens, s.dim**-0.5) if s.tied else Head(s.dim, s.vocab)))


def build_bare(s: T5Spec) -> BareEncoderDecoder:
    """The diagram without its head."""
    return BareEncoderDecoder(*_parts(s, TokenEmbedding(s.vocab, s.dim)))


def build_encoder(s: T5Spec) -> SourceEncoder:
    """The encoder alone."""
    return SourceEncoder(*_source(s, TokenEmbedding(s.vocab, s.dim)))


def build_tagger(s: T5Spec) -> HeadedSource:
    """The encoder alone, scoring classes of each token."""
    return HeadedSource(*_source(s, TokenEmbedding(s.vocab, s.dim)), TokenHead(s.dim, len(s.labels)))


def build_classifier(s: T5Spec) -> SentenceEncoderDecoder:
    """Both sides read one text; classes by the decoder's state at the last end token."""
    encoder, read = _parts(s, TokenEmbedding(s.vocab, s.dim))
    return SentenceEncoderDecoder(encoder, headed(read, SentenceHead(s.dim, len(s.labels))), s.end, s.start)


def build_answers(s: T5Spec) -> TextEncoderDecoder:
    """Both sides read one text; each token is scored as the first and the last of an answer."""
    encoder, read = _parts(s, TokenEmbedding(s.vocab, s.dim))
    return TextEncoderDecoder(encoder, headed(read, SpanHead(s.dim)), s.start)


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


def _stack(side: str, ours: str, index: str, root: str) -> list[Row]:
    """The rows of one stack; its functions are numbered in the files, and the decoder has one more."""
    mixers = (("attn", "SelfAttention"), ("cross", "EncDecAttention"))[: 2 if side == "decoder" else 1]
    last = len(mixers)
    names = [(f"{a}.{x}", f"{n}.{b}.{y}") for n, (a, b) in enumerate(mixers) for x, y in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "o"))]
    names += [(f"{a}_norm", f"{n}.layer_norm") for n, a in enumerate((*(a for a, _ in mixers), "mlp"))]
    names += [("mlp.down", f"{last}.DenseReluDense.wo")]
    at, block = f"{ours}stack.layers.{{{index}}}", f"{root}{side}.block.{{{index}}}.layer"
    up = f"{block}.{last}.DenseReluDense"
    return [
        Row(f"{ours}stack.layers.0.attn.position.weight", f"{root}{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
        *(Row(f"{at}.{a}.weight", f"{block}.{b}.weight") for a, b in names),
        Row(f"{at}.mlp.up.weight", f"{up}.wi.weight", when=lambda s: not s.gated),
        Row(f"{at}.mlp.gate.weight", f"{up}.wi_0.weight", when=lambda s: s.gated),
        Row(f"{at}.mlp.up.weight", f"{up}.wi_1.weight", when=lambda s: s.gated),
        Row(f"{ours}stack.norm.weight", f"{root}{side}.final_layer_norm.weight"),
    ]


def _trunk(root: str) -> tuple[Row | Tied | Drop, ...]:
    return (
        Row(f"encoder.{TABLE}", f"{root}shared.weight"),
        *(Tied(f"encoder.{TABLE}", f"{root}{side}.embed_tokens.weight") for side in ("encoder", "decoder")),
        *_stack("encoder", "encoder.", "l", root),
        *_stack("decoder", "decoder.", "m", root),
        # Early files hold a table that cross-attention never used.
        Drop(f"{root}decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"),
    )


def _source_rows(root: str) -> tuple[Row | Tied, ...]:
    return Row(TABLE, f"{root}shared.weight"), Tied(TABLE, f"{root}encoder.embed_tokens.weight"), *_stack("encoder", "", "l", root)


_INDEX = {"l": lambda s: range(s.layers), "m": lambda s: range(s.decoder_layers)}
MAP = Map(
    *_trunk(""),
    Row("decoder.head.weight", "lm_head.weight", when=lambda s: not s.tied),
    Spare("decoder.head.weight", "shared.weight", when=lambda s: not s.tied),
    Tied(f"encoder.{TABLE}", "lm_head.weight", when=lambda s: s.tied),
    index=_INDEX,
)
BARE_MAP = Map(*_trunk(""), index=_INDEX)
ENCODER_MAP = Map(*_source_rows(""), index=_INDEX)
TAG_MAP = Map(*_source_rows("transformer."), *both("head.out", "classifier"), index=_INDEX)
CLASS_MAP = Map(
    *_trunk("transformer."),
    *both("decoder.head.dense", "classification_head.dense"),
    *both("decoder.head.out", "classification_head.out_proj"),
    index=_INDEX,
)
SPAN_MAP = Map(*_trunk(""), *both("decoder.head.out", "qa_outputs"), index=_INDEX)


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
_FIXED = {"is_encoder_decoder": True}
_START = ("start", "decoder_start_token_id", 0)
FIELDS = Fields(*_FIELDS, fixed=_FIXED, inert=_INERT)
ENCODER_FIELDS = Fields(*_FIELDS, inert=_INERT)
TAG_FIELDS = Fields(*_FIELDS, labels(2), inert=_INERT)
CLASS_FIELDS = Fields(*_FIELDS, labels(2), ("end", "eos_token_id", 1), _START, fixed=_FIXED, inert=_INERT)
SPAN_FIELDS = Fields(*_FIELDS, _START, fixed=_FIXED, inert=_INERT)

FAMILY = Family(
    name="t5",
    spec=T5Spec,
    build=build,
    sizes=SIZES,
    tiny=TINY,
    published=(
        Published("T5ForConditionalGeneration", MAP, FIELDS, model_type="t5"),
        Published("T5Model", BARE_MAP, FIELDS, build_bare, model_type="t5"),
        Published("T5EncoderModel", ENCODER_MAP, ENCODER_FIELDS, build_encoder, model_type="t5"),
        Published("T5ForTokenClassification", TAG_MAP, TAG_FIELDS, build_tagger, model_type="t5"),
        Published("T5ForSequenceClassification", CLASS_MAP, CLASS_FIELDS, build_classifier, model_type="t5"),
        Published("T5ForQuestionAnswering", SPAN_MAP, SPAN_FIELDS, build_answers, model_type="t5"),
    ),
    source="https://arxiv.org/abs/1910.10683",
)
