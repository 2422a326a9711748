"""LLaMA 1 and 2 (Touvron et al. 2023, arXiv 2302.13971 and 2307.09288); also SmolLM2, TinyLlama, LLaMA-3 and Mistral (arXiv
2310.06825). Rows 81, 82, 82a."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transept.blocks.attention import Attention, Bias
from transept.blocks.block import Block, Branch, Pre
from transept.blocks.embeddings import Embedding, TokenEmbedding
from transept.blocks.feedforward import GatedMLP
from transept.blocks.heads import Head, TiedHead
from transept.blocks.norms import RMSNorm
from transept.blocks.positions import Rotary
from transept.blocks.stack import Decoder
from transept.core.registry import Family, Published
from transept.core.spec import Spec
from transept.mapping import Derived, Drop, Field, Fields, Map, Row, Tied, Unpair
from transept.models.published import ROPE_KEYS, act, act_name, rope, rope_config
from transept.ops.activations import Act
from transept.ops.masks import Causal, Window
from transept.ops.rotary import Linear, Llama3, RopeSpec, Yarn


@dataclass(frozen=True, kw_only=True)
class LlamaSpec(Spec):
    """A row of the paper's table 2; `window` is Mistral's, `bias` and `mlp_bias` are published variants."""

    vocab: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    context: int
    rope: RopeSpec
    eps: float
    window: int | None = None
    tied: bool = False
    bias: bool = False
    mlp_bias: bool = False
    act: Act = Act.SILU


def build(s: LlamaSpec) -> Decoder:
    """The diagram, from bottom to top."""
    position = Rotary(s.rope)
    mask = Causal() if s.window is None else Causal() & Window(s.window)
    bias = Bias.ALL if s.bias else Bias.NONE

    def layer() -> Block:
        attn = Attention(s.dim, s.heads, s.kv_heads, s.head_dim, mask=mask, position=position, bias=bias)
        mlp = GatedMLP(s.dim, s.ffn, s.act, s.mlp_bias)
        return Block(attn=Branch(attn, RMSNorm(s.dim, s.eps), Pre()), mlp=Branch(mlp, RMSNorm(s.dim, s.eps), Pre()))

    tokens = TokenEmbedding(s.vocab, s.dim)
    head = TiedHead(tokens) if s.tied else Head(s.dim, s.vocab)
    return Decoder(Embedding(tokens), [layer() for _ in range(s.layers)], RMSNorm(s.dim, s.eps), head)


def _size(vocab: int, dim: int, layers: int, heads: int, kv_heads: int, ffn: int, context: int, **rest: Any) -> LlamaSpec:
    theta, scaling = rest.pop("theta", 10000.0), rest.pop("scaling", None)
    rope_spec = RopeSpec(theta=theta, dims=dim // heads, scaling=scaling)
    sizes = {"vocab": vocab, "dim": dim, "layers": layers, "heads": heads, "kv_heads": kv_heads, "ffn": ffn, "context": context}
    return LlamaSpec(**sizes, head_dim=dim // heads, rope=rope_spec, **{"eps": 1e-5, **rest})


_LLAMA3 = Llama3(factor=8.0, low=1.0, high=4.0, context=8192)
SIZES = {
    "llama2-7b": _size(32000, 4096, 32, 32, 32, 11008, 4096),
    "llama-7b": _size(32000, 4096, 32, 32, 32, 11008, 2048, eps=1e-6),
    "llama-13b": _size(32000, 5120, 40, 40, 40, 13824, 2048, eps=1e-6),
    "llama-33b": _size(32000, 6656, 60, 52, 52, 17920, 2048, eps=1e-6),
    "llama-65b": _size(32000, 8192, 80, 64, 64, 22016, 2048, eps=1e-6),
    "llama2-13b": _size(32000, 5120, 40, 40, 40, 13824, 4096),
    "llama2-70b": _size(32000, 8192, 80, 64, 8, 28672, 4096),
    "llama3.1-8b": _size(128256, 4096, 32, 32, 8, 14336, 131072, theta=500000.0, scaling=_LLAMA3),
    "tinyllama-1.1b": _size(32000, 2048, 22, 32, 4, 5632, 2048),
    "smollm2-135m": _size(49152, 576, 30, 9, 3, 1536, 8192, theta=100000.0, tied=True),
    "smollm2-360m": _size(49152, 960, 32, 15, 5, 2560, 8192, theta=100000.0, tied=True),
    "mistral-7b": _size(32000, 4096, 32, 32, 8, 14336, 32768, window=4096),
}
TINY = {
    "gqa": _size(96, 32, 2, 4, 2, 48, 64),
    "tied": _size(96, 32, 2, 2, 2, 48, 64, tied=True, bias=True, mlp_bias=True),
    "window": _size(96, 32, 2, 4, 1, 48, 64, window=8),
    "yarn": _size(96, 32, 2, 2, 1, 48, 128, scaling=Yarn(factor=4.0, context=32, attention=1.2)),
    "linear": _size(96, 32, 2, 2, 2, 48, 64, scaling=Linear(factor=2.0)),
}

_LAYER = (
    ("attn_norm.weight", "input_layernorm.weight"),
    ("attn.q.weight", "self_attn.q_proj.weight"),
    ("attn.k.weight", "self_attn.k_proj.weight"),
    ("attn.v.weight", "self_attn.v_proj.weight"),
    ("attn.out.weight", "self_attn.o_proj.weight"),
    ("mlp_norm.weight", "post_attention_layernorm.weight"),
    ("mlp.gate.weight", "mlp.gate_proj.weight"),
    ("mlp.up.weight", "mlp.up_proj.weight"),
    ("mlp.down.weight", "mlp.down_proj.weight"),
)
_ATTN_BIAS = tuple((a.replace("weight", "bias"), b.replace("weight", "bias")) for a, b in _LAYER[1:5])
_MLP_BIAS = tuple((a.replace("weight", "bias"), b.replace("weight", "bias")) for a, b in _LAYER[6:])
INDEX = {"l": lambda s: range(s.layers)}
MAP = Map(
    Row("embed.tokens.weight", "model.embed_tokens.weight"),
    *(Row(f"stack.layers.{{l}}.{ours}", f"model.layers.{{l}}.{theirs}") for ours, theirs in _LAYER),
    *(Row(f"stack.layers.{{l}}.{ours}", f"model.layers.{{l}}.{theirs}", when=lambda s: s.bias) for ours, theirs in _ATTN_BIAS),
    *(Row(f"stack.layers.{{l}}.{ours}", f"model.layers.{{l}}.{theirs}", when=lambda s: s.mlp_bias) for ours, theirs in _MLP_BIAS),
    Row("stack.norm.weight", "model.norm.weight"),
    Row("head.weight", "lm_head.weight", when=lambda s: not s.tied),
    Tied("embed.tokens.weight", "lm_head.weight", when=lambda s: s.tied),
    Drop("model.layers.{l}.self_attn.rotary_emb.inv_freq"),
    index=INDEX,
)


def _head_dim(c: Mapping[str, Any]) -> int:
    return c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]


_SHARED = (
    ("vocab", "vocab_size"),
    ("dim", "hidden_size"),
    ("layers", "num_hidden_layers"),
    ("heads", "num_attention_heads"),
    Derived(
        "kv_heads",
        ("num_key_value_heads",),
        lambda c: c.get("num_key_value_heads") or c["num_attention_heads"],
        lambda s: {"num_key_value_heads": s.kv_heads},
    ),
    Derived("head_dim", ("head_dim",), _head_dim, lambda s: {"head_dim": s.head_dim}),
    ("ffn", "intermediate_size"),
    ("context", "max_position_embeddings"),
    Derived(
        "rope", ROPE_KEYS, lambda c: rope(c, _head_dim(c), c["max_position_embeddings"]), lambda s: {"rope_parameters": rope_config(s.rope)}
    ),
    ("eps", "rms_norm_eps"),
    ("tied", "tie_word_embeddings", False),
    Field("act", "hidden_act", Act.SILU, load=act, save=act_name),
)
FIELDS = Fields(
    *_SHARED,
    ("bias", "attention_bias", False),
    ("mlp_bias", "mlp_bias", False),
    inert=("rope_interleaved",),
    fixed={"sliding_window": None},
)
MISTRAL_FIELDS = Fields(*_SHARED, ("window", "sliding_window", None))

_GGUF_LAYER = tuple(
    (ours, f"blk.{{l}}.{theirs}.weight")
    for ours, theirs in zip(
        (a for a, _ in _LAYER),
        ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down"),
        strict=True,
    )
)
# GGUF files of this family hold q and k in the layout PAIRS.
_GGUF_OPS = {"attn.q.weight": (Unpair(lambda s: s.heads),), "attn.k.weight": (Unpair(lambda s: s.kv_heads),)}
GGUF_MAP = Map(
    Row("embed.tokens.weight", "token_embd.weight"),
    *(Row(f"stack.layers.{{l}}.{ours}", theirs, *_GGUF_OPS.get(ours, ())) for ours, theirs in _GGUF_LAYER),
    Row("stack.norm.weight", "output_norm.weight"),
    Row("head.weight", "output.weight", when=lambda s: not s.tied),
    Drop("rope_freqs.weight"),
    index=INDEX,
)


def _gguf_rope(c: Mapping[str, Any]) -> RopeSpec:
    kind, factor = c.get("rope.scaling.type", "none"), float(c.get("rope.scaling.factor", 1.0))
    scaling = (
        {}
        if kind == "none"
        else {
            "rope_type": kind,
            "factor": factor,
            "original_max_position_embeddings": c.get("rope.scaling.original_context_length", c["context_length"]),
        }
    )
    config = {"rope_theta": c.get("rope.freq_base", 10000.0), "rope_scaling": scaling}
    return rope(config, c.get("rope.dimension_count") or c["embedding_length"] // c["attention.head_count"], c["context_length"])


GGUF_FIELDS = Fields(
    ("vocab", "vocab_size"),
    ("dim", "embedding_length"),
    ("layers", "block_count"),
    ("heads", "attention.head_count"),
    ("kv_heads", "attention.head_count_kv"),
    Derived(
        "head_dim",
        ("attention.key_length", "attention.value_length"),
        lambda c: c.get("attention.key_length") or c["embedding_length"] // c["attention.head_count"],
        lambda s: {"attention.key_length": s.head_dim, "attention.value_length": s.head_dim},
    ),
    ("ffn", "feed_forward_length"),
    ("context", "context_length"),
    Derived(
        "rope",
        ("rope.freq_base", "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length"),
        _gguf_rope,
        lambda s: {"rope.freq_base": s.rope.theta, "rope.dimension_count": s.rope.dims},
    ),
    ("eps", "attention.layer_norm_rms_epsilon"),
    Field("tied", "tied", default=False),
)

FAMILY = Family(
    name="llama",
    spec=LlamaSpec,
    build=build,
    sizes=SIZES,
    tiny=TINY,
    published=(
        Published("LlamaForCausalLM", MAP, FIELDS, model_type="llama"),
        Published("MistralForCausalLM", MAP, MISTRAL_FIELDS, model_type="mistral"),
        Published("gguf:llama", GGUF_MAP, GGUF_FIELDS),
    ),
    source="https://arxiv.org/abs/2307.09288",
)
