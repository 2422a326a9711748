"""The recurrent language model (Elman 1990; Mikolov et al. 2010), with skip connections through time where the Spec has a stride. Rows 2,
3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transept.blocks.embeddings import TokenEmbedding
from transept.blocks.heads import Head
from transept.blocks.recurrent import Cell, Recurrence, RecurrentLM, RNNCell, Skip
from transept.core.registry import Family
from transept.core.spec import Spec


@dataclass(frozen=True, kw_only=True)
class RecurrentSpec(Spec):
    """Widths of the token vectors (`dim`) and of the states (`width`); with a `stride` k, each state follows the one k steps before."""

    vocab: int
    dim: int
    width: int
    layers: int
    stride: int = 1
    dropout: float = 0.0


def recurrence(s: RecurrentSpec, cell: Callable[[int, int], Cell]) -> Recurrence:
    """The layers, each a cell of torch's kernel."""
    cells = [cell(s.width if i else s.dim, s.width) for i in range(s.layers)]
    return Recurrence(cells if s.stride == 1 else [Skip(c, s.stride) for c in cells], s.dropout)


def wired(cell: Callable[[int, int], Cell]) -> Callable[[RecurrentSpec], RecurrentLM]:
    """The diagram with that cell: tokens, layers, scores of the next token."""

    def build(s: RecurrentSpec) -> RecurrentLM:
        return RecurrentLM(TokenEmbedding(s.vocab, s.dim), recurrence(s, cell), Head(s.width, s.vocab, bias=True))

    return build


build = wired(RNNCell)
SIZES = {"rnn-small": RecurrentSpec(vocab=10000, dim=256, width=512, layers=2)}
TINY = {"two": RecurrentSpec(vocab=96, dim=24, width=32, layers=2), "skip": RecurrentSpec(vocab=96, dim=24, width=32, layers=1, stride=4)}
WHY = "a recurrent layer has no attention, and its state cannot go back: its own tests are tests/parity/test_recurrent.py"
FAR = "one layer that looks four steps back sees one token alone in a text of four"
EXEMPT = {
    "test_watching_changes_nothing": WHY,
    "test_truncated_cache_equals_never_appended": WHY,
    "test_hidden_states_are_features[skip]": FAR,
}

FAMILY = Family(
    name="rnn", spec=RecurrentSpec, build=build, sizes=SIZES, tiny=TINY, exempt=EXEMPT, source="https://doi.org/10.1207/s15516709cog1402_1"
)
