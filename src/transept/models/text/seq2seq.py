"""Sequence to sequence by recurrent networks: without attention (Sutskever et al. 2014, arXiv 1409.3215), with Bahdanau's (2014, arXiv
1409.0473) and with Luong's (2015, arXiv 1508.04025). Rows 7, 8.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import nn

from transept.blocks.alignment import Additive, After, AlignedDecoder, Before, BiEncoder, Blind, Dot
from transept.blocks.embeddings import TokenEmbedding
from transept.blocks.heads import Head
from transept.blocks.recurrent import GRUCell, Recurrence
from transept.blocks.seq2seq import EncoderDecoder
from transept.core.registry import Family
from transept.core.spec import Spec


class Look(Enum):
    """How the decoder looks at the source."""

    NONE = "not at all, but for its last state"
    BAHDANAU = "before each step, additive scores"
    LUONG = "after each step, multiplicative scores"


@dataclass(frozen=True, kw_only=True)
class Seq2SeqSpec(Spec):
    """Vocabularies of both sides, widths of token vectors (`dim`) and states (`width`), layers of the encoder."""

    source_vocab: int
    vocab: int
    dim: int
    width: int
    layers: int = 1
    look: Look = Look.BAHDANAU
    dropout: float = 0.0


def build(s: Seq2SeqSpec) -> EncoderDecoder:
    """A bidirectional GRU reads, a GRU writes."""
    sides = [Recurrence([GRUCell(s.width if i else s.dim, s.width) for i in range(s.layers)], s.dropout) for _ in range(2)]
    encoder = BiEncoder(TokenEmbedding(s.source_vocab, s.dim), sides[0], sides[1])
    memory = 2 * s.width
    attend, wide = _slot(s, memory)
    decoder = AlignedDecoder(
        TokenEmbedding(s.vocab, s.dim),
        GRUCell(s.dim + wide, s.width),
        attend,
        nn.Linear(memory, s.width),
        Head(s.width, s.vocab, bias=True),
    )
    return EncoderDecoder(encoder, decoder)


def _slot(s: Seq2SeqSpec, memory: int) -> tuple[nn.Module, int]:
    """The attention, and how many numbers of context each step of the cell reads."""
    match s.look:
        case Look.NONE:
            return Blind(), 0
        case Look.BAHDANAU:
            return Before(Additive(s.width, memory), s.width, memory), memory
        case Look.LUONG:
            return After(Dot(s.width, memory), s.width, memory), 0


def _size(vocab: int, dim: int, width: int, **rest: Any) -> Seq2SeqSpec:
    return Seq2SeqSpec(source_vocab=vocab, vocab=vocab, dim=dim, width=width, **rest)


SIZES = {"rnnsearch": _size(30000, 620, 1000), "luong": _size(50000, 1000, 1000, look=Look.LUONG)}
TINY = {look.name.lower(): _size(96, 24, 32, look=look) for look in Look}

FAMILY = Family(name="seq2seq", spec=Seq2SeqSpec, build=build, sizes=SIZES, tiny=TINY, source="https://arxiv.org/abs/1409.0473")
