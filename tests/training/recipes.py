"""A recipe small enough for a test."""

from __future__ import annotations

from pathlib import Path

import torch

from transept.data.source import Windows
from transept.evaluation.subjects import small
from transept.training.objectives.causal import Causal
from transept.training.run import Judging, Loading, Optim, Run, Settings


def letters(*, data: str, dim: int = 16) -> Run:
    """The letters of a file, by their codes modulo 32."""
    ids = torch.tensor([ord(c) % 32 for c in Path(data).read_text()])
    settings = Settings(steps=4, loading=Loading(batch=4), optim=Optim(lr=1e-2), judging=Judging(every=3, source="held"))
    return Run(small(), Causal(), Windows(ids, 16), settings, eval={"held": Windows(ids, 16, 16)}, finish=lambda model, folder: "a sample")
