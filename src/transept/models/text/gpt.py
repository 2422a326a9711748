"""GPT-1 (Radford et al. 2018, "Improving language understanding by generative pre-training"), GPT-2 (Radford et al. 2019, "Language
models are unsupervised multitask learners") and the shapes of GPT-3 (Brown et al. 2020, arXiv 2005.14165, table 2.1). Rows 33, 71, 73-75.

GPT-1 normalises after each sum, GPT-2 before each function and once more at the end; GPT-3 alternates dense and locally banded layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from transept.blocks.attention import Attention, Bias
from transept.blocks.block import Block, Branch, Order
from transept.blocks.embeddings import Embedding, TokenEmbedding
from transept.blocks.feedforward import MLP
from transept.blocks.heads import Classifier, DoubleHead, Head, TiedHead
from transept.blocks.norms import LayerNorm, NoNorm
from transept.blocks.positions import Learned
from transept.blocks.stack import Decoder
from transept.core.errors import ConfigError
from transept.core.registry import Family, Published
from transept.core.spec import Spec
from transept.mapping import Cat, Derived, Drop, Field, Fields, Given, Map, Row, T, Tied
from transept.models.published import act, act_name
from transept.ops.activations import Act
from transept.ops.masks import Causal, Window


@dataclass(frozen=True, kw_only=True)
class GPTSpec(Spec):
    """A row of the papers' tables; `order` is where the norms stand, `band` how far banded layers look back, `classes` a classifier's."""

    vocab: int
    dim: int
    layers: int
    heads: int
    ffn: int
    context: int
    eps: float = 1e-5
    order: Order = Order.PRE
    band: int | None = None
    tied: bool = True
    act: Act = Act.GELU_TANH
    classes: int | None = None


def trunk(s: GPTSpec, tokens: TokenEmbedding) -> tuple[Embedding, list[Block], nn.Module]:
    """The diagram from bottom to top: tokens plus learned positions, the layers, the last norm (GPT-1 has none)."""

    def layer(index: int) -> Block:
        mask = Causal() if s.band is None or index % 2 == 0 else Causal() & Window(s.band)
        attn = Attention(s.dim, s.heads, s.heads, s.dim // s.heads, mask=mask, bias=Bias.ALL)
        mlp = MLP(s.dim, s.ffn, s.act)
        rule = s.order.rule
        return Block(attn=Branch(attn, LayerNorm(s.dim, s.eps), rule()), mlp=Branch(mlp, LayerNorm(s.dim, s.eps), rule()))

    embed = Embedding(tokens, Learned(s.context, s.dim))
    last = NoNorm() if s.order is Order.POST else LayerNorm(s.dim, s.eps)
    return embed, [layer(i) for i in range(s.layers)], last


def build(s: GPTSpec) -> Decoder:
    """The language model: its head is the token table."""
    tokens = TokenEmbedding(s.vocab, s.dim)
    return Decoder(*trunk(s, tokens), _words(s, tokens))


def build_classifier(s: GPTSpec) -> Classifier:
    """Fine-tuned to classify: a linear layer on the state of the last token (GPT-1, eq. 3)."""
    return Classifier(*trunk(s, TokenEmbedding(s.vocab, s.dim)), Head(s.dim, _classes(s)))


def build_choice(s: GPTSpec) -> DoubleHead:
    """Fine-tuned to choose among answers, with the language model's head kept for its auxiliary loss (GPT-1, eq. 5)."""
    tokens = TokenEmbedding(s.vocab, s.dim)
    return DoubleHead(*trunk(s, tokens), _words(s, tokens), Head(s.dim, 1, bias=True))


def _words(s: GPTSpec, tokens: TokenEmbedding) -> nn.Module:
    return TiedHead(tokens) if s.tied else Head(s.dim, s.vocab)


def _size(layers: int, dim: int, heads: int, vocab: int = 50257, context: int = 1024, **rest: Any) -> GPTSpec:
    return GPTSpec(vocab=vocab, dim=dim, layers=layers, heads=heads, context=context, **{"ffn": 4 * dim, **rest})


def _gpt3(layers: int, dim: int, heads: int) -> GPTSpec:
    # The paper names the banded layers but not their width; 256 is the smaller of the Sparse Transformer's own (arXiv 1904.10509).
    return _size(layers, dim, heads, context=2048, band=256)


SIZES = {
    "gpt2": _size(12, 768, 12),
    "gpt2-medium": _size(24, 1024, 16),
    "gpt2-large": _size(36, 1280, 20),
    "gpt2-xl": _size(48, 1600, 25),
    "gpt1": _size(12, 768, 12, 40478, 512, order=Order.POST),
    "gpt3-small": _gpt3(12, 768, 12),
    "gpt3-medium": _gpt3(24, 1024, 16),
    "gpt3-large": _gpt3(24, 1536, 16),
    # Printed with 24 heads of 128, which are not 2048 wide; and 13B with a width of 5140, which 40 heads of 128 are not.
    "gpt3-xl": _gpt3(24, 2048, 16),
    "gpt3-2.7b": _gpt3(32, 2560, 32),
    "gpt3-6.7b": _gpt3(32, 4096, 32),
    "gpt3-13b": _gpt3(40, 5120, 40),
    "gpt3-175b": _gpt3(96, 12288, 96),
}
TINY = {
    "gpt1": _size(2, 32, 4, 96, 64, order=Order.POST),
    "gpt2": _size(2, 32, 2, 96, 64, ffn=80),
    "gpt3": _size(4, 32, 4, 96, 64, band=8),
    "untied": _size(2, 32, 2, 96, 64, tied=False, act=Act.RELU),
}


def _thirds(s: GPTSpec) -> Sequence[int]:
    return (s.dim, s.dim, s.dim)


INDEX = {"l": lambda s: range(s.layers)}
_QKV = ("attn.q", "attn.k", "attn.v")
_LINEAR = (("attn.out", "attn.c_proj", "attn_output"), ("mlp.up", "mlp.c_fc", "ffn_up"), ("mlp.down", "mlp.c_proj", "ffn_down"))
_NORM = (("attn_norm", "ln_1", "attn_norm"), ("mlp_norm", "ln_2", "ffn_norm"))


def _ours(name: str, part: str) -> str:
    return f"stack.layers.{{l}}.{name}.{part}"


def _names(tokens: str, positions: str, *rest: Row | Tied) -> Map:
    """The publisher's names; matrices are stored [in, out], and q, k, v side by side in one."""
    return Map(
        Row("embed.tokens.weight", f"{{root}}{tokens}"),
        Row("embed.position.weight", f"{{root}}{positions}"),
        Row(tuple(_ours(n, "weight") for n in _QKV), "{root}h.{l}.attn.c_attn.weight", T(), Cat(_thirds)),
        Row(tuple(_ours(n, "bias") for n in _QKV), "{root}h.{l}.attn.c_attn.bias", Cat(_thirds)),
        *(Row(_ours(a, "weight"), f"{{root}}h.{{l}}.{b}.weight", T()) for a, b, _ in _LINEAR),
        *(Row(_ours(a, "bias"), f"{{root}}h.{{l}}.{b}.bias") for a, b, _ in _LINEAR),
        *(Row(_ours(a, part), f"{{root}}h.{{l}}.{b}.{part}") for a, b, _ in _NORM for part in ("weight", "bias")),
        *rest,
        Drop("{root}h.{l}.attn.bias"),
        Drop("{root}h.{l}.attn.masked_bias"),
        index=INDEX,
        roots=("transformer.", ""),
    )


_LAST = (Row("stack.norm.weight", "{root}ln_f.weight"), Row("stack.norm.bias", "{root}ln_f.bias"))
_WORDS = (
    Row("head.weight", "lm_head.weight", when=lambda s: not s.tied),
    Tied("embed.tokens.weight", "lm_head.weight", when=lambda s: s.tied),
)
_CHOICE = tuple(Row(f"choice.{part}", f"multiple_choice_head.summary.{part}") for part in ("weight", "bias"))
_SCORE = Row("head.weight", "score.weight")
_GPT1, _GPT2 = ("tokens_embed.weight", "positions_embed.weight"), ("wte.weight", "wpe.weight")
_MAPS1 = (_names(*_GPT1, *_WORDS), _names(*_GPT1, _SCORE), _names(*_GPT1, *_WORDS, *_CHOICE))
_MAPS2 = (_names(*_GPT2, *_LAST, *_WORDS), _names(*_GPT2, *_LAST, _SCORE), _names(*_GPT2, *_LAST, *_WORDS, *_CHOICE))

_ACTS = {"gelu": Act.GELU_TANH, "relu": Act.RELU, "silu": Act.SILU}
_SHARED = (
    ("vocab", "vocab_size"),
    ("dim", "n_embd"),
    ("layers", "n_layer"),
    ("heads", "n_head"),
    ("context", "n_positions"),
    ("eps", "layer_norm_epsilon", 1e-5),
    ("tied", "tie_word_embeddings", True),
)
# GPT-1 calls the tanh form "gelu", and its feed-forward network is always four times as wide.
_ONLY1 = (
    Given("order", lambda c: Order.POST),
    Given("ffn", lambda c: 4 * c["n_embd"]),
    Field("act", "afn", Act.GELU_TANH, load=_ACTS.__getitem__, save=lambda a: next(k for k, v in _ACTS.items() if v is a)),
)
_ONLY2 = (
    Derived("ffn", ("n_inner",), lambda c: c.get("n_inner") or 4 * c["n_embd"], lambda s: {"n_inner": s.ffn}),
    Field("act", "activation_function", Act.GELU_TANH, load=act, save=act_name),
)


def _classes(s: GPTSpec) -> int:
    if s.classes is None:
        raise ConfigError("a classifier needs `classes`, the number of its classes")
    return s.classes


def _labels(s: GPTSpec) -> Mapping[str, Any]:
    names = [f"LABEL_{i}" for i in range(_classes(s))]
    return {"id2label": {str(i): name for i, name in enumerate(names)}, "label2id": {name: i for i, name in enumerate(names)}}


_CLASSES = Derived("classes", ("id2label", "num_labels"), lambda c: len(c.get("id2label") or ()) or c.get("num_labels", 2), _labels)
_SCALED: Mapping[str, Any] = {"scale_attn_weights": True}
_SUMMARY: Mapping[str, Any] = {
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "summary_proj_to_labels": True,
    "summary_activation": None,
    "id2label": {"0": "LABEL_0"},
    "label2id": {"LABEL_0": 0},
}


def _forms(name: str, model_type: str, maps: tuple[Map, Map, Map], own: tuple[Any, ...], fixed: Mapping[str, Any]) -> tuple[Published, ...]:
    """The language model, the classifier and the double-headed model of one publisher's class name."""
    return (
        Published(f"{name}LMHeadModel", maps[0], Fields(*_SHARED, *own, fixed=fixed), model_type=model_type),
        Published(f"{name}ForSequenceClassification", maps[1], Fields(*_SHARED, *own, _CLASSES, fixed=fixed), build_classifier, model_type),
        Published(f"{name}DoubleHeadsModel", maps[2], Fields(*_SHARED, *own, fixed={**fixed, **_SUMMARY}), build_choice, model_type),
    )


GGUF_MAP = Map(
    Row("embed.tokens.weight", "token_embd.weight"),
    Row("embed.position.weight", "position_embd.weight"),
    *(Row(tuple(_ours(n, part) for n in _QKV), f"blk.{{l}}.attn_qkv.{part}", Cat(_thirds)) for part in ("weight", "bias")),
    *(Row(_ours(a, part), f"blk.{{l}}.{c}.{part}") for a, _, c in (*_LINEAR, *_NORM) for part in ("weight", "bias")),
    Row("stack.norm.weight", "output_norm.weight"),
    Row("stack.norm.bias", "output_norm.bias"),
    Row("head.weight", "output.weight", when=lambda s: not s.tied),
    index=INDEX,
)
GGUF_FIELDS = Fields(
    ("vocab", "vocab_size"),
    ("dim", "embedding_length"),
    ("layers", "block_count"),
    ("heads", "attention.head_count"),
    ("ffn", "feed_forward_length"),
    ("context", "context_length"),
    ("eps", "attention.layer_norm_epsilon"),
    Field("tied", "tied", default=False),
)

FAMILY = Family(
    name="gpt",
    spec=GPTSpec,
    build=build,
    sizes=SIZES,
    tiny=TINY,
    published=(
        *_forms("GPT2", "gpt2", _MAPS2, _ONLY2, _SCALED),
        *_forms("OpenAIGPT", "openai-gpt", _MAPS1, _ONLY1, {}),
        Published("gguf:gpt2", GGUF_MAP, GGUF_FIELDS),
    ),
    source="https://arxiv.org/abs/2005.14165",
)
