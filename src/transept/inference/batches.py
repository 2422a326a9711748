"""Rows of unlike length, brought together so that little is padded."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from transept.core.shapes import Bool, Int, Tensor


def by_length(rows: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """The numbers of the rows in batches of at most `size`, longest first, so that rows of like length stand together."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    return [order[at : at + size] for at in range(0, len(order), size)]


def padded(rows: Sequence[Sequence[int]], device: torch.device | None = None) -> tuple[Int[Tensor, "b t"], Bool[Tensor, "b t"] | None]:
    """The rows as one tensor, padded on the right with 0, and its mask; None where nothing was padded."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
    if all(len(row) == longest for row in rows):
        return ids, None
    return ids, torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in rows], device=device)
