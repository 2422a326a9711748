"""word2vec (Mikolov et al. 2013, arXiv 1301.3781 and 1310.4546): skip-gram and CBOW with negative sampling. Row 9."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
import torch.nn.functional as F
from torch import nn

from transept.blocks.embeddings import TokenEmbedding
from transept.core.registry import Family
from transept.core.shapes import Bool, Float, Int, Tensor
from transept.core.spec import Spec


class Way(Enum):
    """What is predicted from what."""

    SKIPGRAM = "each neighbour from the centre"
    CBOW = "the centre from the mean of its neighbours"


@dataclass(frozen=True, kw_only=True)
class Word2VecSpec(Spec):
    """Size of the vocabulary and the vectors, how far a window reaches, and the words drawn against each true one."""

    vocab: int
    dim: int
    window: int = 5
    negatives: int = 5
    way: Way = Way.SKIPGRAM


class WordVectors(nn.Module):
    """Two tables: `words`, the vectors that are kept, and `context`, the words as seen by the others (zero at the start, as published)."""

    def __init__(self, vocab: int, dim: int, way: Way):
        super().__init__()
        self.way = way
        self.words, self.context = TokenEmbedding(vocab, dim), TokenEmbedding(vocab, dim)
        nn.init.uniform_(self.words.weight, -0.5 / dim, 0.5 / dim)
        nn.init.zeros_(self.context.weight)

    def forward(
        self, centre: Int[Tensor, "b"], near: Int[Tensor, "b w"], mask: Bool[Tensor, "b w"], negatives: Int[Tensor, "b n"]
    ) -> Float[Tensor, ""]:
        """The negative-sampling loss summed over the batch (arXiv 1310.4546, eq. 4): true pairs apart from drawn ones.

        `mask` is True at real neighbours. In skip-gram the drawn words of a centre stand against each of its neighbours in turn: they
        count as often.
        """
        count = mask.sum(1)
        if self.way is Way.SKIPGRAM:
            state = F.embedding(centre, self.words.weight)
            true = torch.einsum("bd,bwd->bw", state, F.embedding(near, self.context.weight))
            against = torch.einsum("bd,bnd->bn", state, F.embedding(negatives, self.context.weight))
            return -(F.logsigmoid(true) * mask).sum() - (F.logsigmoid(-against).sum(1) * count).sum()
        total = (F.embedding(near, self.words.weight) * mask[..., None]).sum(1)
        state = total / count.clamp(min=1)[:, None]
        true = (state * F.embedding(centre, self.context.weight)).sum(1)
        against = torch.einsum("bd,bnd->bn", state, F.embedding(negatives, self.context.weight))
        return -((F.logsigmoid(true) + F.logsigmoid(-against).sum(1)) * (count > 0)).sum()


def build(s: Word2VecSpec) -> WordVectors:
    """Two tables of vectors."""
    return WordVectors(s.vocab, s.dim, s.way)


SIZES = {"word2vec-google-news": Word2VecSpec(vocab=3_000_000, dim=300)}
TINY = {way.name.lower(): Word2VecSpec(vocab=40, dim=12, way=way) for way in Way}

FAMILY = Family(name="word2vec", spec=Word2VecSpec, build=build, sizes=SIZES, tiny=TINY, source="https://arxiv.org/abs/1310.4546")
