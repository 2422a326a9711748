"""ELMo's way (Peters et al. 2018, arXiv 1802.05365): two LSTMs read from both sides, and all their states are features. Row 5.

The published model reads characters; this one reads tokens, as the lecture draws it.
"""

from __future__ import annotations

from transept.blocks.embeddings import TokenEmbedding
from transept.blocks.heads import Head
from transept.blocks.recurrent import BiLM, LSTMCell
from transept.core.registry import Family
from transept.models.text.rnn import RecurrentSpec, recurrence


def build(s: RecurrentSpec) -> BiLM:
    """One embedding, one head, two recurrences."""
    return BiLM(TokenEmbedding(s.vocab, s.dim), recurrence(s, LSTMCell), recurrence(s, LSTMCell), Head(s.width, s.vocab, bias=True))


SIZES = {"elmo-small": RecurrentSpec(vocab=50000, dim=512, width=512, layers=2)}
TINY = {"two": RecurrentSpec(vocab=96, dim=32, width=32, layers=2)}

FAMILY = Family(name="elmo", spec=RecurrentSpec, build=build, sizes=SIZES, tiny=TINY, source="https://arxiv.org/abs/1802.05365")
