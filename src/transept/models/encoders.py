"""How published encoders are written: what the tables of BERT's family have in common, so that a form is a line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transept.blocks.embeddings import TokenEmbedding
from transept.blocks.encoder import (
    Bare,
    Encoder,
    LeftToRight,
    MaskedHead,
    NextHead,
    NextWordHead,
    Pool,
    Pooled,
    PretrainHead,
    RowHead,
    SpanHead,
    TokenHead,
)
from transept.core.registry import Published
from transept.mapping import Derived, Drop, Field, Fields, Given, Map, Row, Tied
from transept.models.published import act, act_name
from transept.ops.activations import Act
from transept.ops.masks import Causal, Full

Statement = Row | Tied | Drop
Entry = Field | Derived | Given | tuple[str, str] | tuple[str, str, Any]
HeadOf = Callable[[Any, TokenEmbedding], Any]
Parts = Callable[..., tuple[Any, Any]]
Wiring = Callable[[Parts, HeadOf], Callable[[Any], Any]]
BOTH_WAYS = Full()
Summary = Callable[[Any], Any]

# TensorFlow's words for a norm's weight and bias, which the first published checkpoints still carry.
OLDER = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))


@dataclass(frozen=True)
class Kind:
    """One head: the architecture's name, the module, the rows of its weights, and whether its classes have names; how it is joined to the
    body, and what its configuration always says besides."""

    architecture: str
    head: HeadOf
    rows: tuple[Statement, ...] = ()
    labelled: bool = False
    wiring: Wiring = field(default_factory=lambda: wired)
    fixed: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class House:
    """What all forms of one model_type share: the prefix and rows of the body, the configuration fields."""

    model_type: str
    root: str
    rows: tuple[Statement, ...]
    fields: tuple[Entry, ...]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    inert: tuple[str, ...] = ()
    index: Mapping[str, Callable[[Any], Sequence[int]]] = field(default_factory=lambda: {"l": lambda s: range(s.layers)})

    def forms(self, parts: Parts, kinds: Sequence[Kind]) -> tuple[Published, ...]:
        """A published form for each kind; the first is the family's own and needs no build."""
        return tuple(
            Published(
                kind.architecture,
                Map(
                    *self.rows,
                    *kind.rows,
                    index=self.index,
                    roots=("", self.root) if kind.architecture.endswith("Model") else (self.root, ""),
                    older=OLDER,
                ),
                Fields(*self.fields, *((LABELS,) if kind.labelled else ()), fixed={**self.fixed, **kind.fixed}, inert=self.inert),
                build=None if kind is kinds[0] else kind.wiring(parts, kind.head),
                model_type=self.model_type,
            )
            for kind in kinds
        )


def wired(parts: Parts, head: HeadOf) -> Callable[[Any], Encoder]:
    """A build function: the family's embedding and stack under one head."""

    def build(s: Any) -> Encoder:
        embed, stack = parts(s)
        return Encoder(embed, stack, head(s, embed.tokens))

    return build


def written(parts: Parts, head: HeadOf) -> Callable[[Any], LeftToRight]:
    """A build function: the same, read from left to right."""

    def build(s: Any) -> LeftToRight:
        embed, stack = parts(s, Causal())
        return LeftToRight(embed, stack, head(s, embed.tokens))

    return build


def writer(kind: Kind, architecture: str, head: HeadOf | None = None, **fixed: Any) -> Kind:
    """The form that writes with the weights of one that fills masks."""
    return Kind(architecture, head or next_word, kind.rows, wiring=written, fixed={"is_decoder": True, **fixed})


def tanh(s: Any) -> Pool:
    """BERT's pooler."""
    return Pool(s.dim, Act.TANH)


def gelu(s: Any) -> Pool:
    """The pooler of ELECTRA and DeBERTa."""
    return Pool(s.dim, Act.GELU)


def bare(s: Any, tokens: TokenEmbedding) -> Bare:
    """No head."""
    return Bare()


def pooled(pool: Summary = tanh) -> HeadOf:
    """No head, but a summary of each row."""
    return lambda s, tokens: Pooled(pool(s))


def rows(pool: Summary = tanh) -> HeadOf:
    """The Spec's classes for each row."""
    return lambda s, tokens: RowHead(s.dim, len(s.labels), pool(s))


def choice(pool: Summary = tanh) -> HeadOf:
    """One score for each row, to be compared with those of its alternatives."""
    return lambda s, tokens: RowHead(s.dim, 1, pool(s))


def classes(s: Any, tokens: TokenEmbedding) -> TokenHead:
    """The Spec's classes for each token."""
    return TokenHead(s.dim, len(s.labels))


def span(s: Any, tokens: TokenEmbedding) -> SpanHead:
    """Where an answer starts and ends."""
    return SpanHead(s.dim)


def mlm(s: Any, tokens: TokenEmbedding) -> MaskedHead:
    """Masked words, through the activation of the layers."""
    return MaskedHead(s.dim, tokens, s.act, s.eps)


def mlm_gelu(s: Any, tokens: TokenEmbedding) -> MaskedHead:
    """Masked words, through GELU whatever the layers have."""
    return MaskedHead(s.dim, tokens, Act.GELU, s.eps)


def next_word(s: Any, tokens: TokenEmbedding) -> NextWordHead:
    """The next word, through the activation of the layers."""
    return NextWordHead(s.dim, tokens, s.act, s.eps)


def next_word_gelu(s: Any, tokens: TokenEmbedding) -> NextWordHead:
    """The next word, through GELU whatever the layers have."""
    return NextWordHead(s.dim, tokens, Act.GELU, s.eps)


def following(s: Any, tokens: TokenEmbedding) -> NextHead:
    """Does the second text follow the first."""
    return NextHead(s.dim, tanh(s))


def pretrain(s: Any, tokens: TokenEmbedding) -> PretrainHead:
    """Masked words and the next text."""
    return PretrainHead(mlm(s, tokens), following(s, tokens))


def both(native: str, foreign: str) -> tuple[Row, Row]:
    """The rows of a layer's weight and bias."""
    return Row(f"{native}.weight", f"{foreign}.weight"), Row(f"{native}.bias", f"{foreign}.bias")


def layer(*pairs: tuple[str, str], foreign: str, native: str = "stack.layers.{l}") -> tuple[Row, ...]:
    """The rows of weights and biases within one layer."""
    return tuple(row for ours, theirs in pairs for row in both(f"{native}.{ours}", f"{foreign}.{theirs}"))


def masked(dense: str, norm: str, bias: str, *tied: str, native: str = "head") -> tuple[Statement, ...]:
    """The rows of a masked-word head; `tied` are the names that repeat the token table, or, ending in 'bias', the bias."""
    ties = (Tied(f"{native}.bias" if name.endswith("bias") else "embed.tokens.weight", name) for name in tied)
    return *both(f"{native}.dense", dense), *both(f"{native}.norm", norm), Row(f"{native}.bias", bias), *ties


def drops(*names: str) -> tuple[Drop, ...]:
    """Heads that files of this form may carry besides."""
    return tuple(Drop(f"{name}.{leaf}") for name in names for leaf in ("weight", "bias"))


def labels(unsaid: int) -> Derived:
    """The names of the classes; a configuration that says nothing of them means that many."""

    def read(c: Mapping[str, Any]) -> tuple[str, ...]:
        names = c.get("id2label")
        if names is None:
            return tuple(f"LABEL_{i}" for i in range(c.get("num_labels") or unsaid))
        return tuple(str(names[key]) for key in sorted(names, key=int))

    def write(s: Any) -> dict[str, Any]:
        return {"id2label": {str(i): name for i, name in enumerate(s.labels)}, "label2id": {name: i for i, name in enumerate(s.labels)}}

    return Derived("labels", ("id2label", "label2id", "num_labels"), read, write)


LABELS = labels(2)

BERT_FIELDS: tuple[Entry, ...] = (
    ("vocab", "vocab_size"),
    ("dim", "hidden_size"),
    ("layers", "num_hidden_layers"),
    ("heads", "num_attention_heads"),
    ("ffn", "intermediate_size"),
    ("segments", "type_vocab_size", 2),
    ("eps", "layer_norm_eps", 1e-12),
    Field("act", "hidden_act", Act.GELU, load=act, save=act_name),
)
BERT_FIXED = {"tie_word_embeddings": True, "position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False}
"""What would be another computation; decoders with BERT's weights are not of this family."""
