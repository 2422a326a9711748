"""OPT (Zhang et al. 2022, arXiv 2205.01068): GPT-3's shapes with ReLU. Row 80.

OPT-350m alone normalises after each sum and has a token table half as wide as its stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from transept.blocks.attention import Attention, Bias
from transept.blocks.block import Block, Branch, Order
from transept.blocks.embeddings import Embedding, TokenEmbedding
from transept.blocks.feedforward import MLP
from transept.blocks.heads import Head, Projected, TiedHead
from transept.blocks.norms import LayerNorm, NoNorm
from transept.blocks.positions import Learned
from transept.blocks.stack import Decoder
from transept.core.registry import Family, Published
from transept.core.spec import Spec
from transept.mapping import Derived, Field, Fields, Map, Row, Tied
from transept.models.published import act, act_name
from transept.ops.activations import Act
from transept.ops.masks import Causal


@dataclass(frozen=True, kw_only=True)
class OPTSpec(Spec):
    """A row of the paper's table 1; `embed_dim` is the width of the token table, `order` where the norms stand."""

    vocab: int
    dim: int
    layers: int
    heads: int
    ffn: int
    context: int
    embed_dim: int
    order: Order = Order.PRE
    bias: bool = True
    tied: bool = True
    act: Act = Act.RELU

    @property
    def narrow(self) -> bool:
        """True where the token table is narrower than the stream."""
        return self.embed_dim != self.dim


def build(s: OPTSpec) -> Decoder:
    """The diagram, from bottom to top."""

    def layer() -> Block:
        attn = Attention(s.dim, s.heads, s.heads, s.dim // s.heads, mask=Causal(), bias=Bias.ALL if s.bias else Bias.NONE)
        mlp = MLP(s.dim, s.ffn, s.act, s.bias)
        return Block(attn=Branch(attn, LayerNorm(s.dim), s.order.rule()), mlp=Branch(mlp, LayerNorm(s.dim), s.order.rule()))

    tokens = TokenEmbedding(s.vocab, s.embed_dim)
    widen = nn.Linear(s.embed_dim, s.dim, bias=False) if s.narrow else None
    # The published table of positions begins with two rows that no token uses.
    embed = Embedding(tokens, Learned(s.context, s.dim, offset=2), widen)
    last = NoNorm() if s.order is Order.POST else LayerNorm(s.dim)
    words = TiedHead(tokens) if s.tied else Head(s.embed_dim, s.vocab)
    head = Projected(nn.Linear(s.dim, s.embed_dim, bias=False), words) if s.narrow else words
    return Decoder(embed, [layer() for _ in range(s.layers)], last, head)


def _size(layers: int, dim: int, heads: int, vocab: int = 50272, context: int = 2048, **rest: Any) -> OPTSpec:
    return OPTSpec(vocab=vocab, dim=dim, layers=layers, heads=heads, ffn=4 * dim, context=context, **{"embed_dim": dim, **rest})


SIZES = {
    "opt-125m": _size(12, 768, 12),
    "opt-350m": _size(24, 1024, 16, embed_dim=512, order=Order.POST),
    "opt-1.3b": _size(24, 2048, 32),
    "opt-2.7b": _size(32, 2560, 32),
    "opt-6.7b": _size(32, 4096, 32),
    "opt-13b": _size(40, 5120, 40),
    "opt-30b": _size(48, 7168, 56),
    "opt-66b": _size(64, 9216, 72),
    "opt-175b": _size(96, 12288, 96),
}
TINY = {
    "pre": _size(2, 32, 4, 96, 64),
    "post, narrow": _size(2, 32, 2, 96, 64, embed_dim=16, order=Order.POST),
    "untied": _size(2, 32, 2, 96, 64, tied=False, bias=False),
    "narrow, untied": _size(2, 32, 2, 96, 64, embed_dim=16, tied=False),
}

_NORMS = (("attn_norm", "self_attn_layer_norm"), ("mlp_norm", "final_layer_norm"))
_LINEAR = (
    ("attn.q", "self_attn.q_proj"),
    ("attn.k", "self_attn.k_proj"),
    ("attn.v", "self_attn.v_proj"),
    ("attn.out", "self_attn.out_proj"),
    ("mlp.up", "fc1"),
    ("mlp.down", "fc2"),
)
MAP = Map(
    Row("embed.tokens.weight", "{root}embed_tokens.weight"),
    Row("embed.project.weight", "{root}project_in.weight", when=lambda s: s.narrow),
    Row("embed.position.weight", "{root}embed_positions.weight"),
    *(Row(f"stack.layers.{{l}}.{a}.{part}", f"{{root}}layers.{{l}}.{b}.{part}") for a, b in _NORMS for part in ("weight", "bias")),
    *(Row(f"stack.layers.{{l}}.{a}.weight", f"{{root}}layers.{{l}}.{b}.weight") for a, b in _LINEAR),
    *(Row(f"stack.layers.{{l}}.{a}.bias", f"{{root}}layers.{{l}}.{b}.bias", when=lambda s: s.bias) for a, b in _LINEAR),
    *(Row(f"stack.norm.{part}", f"{{root}}final_layer_norm.{part}", when=lambda s: s.order is Order.PRE) for part in ("weight", "bias")),
    Row("head.project.weight", "{root}project_out.weight", when=lambda s: s.narrow),
    Row("head.weight", "lm_head.weight", when=lambda s: not s.tied and not s.narrow),
    Row("head.head.weight", "lm_head.weight", when=lambda s: not s.tied and s.narrow),
    Tied("embed.tokens.weight", "lm_head.weight", when=lambda s: s.tied),
    index={"l": lambda s: range(s.layers)},
    roots=("model.decoder.", "decoder."),
)


def _embed_dim(c: Mapping[str, Any]) -> int:
    return c.get("word_embed_proj_dim") or c["hidden_size"]


FIELDS = Fields(
    ("vocab", "vocab_size"),
    ("dim", "hidden_size"),
    ("layers", "num_hidden_layers"),
    ("heads", "num_attention_heads"),
    ("ffn", "ffn_dim"),
    ("context", "max_position_embeddings"),
    Derived("embed_dim", ("word_embed_proj_dim",), _embed_dim, lambda s: {"word_embed_proj_dim": s.embed_dim}),
    Field("order", "do_layer_norm_before", Order.PRE, load=lambda pre: Order.PRE if pre else Order.POST, save=lambda o: o is Order.PRE),
    ("bias", "enable_bias", True),
    ("tied", "tie_word_embeddings", True),
    Field("act", "activation_function", Act.RELU, load=act, save=act_name),
    fixed={"_remove_final_layer_norm": False, "layer_norm_elementwise_affine": True},
)

FAMILY = Family(
    name="opt",
    spec=OPTSpec,
    build=build,
    sizes=SIZES,
    tiny=TINY,
    published=(Published("OPTForCausalLM", MAP, FIELDS, model_type="opt"),),
    source="https://arxiv.org/abs/2205.01068",
)
