"""GPT-Neo (Black et al. 2021, doi 10.5281/zenodo.5297715): GPT-2 with every other layer local, and scores that are not scaled. Row 79."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transept.blocks.attention import Attention, Bias
from transept.blocks.block import Block, Branch, Pre
from transept.blocks.embeddings import Embedding, TokenEmbedding
from transept.blocks.feedforward import MLP
from transept.blocks.heads import Head, TiedHead
from transept.blocks.norms import LayerNorm
from transept.blocks.positions import Learned
from transept.blocks.stack import Decoder
from transept.core.errors import ConfigError
from transept.core.registry import Family, Published
from transept.core.spec import Spec
from transept.mapping import Derived, Drop, Field, Fields, Map, Row, Tied
from transept.models.published import act, act_name
from transept.ops.activations import Act
from transept.ops.masks import Causal, Window


@dataclass(frozen=True, kw_only=True)
class GPTNeoSpec(Spec):
    """`windows` says of each layer how many tokens it looks back on, itself counted; None is a global layer."""

    vocab: int
    dim: int
    heads: int
    ffn: int
    context: int
    windows: tuple[int | None, ...]
    eps: float = 1e-5
    tied: bool = True
    act: Act = Act.GELU_TANH


def build(s: GPTNeoSpec) -> Decoder:
    """The diagram, from bottom to top."""

    def layer(window: int | None) -> Block:
        mask = Causal() if window is None else Causal() & Window(window)
        attn = Attention(s.dim, s.heads, s.heads, s.dim // s.heads, mask=mask, bias=Bias.OUT, scale=1.0)
        mlp = MLP(s.dim, s.ffn, s.act)
        return Block(attn=Branch(attn, LayerNorm(s.dim, s.eps), Pre()), mlp=Branch(mlp, LayerNorm(s.dim, s.eps), Pre()))

    tokens = TokenEmbedding(s.vocab, s.dim)
    head = TiedHead(tokens) if s.tied else Head(s.dim, s.vocab)
    return Decoder(Embedding(tokens, Learned(s.context, s.dim)), [layer(w) for w in s.windows], LayerNorm(s.dim, s.eps), head)


def _size(layers: int, dim: int, heads: int, window: int = 256, vocab: int = 50257, context: int = 2048, **rest: Any) -> GPTNeoSpec:
    windows = tuple(window if i % 2 else None for i in range(layers))
    return GPTNeoSpec(vocab=vocab, dim=dim, heads=heads, ffn=4 * dim, context=context, windows=windows, **rest)


SIZES = {
    "gpt-neo-125m": _size(12, 768, 12),
    "gpt-neo-1.3b": _size(24, 2048, 16),
    "gpt-neo-2.7b": _size(32, 2560, 20),
}
TINY = {
    "alternating": _size(4, 32, 4, window=8, vocab=96, context=64),
    "untied": _size(2, 32, 2, window=4, vocab=96, context=64, tied=False),
}

_LAYER = (
    ("attn_norm.weight", "ln_1.weight"),
    ("attn_norm.bias", "ln_1.bias"),
    ("attn.q.weight", "attn.attention.q_proj.weight"),
    ("attn.k.weight", "attn.attention.k_proj.weight"),
    ("attn.v.weight", "attn.attention.v_proj.weight"),
    ("attn.out.weight", "attn.attention.out_proj.weight"),
    ("attn.out.bias", "attn.attention.out_proj.bias"),
    ("mlp_norm.weight", "ln_2.weight"),
    ("mlp_norm.bias", "ln_2.bias"),
    ("mlp.up.weight", "mlp.c_fc.weight"),
    ("mlp.up.bias", "mlp.c_fc.bias"),
    ("mlp.down.weight", "mlp.c_proj.weight"),
    ("mlp.down.bias", "mlp.c_proj.bias"),
)
MAP = Map(
    Row("embed.tokens.weight", "transformer.wte.weight"),
    Row("embed.position.weight", "transformer.wpe.weight"),
    *(Row(f"stack.layers.{{l}}.{ours}", f"transformer.h.{{l}}.{theirs}") for ours, theirs in _LAYER),
    Row("stack.norm.weight", "transformer.ln_f.weight"),
    Row("stack.norm.bias", "transformer.ln_f.bias"),
    Row("head.weight", "lm_head.weight", when=lambda s: not s.tied),
    Tied("embed.tokens.weight", "lm_head.weight", when=lambda s: s.tied),
    Drop("transformer.h.{l}.attn.attention.bias"),
    Drop("transformer.h.{l}.attn.attention.masked_bias"),
    index={"l": lambda s: range(len(s.windows))},
)


def _windows(c: Mapping[str, Any]) -> tuple[int | None, ...]:
    kinds = [kind for pattern, times in c["attention_types"] for _ in range(times) for kind in pattern]
    if len(kinds) != c["num_layers"] or not set(kinds) <= {"global", "local"}:
        raise ConfigError(f"attention_types should name 'global' or 'local' for each of {c['num_layers']} layers, found {kinds!r}")
    return tuple(c["window_size"] if kind == "local" else None for kind in kinds)


def _attention_types(s: GPTNeoSpec) -> Mapping[str, Any]:
    sizes = {w for w in s.windows if w is not None} or {256}
    if len(sizes) > 1:
        raise ConfigError(f"this published form has one window size for all local layers, but the model has {sorted(sizes)}")
    kinds = ["global" if w is None else "local" for w in s.windows]
    return {"attention_types": [[kinds, 1]], "attention_layers": kinds, "window_size": sizes.pop(), "num_layers": len(kinds)}


def _ffn(c: Mapping[str, Any]) -> int:
    return c.get("intermediate_size") or 4 * c["hidden_size"]


FIELDS = Fields(
    ("vocab", "vocab_size"),
    ("dim", "hidden_size"),
    ("heads", "num_heads"),
    Derived("ffn", ("intermediate_size",), _ffn, lambda s: {"intermediate_size": s.ffn}),
    ("context", "max_position_embeddings"),
    Derived("windows", ("attention_types", "attention_layers", "window_size", "num_layers"), _windows, _attention_types),
    ("eps", "layer_norm_epsilon", 1e-5),
    ("tied", "tie_word_embeddings", True),
    Field("act", "activation_function", Act.GELU_TANH, load=act, save=act_name),
)

FAMILY = Family(
    name="gpt_neo",
    spec=GPTNeoSpec,
    build=build,
    sizes=SIZES,
    tiny=TINY,
    published=(Published("GPTNeoForCausalLM", MAP, FIELDS, model_type="gpt_neo"),),
    source="https://doi.org/10.5281/zenodo.5297715",
)
