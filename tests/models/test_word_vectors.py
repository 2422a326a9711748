"""word2vec and GloVe against their papers' formulas, one pair at a time; what they learn of words that are used alike (rows 9, 10)."""

from __future__ import annotations

import math

import pytest
import torch

from transept.core.registry import family
from transept.models.text.word2vec import Way, Word2VecSpec


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("way", list(Way))
def test_negative_sampling_is_the_papers_sum(way: Way) -> None:
    """arXiv 1310.4546, equation 4, for every neighbour (skip-gram) or for the mean of all (CBOW)."""
    torch.manual_seed(0)
    model = family("word2vec").build(Word2VecSpec(vocab=20, dim=6, way=way))
    torch.nn.init.normal_(model.words.weight)
    torch.nn.init.normal_(model.context.weight)
    centre, near, drawn = torch.randint(20, (5,)), torch.randint(20, (5, 4)), torch.randint(20, (5, 3))
    mask = torch.rand(5, 4) > 0.3
    mask[4] = False
    for p in model.parameters():
        p.requires_grad_(False)
    loss = 0.0
    for c, around, real, against in zip(centre.tolist(), near.tolist(), mask.tolist(), drawn.tolist(), strict=True):
        kept = [w for w, there in zip(around, real, strict=True) if there]
        if way is Way.SKIPGRAM:
            pairs = [(model.words.weight[c], w) for w in kept]
        else:
            pairs = [(torch.stack([model.words.weight[w] for w in kept]).mean(0), c)] if kept else []
        for v, w in pairs:
            loss -= math.log(sigmoid(float(v @ model.context.weight[w])))
            loss -= sum(math.log(sigmoid(-float(v @ model.context.weight[n]))) for n in against)
    assert model(centre, near, mask, drawn).item() == pytest.approx(loss, rel=1e-5)


def test_glove_is_weighted_least_squares() -> None:
    """Equation 8 of the paper with the weight of equation 9."""
    torch.manual_seed(1)
    page = family("glove")
    model = page.build(page.tiny["one"])
    for p in model.parameters():
        torch.nn.init.normal_(p.requires_grad_(False))
    i, j, x = torch.randint(40, (30,)), torch.randint(40, (30,)), torch.rand(30) * 200 + 0.1
    loss = 0.0
    for a, b, n in zip(i.tolist(), j.tolist(), x.tolist(), strict=True):
        fit = float(model.words.weight[a] @ model.context.weight[b] + model.bias[a] + model.context_bias[b])
        loss += (1.0 if n >= 100 else (n / 100) ** 0.75) * (fit - math.log(n)) ** 2
    assert model(i, j, x).item() == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("way", list(Way))
def test_words_used_alike_get_like_vectors(way: Way) -> None:
    """Words 2 and 3 stand in the same places, as do 4 and 5: each pair is nearer than any mixed one."""
    torch.manual_seed(2)
    model = family("word2vec").build(Word2VecSpec(vocab=10, dim=8, window=1, way=way))
    gen = torch.Generator().manual_seed(0)
    optim = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(150):
        kind = torch.randint(2, (64,), generator=gen)
        centre = 2 + 2 * kind + torch.randint(2, (64,), generator=gen)
        near = torch.stack((6 + 2 * kind, 7 + 2 * kind), 1)
        loss = model(centre, near, torch.ones(64, 2, dtype=torch.bool), torch.randint(10, (64, 3), generator=gen))
        if way is Way.CBOW:
            loss = loss + model(
                near[:, 0],
                torch.stack((centre, near[:, 1]), 1),
                torch.ones(64, 2, dtype=torch.bool),
                torch.randint(10, (64, 3), generator=gen),
            )
        optim.zero_grad()
        (loss / 64).backward()
        optim.step()
    v = torch.nn.functional.normalize(model.words.weight.detach(), dim=1)
    alike, mixed = min(float(v[2] @ v[3]), float(v[4] @ v[5])), max(float(v[a] @ v[b]) for a in (2, 3) for b in (4, 5))
    assert alike > mixed + 0.2, (alike, mixed)
