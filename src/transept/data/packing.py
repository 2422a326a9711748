"""Several documents in one row, one behind the other, so that no column is wasted (Krell et al. 2021, arXiv 2107.02027)."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

import torch

from transept.core.batch import Batch, Draw, Sample
from transept.core.errors import InputError
from transept.core.shapes import Tensor

IGNORE = -100


def bins(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Which documents share a row of `room` columns: best fit, longest first. A document longer than a row is refused."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    if order and lengths[order[0]] > room:
        raise InputError(f"document {order[0]} has {lengths[order[0]]} tokens, a row has room for {room}")
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []
    for i in order:
        at = bisect.bisect_left(free, (lengths[i], -1))
        left, row = free.pop(at) if at < len(free) else (room, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        bisect.insort(free, (left - lengths[i], row))
    return rows


class Packed:
    """Rows of `room` columns filled with whole documents; a sample is a row.

    The batch has `ids`, `labels` (a document's first token is not to be predicted from the one before it) and `document`, each [b room].
    """

    def __init__(self, documents: Sequence[Sequence[int]], room: int, pad: int = 0):
        if not documents:
            raise InputError("there is no document to pack")
        self.documents, self.room, self.pad = documents, room, pad
        self.rows = bins([len(d) for d in documents], room)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        return {"documents": [self.documents[i] for i in self.rows[index]]}

    def collate(self, samples: Sequence[Sample], draw: Draw) -> Batch:
        """The rows one above the other."""
        rows = [self._row(sample["documents"]) for sample in samples]
        return {name: torch.stack([row[name] for row in rows]) for name in ("ids", "labels", "document")}

    def _row(self, documents: Sequence[Any]) -> dict[str, Tensor]:
        row = {"ids": torch.full((self.room,), self.pad), "labels": torch.full((self.room,), IGNORE)}
        row["document"] = torch.full((self.room,), -1)
        at = 0
        for number, document in enumerate(documents):
            ids = torch.as_tensor(document)
            end = at + len(ids)
            row["ids"][at:end], row["document"][at:end], row["labels"][at + 1 : end] = ids, number, ids[1:]
            at = end
        return row
