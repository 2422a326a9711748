"""Rows that show examples of a rule made up for them: a small decoder learns to learn from them; row 77.

    transept train recipes.in_context:skills --minutes 5       # 2 cores

Expected: accuracy rises with the number of examples seen (not yet measured).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from recipes.llama import decoder
from recipes.text import last_words
from transept.core.batch import Batch, Draw, Sample
from transept.training.judge import measure
from transept.training.objectives.in_context import Contexts, InContext
from transept.training.objectives.losses import stacked
from transept.training.run import Judging, Loading, Optim, Run, Schedule, Settings, Shape


class Endless:
    """Rows made as they are asked for; no two epochs hold the same ones. `world` keeps held-out rules apart."""

    def __init__(self, contexts: Contexts, size: int, world: str):
        self.contexts, self.size, self.world = contexts, size, world

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        return {"index": index}

    def collate(self, samples: Sequence[Sample], draw: Draw) -> Batch:
        """A new row for each place."""
        return stacked([self.contexts.sample(draw.at(j).generator(self.world)) for j in range(len(samples))])


def skills(*, symbols: int = 10, shots: int = 8, dim: int = 128, layers: int = 4, heads: int = 4, batch: int = 64, lr: float = 1e-3,
           steps: int = 3000, seed: int = 0) -> Run:  # fmt: skip
    """Sums with a hidden constant, dictionaries, orders. Figures: accuracy after 0, 1, ... examples, in per cent."""
    contexts = Contexts(symbols, shots)
    torch.manual_seed(seed)
    model = decoder(contexts.vocab, dim, layers, heads, 1 + 6 * shots)
    held = Endless(contexts, 1024, "held-out")

    def finish(trained: nn.Module, folder: Path) -> str:
        found = measure(InContext(contexts), trained, held)
        return last_words(folder, {name: 100 * value for name, value in found.items() if name.startswith("after_")})

    settings = Settings(
        steps=steps, seed=seed, loading=Loading(batch=batch), optim=Optim(lr=lr, betas=(0.9, 0.98), decay=0.01),
        schedule=Schedule(shape=Shape.COSINE, warmup=0.03, floor=0.02), judging=Judging(every=500, source="held-out"),
    )  # fmt: skip
    return Run(model, InContext(contexts), Endless(contexts, 1 << 20, "train"), settings, eval={"held-out": held}, finish=finish)
