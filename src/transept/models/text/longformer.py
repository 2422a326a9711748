"""Longformer (Beltagy et al. 2020, arXiv 2004.05150): RoBERTa with sliding windows, dilated or not, and a few global tokens. Rows 44, 45,
49.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from transept.blocks.encoder import EncoderEmbedding
from transept.blocks.longformer import Answers, FirstToken, GlobalAttention, LongEncoder, Nobody, Question, sliding
from transept.blocks.norms import NoNorm
from transept.blocks.positions import Learned
from transept.blocks.stack import Stack
from transept.core.registry import Family, Published
from transept.mapping import Derived
from transept.models.encoders import BERT_FIXED, HeadOf, House, Kind, layer
from transept.models.text import roberta
from transept.models.text.bert import BertSpec, block, embedding
from transept.ops.masks import Mask, Window
from transept.ops.patterns import Dilated


@dataclass(frozen=True, kw_only=True)
class LongformerSpec(BertSpec):
    """RoBERTa's numbers, the width of each layer's window, `dilation` (steps between the keys of each layer's window; empty for none), and
    the token `separator` that ends a question."""

    windows: tuple[int, ...]
    dilation: tuple[int, ...] = ()
    separator: int = 2


def masks(s: LongformerSpec) -> list[Mask]:
    """Each layer's window (table 12 of the paper: small windows below, larger above; dilated where the Spec says so)."""
    steps = s.dilation or (1,) * s.layers
    return [Window(reach) if step == 1 else Dilated(reach, step) for reach, step in zip(sliding(s.windows), steps, strict=True)]


def parts(s: LongformerSpec) -> tuple[EncoderEmbedding, Stack]:
    """The diagram below the head."""
    embed = embedding(s, Learned(s.context, s.width, s.offset))
    return embed, Stack([block(s, GlobalAttention(s.dim, s.heads, mask)) for mask in masks(s)], NoNorm())


def _wired(head: HeadOf, architecture: str) -> Any:
    def build(s: LongformerSpec) -> LongEncoder:
        embed, stack = parts(s)
        return LongEncoder(embed, stack, head(s, embed.tokens), _choice(s, architecture))

    return build


def _choice(s: LongformerSpec, architecture: str) -> nn.Module:
    """Which tokens are global where the caller names none (section 3.1): the first to classify, the question to answer, the answers to
    choose.
    """
    if architecture.endswith("ForSequenceClassification"):
        return FirstToken()
    if architecture.endswith("ForMultipleChoice"):
        return Answers(s.separator)
    return Question(s.separator) if architecture.endswith("ForQuestionAnswering") else Nobody()


def _size(dim: int, layers: int, heads: int, vocab: int = 50265, context: int = 4096, window: int = 512, **rest: Any) -> LongformerSpec:
    sizes = {"vocab": vocab, "width": dim, "dim": dim, "layers": layers, "heads": heads, "ffn": 4 * dim, "context": context}
    return LongformerSpec(**{**sizes, "segments": 1, "eps": 1e-5, "offset": 2, "windows": (window,) * layers, **rest})


SIZES = {"longformer-base": _size(768, 12, 12), "longformer-large": _size(1024, 24, 16)}
TINY = {
    "two": _size(32, 2, 4, 96, 64, 8),
    "dilated": _size(32, 2, 2, 96, 64, windows=(4, 8), dilation=(1, 2)),
    "labels": _size(32, 2, 2, 96, 64, 8, labels=("no", "yes", "maybe")),
}

_GLOBAL = layer(
    ("attn.q_all", "attention.self.query_global"),
    ("attn.k_all", "attention.self.key_global"),
    ("attn.v_all", "attention.self.value_global"),
    foreign="{root}encoder.layer.{l}",
)


def _windows(c: Mapping[str, Any]) -> tuple[int, ...]:
    width = c.get("attention_window", 512)
    return (width,) * c["num_hidden_layers"] if isinstance(width, int) else tuple(width)


HOUSE = House(
    "longformer",
    "longformer.",
    rows=(*roberta.BODY, *_GLOBAL),
    fields=(
        *roberta.FIELDS,
        Derived("windows", ("attention_window",), _windows, lambda s: {"attention_window": list(s.windows)}),
        ("separator", "sep_token_id", 2),
    ),
    fixed={**BERT_FIXED, "onnx_export": False},
    inert=("ignore_attention_mask", "attention_mode"),
)
KINDS = tuple(replace(kind, architecture=kind.architecture.replace("Roberta", "Longformer")) for kind in roberta.KINDS)


def _form(kind: Kind, form: Published) -> Published:
    return replace(form, build=None if kind is KINDS[0] else _wired(kind.head, kind.architecture))


build = _wired(KINDS[0].head, KINDS[0].architecture)

FAMILY = Family(
    name="longformer",
    spec=LongformerSpec,
    build=build,
    sizes=SIZES,
    tiny=TINY,
    published=tuple(_form(kind, form) for kind, form in zip(KINDS, HOUSE.forms(parts, KINDS), strict=True)),
    source="https://arxiv.org/abs/2004.05150",
)
