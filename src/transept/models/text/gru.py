"""The GRU language model (Cho et al. 2014, arXiv 1406.1078). Row 6."""

from __future__ import annotations

from transept.blocks.recurrent import GRUCell
from transept.core.registry import Family
from transept.models.text.rnn import EXEMPT, TINY, RecurrentSpec, wired

build = wired(GRUCell)
SIZES = {"gru-small": RecurrentSpec(vocab=10000, dim=256, width=512, layers=2)}

FAMILY = Family(name="gru", spec=RecurrentSpec, build=build, sizes=SIZES, tiny=TINY, exempt=EXEMPT, source="https://arxiv.org/abs/1406.1078")
