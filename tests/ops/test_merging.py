"""Token merging against a naive loop from the paper's steps (row 51)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from transept.core.errors import InputError
from transept.ops.merging import match, merge, proportional


def naive(keys: Tensor, x: Tensor, size: Tensor, r: int, protect: bool) -> tuple[list[Tensor], list[float]]:
    """One row, one pair at a time: A and B alternate, each of A draws an edge to its most similar of B, the r best edges are merged."""
    a, b = list(range(0, len(x), 2)), list(range(1, len(x), 2))
    edges = []
    for i in a:
        if protect and i == 0:
            continue
        similarity = [float(torch.cosine_similarity(keys[i], keys[j], dim=0)) for j in b]
        best = max(range(len(b)), key=lambda n: similarity[n])
        edges.append((similarity[best], i, b[best]))
    edges.sort(key=lambda edge: -edge[0])
    groups = {j: [j] for j in b}
    for _, i, j in edges[:r]:
        groups[j].append(i)
    merged = {i for _, i, _ in edges[:r]}
    members = [[i] for i in a if i not in merged] + [groups[j] for j in b]
    sizes = [float(sum(size[m] for m in group)) for group in members]
    return [sum(x[m] * size[m] for m in group) / total for group, total in zip(members, sizes, strict=True)], sizes  # type: ignore[misc]


@pytest.mark.parametrize("length", [2, 7, 16, 33])
@pytest.mark.parametrize("protect", [False, True])
def test_merging_is_the_papers(length: int, protect: bool) -> None:
    gen = torch.Generator().manual_seed(length)
    keys, x = torch.randn(3, length, 8, generator=gen), torch.randn(3, length, 5, generator=gen)
    size = torch.randint(1, 4, (3, length, 1), generator=gen).float()
    for r in sorted({0, min(1, (length - protect) // 2), length // 4, (length - protect) // 2 if length > 2 else 0}):
        y, sizes = merge(x, size, match(keys, r, protect))
        assert y.shape == (3, length - r, 5)
        for row in range(3):
            expected, totals = naive(keys[row], x[row], size[row, :, 0], r, protect)
            assert torch.allclose(y[row], torch.stack(expected), atol=1e-6)
            assert sizes[row, :, 0].tolist() == totals
        assert torch.allclose((y * sizes).sum(1), (x * size).sum(1), atol=1e-4), "nothing is lost"


def test_equal_tokens_merged_attend_as_before() -> None:
    """A key that stands for n equal ones and counts n times changes nothing (eq. 1)."""
    gen = torch.Generator().manual_seed(0)
    q, token = torch.randn(1, 4, 8, generator=gen), torch.randn(1, 3, 8, generator=gen)
    keys = token.repeat_interleave(2, 1)
    y, size = merge(keys, torch.ones(1, 6, 1), match(keys, 3))
    before = (q @ keys.transpose(1, 2)).softmax(-1) @ keys
    after = (q @ y.transpose(1, 2) + proportional(size)[:, 0]).softmax(-1) @ y
    assert torch.allclose(before, after, atol=1e-6)


def test_more_than_half_is_refused() -> None:
    with pytest.raises(InputError, match="at most 4"):
        match(torch.randn(1, 8, 4), 5)
    with pytest.raises(InputError, match="at most 3"):
        match(torch.randn(1, 8, 4), 4, protect_first=True)
