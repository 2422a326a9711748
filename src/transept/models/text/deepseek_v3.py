"""DeepSeek-V3 (DeepSeek-AI 2024, arXiv 2412.19437): latent attention (eq. 37-47 in the lecture's count) and a mixture of experts. Row 82b.

The published multi-token-prediction layer (section 2.2) is training's, and is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transept.blocks.block import Block, Branch, Pre
from transept.blocks.embeddings import Embedding, TokenEmbedding
from transept.blocks.feedforward import Experts, GatedMLP, MoE, Router
from transept.blocks.heads import Head, TiedHead
from transept.blocks.latent import LatentAttention, LatentSpec
from transept.blocks.norms import RMSNorm
from transept.blocks.positions import Rotary
from transept.blocks.stack import Decoder
from transept.core.errors import ConfigError
from transept.core.registry import Family, Published
from transept.core.spec import Spec
from transept.mapping import Cat, Derived, Drop, Field, Fields, Map, Row, SplitHeads, Stack, Tied
from transept.models.published import ROPE_KEYS, act, act_name, mscale, rope, rope_config
from transept.ops.activations import Act
from transept.ops.masks import Causal
from transept.ops.rotary import Layout, RopeSpec, Yarn
from transept.ops.routing import RouteSpec


@dataclass(frozen=True, kw_only=True)
class DeepSeekV3Spec(Spec):
    """Section 4.2 of the paper: the first `dense` layers have a plain feed-forward network, the others experts of width `expert_ffn` and
    `shared` more that every token visits; `heat` is the weight of YaRN's softmax temperature."""

    vocab: int
    dim: int
    layers: int
    dense: int
    latent: LatentSpec
    ffn: int
    route: RouteSpec
    expert_ffn: int
    shared: int
    context: int
    rope: RopeSpec
    eps: float
    heat: float = 0.0
    tied: bool = False
    act: Act = Act.SILU

    @property
    def scale(self) -> float:
        """1 / sqrt(d_h + d_h^R) of eq. 46, times YaRN's temperature squared where the context is stretched."""
        stretch = mscale(self.rope.scaling.factor, self.heat) if isinstance(self.rope.scaling, Yarn) else 1.0
        return (self.latent.nope + self.latent.rope) ** -0.5 * stretch**2


def build(s: DeepSeekV3Spec) -> Decoder:
    """The diagram (figure 2), from bottom to top."""
    position = Rotary(s.rope)

    def experts() -> MoE:
        shared = GatedMLP(s.dim, s.shared * s.expert_ffn, s.act)
        return MoE(Router(s.dim, s.route), Experts(s.route.experts, s.dim, s.expert_ffn, s.act), shared)

    def layer(index: int) -> Block:
        attn = LatentAttention(s.dim, s.latent, mask=Causal(), position=position, scale=s.scale)
        mlp = GatedMLP(s.dim, s.ffn, s.act) if index < s.dense else experts()
        return Block(attn=Branch(attn, RMSNorm(s.dim, s.eps), Pre()), mlp=Branch(mlp, RMSNorm(s.dim, s.eps), Pre()))

    tokens = TokenEmbedding(s.vocab, s.dim)
    head = TiedHead(tokens) if s.tied else Head(s.dim, s.vocab)
    return Decoder(Embedding(tokens), [layer(i) for i in range(s.layers)], RMSNorm(s.dim, s.eps), head)


SIZES = {
    "deepseek-v3": DeepSeekV3Spec(
        vocab=129280,
        dim=7168,
        layers=61,
        dense=3,
        latent=LatentSpec(heads=128, q_rank=1536, kv_rank=512, nope=128, rope=64, value=128, eps=1e-6),
        ffn=18432,
        route=RouteSpec(experts=256, chosen=8, groups=8, top_groups=4, scale=2.5),
        expert_ffn=2048,
        shared=1,
        context=163840,
        rope=RopeSpec(theta=10000.0, dims=64, layout=Layout.PAIRS, scaling=Yarn(factor=40.0, context=4096)),
        eps=1e-6,
        heat=1.0,
    )
}
_TINY = DeepSeekV3Spec(
    vocab=96,
    dim=32,
    layers=3,
    dense=1,
    latent=LatentSpec(heads=4, q_rank=24, kv_rank=16, nope=8, rope=8, value=8, eps=1e-6),
    ffn=48,
    route=RouteSpec(experts=8, chosen=3, groups=4, top_groups=2, scale=2.5),
    expert_ffn=16,
    shared=1,
    context=64,
    rope=RopeSpec(theta=10000.0, dims=8, layout=Layout.PAIRS),
    eps=1e-6,
)
TINY = {
    "moe": _TINY,
    "yarn": _TINY.replace(rope=_TINY.rope.replace(scaling=Yarn(factor=4.0, context=16)), heat=1.0, shared=2),
    "tied": _TINY.replace(tied=True, dense=0, layers=2, rope=_TINY.rope.replace(layout=Layout.HALVES)),
}


def _heads(*parts: str) -> SplitHeads:
    return SplitHeads(lambda s: s.latent.heads, lambda s: [getattr(s.latent, part) for part in parts])


_Q, _K, _V = ("attn.q_up", "attn.q_rope"), ("attn.kv_down", "attn.k_rope"), ("attn.k_up", "attn.v_up")
_ATTENTION = (
    (("attn_norm",), "input_layernorm", ()),
    (("attn.q_down",), "self_attn.q_a_proj", ()),
    (("attn.q_norm",), "self_attn.q_a_layernorm", ()),
    (_Q, "self_attn.q_b_proj", (_heads("nope", "rope"),)),
    (_K, "self_attn.kv_a_proj_with_mqa", (Cat(lambda s: (s.latent.kv_rank, s.latent.rope)),)),
    (("attn.kv_norm",), "self_attn.kv_a_layernorm", ()),
    (_V, "self_attn.kv_b_proj", (_heads("nope", "value"),)),
    (("attn.out",), "self_attn.o_proj", ()),
    (("mlp_norm",), "post_attention_layernorm", ()),
)
_COMMON = tuple(
    Row(tuple(f"stack.layers.{{l}}.{name}.weight" for name in ours), f"model.layers.{{l}}.{theirs}.weight", *ops)
    for ours, theirs, ops in _ATTENTION
)
_GATED = ("gate", "up", "down")
_EXPERTS = (
    Row("stack.layers.{m}.mlp.router.weight", "model.layers.{m}.mlp.gate.weight"),
    Row("stack.layers.{m}.mlp.router.correction", "model.layers.{m}.mlp.gate.e_score_correction_bias"),
    *(Row(f"stack.layers.{{m}}.mlp.experts.{n}", f"model.layers.{{m}}.mlp.experts.{{e}}.{n}_proj.weight", Stack()) for n in _GATED),
    *(Row(f"stack.layers.{{m}}.mlp.shared.{n}.weight", f"model.layers.{{m}}.mlp.shared_experts.{n}_proj.weight") for n in _GATED),
)
_PREDICTION = ("embed_tokens", "enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head")
MAP = Map(
    Row("embed.tokens.weight", "model.embed_tokens.weight"),
    *_COMMON,
    *(Row(f"stack.layers.{{d}}.mlp.{n}.weight", f"model.layers.{{d}}.mlp.{n}_proj.weight") for n in _GATED),
    *_EXPERTS,
    Row("stack.norm.weight", "model.norm.weight"),
    Row("head.weight", "lm_head.weight", when=lambda s: not s.tied),
    Tied("embed.tokens.weight", "lm_head.weight", when=lambda s: s.tied),
    *(Drop(f"model.layers.{{p}}.{name}.weight") for name in _PREDICTION),
    *(Drop(row.foreign.replace("{l}", "{p}").replace("{m}", "{p}")) for row in (*_COMMON, *_EXPERTS)),
    index={
        "l": lambda s: range(s.layers),
        "d": lambda s: range(s.dense),
        "m": lambda s: range(s.dense, s.layers),
        "p": lambda s: range(s.layers, s.layers + 1),
        "e": lambda s: range(s.route.experts),
    },
)


_LATENT = {
    "heads": "num_attention_heads",
    "q_rank": "q_lora_rank",
    "kv_rank": "kv_lora_rank",
    "nope": "qk_nope_head_dim",
    "rope": "qk_rope_head_dim",
    "value": "v_head_dim",
}
_ROUTE = {
    "experts": "n_routed_experts",
    "chosen": "num_experts_per_tok",
    "groups": "n_group",
    "top_groups": "topk_group",
    "normalise": "norm_topk_prob",
    "scale": "routed_scaling_factor",
}


def _named(c: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {ours: c[theirs] for ours, theirs in names.items()}


def _renamed(part: Spec, names: Mapping[str, str]) -> dict[str, Any]:
    return {theirs: getattr(part, ours) for ours, theirs in names.items()}


def _latent(c: Mapping[str, Any]) -> LatentSpec:
    if c.get("num_key_value_heads", c["num_attention_heads"]) != c["num_attention_heads"]:
        raise ConfigError(f"latent attention has one key per query head, but num_key_value_heads is {c['num_key_value_heads']}")
    # The publisher's two inner norms keep their own eps, whatever the configuration says of the others.
    return LatentSpec(**_named(c, _LATENT), eps=1e-6)


def _latent_out(s: DeepSeekV3Spec) -> Mapping[str, Any]:
    if s.latent.eps != 1e-6:
        raise ConfigError(f"this published form has eps 1e-06 in its latent norms, but the model has {s.latent.eps:g}")
    return _renamed(s.latent, _LATENT) | {"num_key_value_heads": s.latent.heads}


def _rope(c: Mapping[str, Any]) -> RopeSpec:
    layout = Layout.PAIRS if c.get("rope_interleave", True) else Layout.HALVES
    return rope(c, c["qk_rope_head_dim"], c["max_position_embeddings"], layout=layout)


def _rope_out(s: DeepSeekV3Spec) -> Mapping[str, Any]:
    heat = {"mscale_all_dim": s.heat} if s.heat else {}
    return {"rope_parameters": rope_config(s.rope) | heat, "rope_interleave": s.rope.layout is Layout.PAIRS}


def _heat(c: Mapping[str, Any]) -> float:
    return float(((c.get("rope_scaling") or {}) | (c.get("rope_parameters") or {})).get("mscale_all_dim") or 0.0)


FIELDS = Fields(
    ("vocab", "vocab_size"),
    ("dim", "hidden_size"),
    ("layers", "num_hidden_layers"),
    ("dense", "first_k_dense_replace"),
    Derived("latent", (*_LATENT.values(), "num_key_value_heads"), _latent, _latent_out),
    ("ffn", "intermediate_size"),
    Derived("route", tuple(_ROUTE.values()), lambda c: RouteSpec(**_named(c, _ROUTE)), lambda s: _renamed(s.route, _ROUTE)),
    ("expert_ffn", "moe_intermediate_size"),
    ("shared", "n_shared_experts"),
    ("context", "max_position_embeddings"),
    Derived("rope", (*ROPE_KEYS, "rope_interleave"), _rope, _rope_out),
    Derived("heat", (), _heat, lambda s: {}),
    ("eps", "rms_norm_eps"),
    ("tied", "tie_word_embeddings", False),
    Field("act", "hidden_act", Act.SILU, load=act, save=act_name),
    fixed={"moe_layer_freq": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    inert=("head_dim", "qk_head_dim"),
)

FAMILY = Family(
    name="deepseek_v3",
    spec=DeepSeekV3Spec,
    build=build,
    sizes=SIZES,
    tiny=TINY,
    published=(Published("DeepseekV3ForCausalLM", MAP, FIELDS, model_type="deepseek_v3"),),
    source="https://arxiv.org/abs/2412.19437",
)
