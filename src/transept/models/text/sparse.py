"""The Sparse Transformer (Child et al. 2019, arXiv 1904.10509): a decoder whose heads see a local part and a distant part, strided or
fixed. Rows 47, 48.

Pre-norm, with the two parts on different heads (eq. 9): the first half of the heads attends locally, the second far away.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from transept.blocks.attention import Attention, Bias
from transept.blocks.block import Block, Branch, Pre
from transept.blocks.embeddings import Embedding, TokenEmbedding
from transept.blocks.feedforward import MLP
from transept.blocks.heads import Head
from transept.blocks.norms import LayerNorm
from transept.blocks.positions import Learned
from transept.blocks.stack import Decoder
from transept.core.registry import Family
from transept.core.spec import Spec
from transept.ops.activations import Act
from transept.ops.masks import Causal, Mask, PerHead, Window
from transept.ops.patterns import Every, Segment, Summary


class Pattern(Enum):
    """The paper's two factorisations (section 4.3): strided for data of a regular period, fixed for text."""

    STRIDED = "the latest keys, and every stride-th"
    FIXED = "the own segment, and the ends of all segments"

    def local(self, stride: int) -> Mask:
        """A^(1)."""
        return Causal() & (Window(stride) if self is Pattern.STRIDED else Segment(stride))

    def distant(self, stride: int, summary: int) -> Mask:
        """A^(2); the fixed form keeps the query's own segment too, so that no query of the first one is left with nothing."""
        return Causal() & (Every(stride) if self is Pattern.STRIDED else Summary(stride, summary) | Segment(stride))


@dataclass(frozen=True, kw_only=True)
class SparseSpec(Spec):
    """A row of the paper's table 4; `stride` is l, near the square root of the context, and `summary` is c, how many keys of a segment
    all see.
    """

    vocab: int
    dim: int
    layers: int
    heads: int
    ffn: int
    context: int
    stride: int
    summary: int = 8
    pattern: Pattern = Pattern.FIXED
    eps: float = 1e-5


def build(s: SparseSpec) -> Decoder:
    """The diagram, from bottom to top."""
    local, distant = s.pattern.local(s.stride), s.pattern.distant(s.stride, s.summary)
    mask = PerHead((local,) * (s.heads - s.heads // 2) + (distant,) * (s.heads // 2))

    def layer() -> Block:
        attn = Attention(s.dim, s.heads, s.heads, s.dim // s.heads, mask=mask, bias=Bias.ALL)
        return Block(
            attn=Branch(attn, LayerNorm(s.dim, s.eps), Pre()), mlp=Branch(MLP(s.dim, s.ffn, Act.QUICK_GELU), LayerNorm(s.dim, s.eps), Pre())
        )

    embed = Embedding(TokenEmbedding(s.vocab, s.dim), Learned(s.context, s.dim))
    return Decoder(embed, [layer() for _ in range(s.layers)], LayerNorm(s.dim, s.eps), Head(s.dim, s.vocab))


def _size(vocab: int, dim: int, layers: int, heads: int, context: int, stride: int, **rest: Any) -> SparseSpec:
    sizes = {"vocab": vocab, "dim": dim, "layers": layers, "heads": heads, "ffn": 4 * dim, "context": context, "stride": stride}
    return SparseSpec(**{**sizes, **rest})


SIZES = {
    "sparse-enwik8": _size(256, 512, 30, 8, 12288, 128, summary=32),
    "sparse-cifar10": _size(256, 256, 128, 2, 3072, 128, pattern=Pattern.STRIDED),
}
TINY = {
    "fixed": _size(96, 32, 2, 4, 64, 8, summary=2),
    "strided": _size(96, 32, 2, 2, 64, 8, pattern=Pattern.STRIDED),
}

FAMILY = Family(name="sparse", spec=SparseSpec, build=build, sizes=SIZES, tiny=TINY, source="https://arxiv.org/abs/1904.10509")
