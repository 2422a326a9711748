"""Sentence vectors against sentence-transformers itself, on real sentences."""

from __future__ import annotations

import warnings

import pytest
import torch

import transept
from tests.counts import count
from tests.inference.test_tasks import minilm, sentences


def neighbours(v: torch.Tensor) -> torch.Tensor:
    """Similarities of each row with every other, itself last."""
    return (v.double() @ v.double().T).fill_diagonal_(-2)


@pytest.mark.slow
def test_sentence_vectors_are_those_of_sentence_transformers() -> None:
    """Cosine of every sentence, and its ten nearest: two may change places only where their similarities are equal to 1e-6."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own imports
        theirs = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers: pip install transept[test]")
        other = theirs.SentenceTransformer(str(minilm()), device="cpu")
        texts = sentences(max(100, count(1000)))
        expected = other.encode(texts, convert_to_tensor=True)
    found = transept.load(minilm()).embed(texts)
    assert found.shape == expected.shape and len(texts) >= min(1000, max(100, count(1000)))
    assert torch.cosine_similarity(found.double(), expected.double()).min().item() >= 0.99999
    ours, near = neighbours(found), neighbours(expected)
    chosen = ours.topk(10).indices
    # Those that we name are, by their numbers, as near as those that they name.
    assert (near.gather(1, chosen).sort(1, descending=True).values - near.topk(10).values).abs().max().item() <= 1e-6
    print(
        f"{len(texts)} sentences: cosine from {torch.cosine_similarity(found, expected).min():.8f}, "
        f"largest difference {(found - expected).abs().max():.2e}, "
        f"{(chosen == near.topk(10).indices).float().mean():.4%} of neighbours in the same place"
    )
