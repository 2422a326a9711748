"""The LSTM language model (Hochreiter and Schmidhuber 1997; as a language model Zaremba et al. 2014, arXiv 1409.2329). Row 4."""

from __future__ import annotations

from transept.blocks.recurrent import LSTMCell
from transept.core.registry import Family
from transept.models.text.rnn import EXEMPT, TINY, RecurrentSpec, wired

build = wired(LSTMCell)
SIZES = {"lstm-medium": RecurrentSpec(vocab=10000, dim=650, width=650, layers=2, dropout=0.5)}

FAMILY = Family(name="lstm", spec=RecurrentSpec, build=build, sizes=SIZES, tiny=TINY, exempt=EXEMPT, source="https://arxiv.org/abs/1409.2329")
