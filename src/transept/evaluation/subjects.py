"""What the promises of training are tried on: a decoder of 3,000 numbers, random texts, noise, and what of a checkpoint must be equal."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from transept.checkpoints.safetensors import tensor_bytes
from transept.core.batch import Batch, Draw, Sample
from transept.data.source import Windows
from transept.models.text import gpt
from transept.training import state

VOCAB = 32


def small(seed: int = 0, dropout: float = 0.0) -> nn.Module:
    """A decoder of 3,000 numbers."""
    torch.manual_seed(seed)
    model = gpt.build(gpt.TINY["gpt2"].replace(vocab=VOCAB, dim=16, heads=2, ffn=24, layers=2, context=32))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    return model


def documents(many: int, seed: int, longest: int = 16) -> list[torch.Tensor]:
    """Random texts of 2 to `longest` tokens."""
    gen = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB, (int(torch.randint(2, longest + 1, (1,), generator=gen)),), generator=gen) for _ in range(many)]


class Noisy(Windows):
    """Windows whose tokens are changed at random, as masking does."""

    def collate(self, samples: Sequence[Sample], draw: Draw) -> Batch:
        """Each row's noise comes from its own draw."""
        rows = []
        for j, sample in enumerate(samples):
            gen = draw.at(j).generator("noise")
            noise = torch.randint(VOCAB, sample["ids"].shape, generator=gen)
            rows.append(torch.where(torch.rand(sample["ids"].shape, generator=gen) < 0.15, noise, sample["ids"]))
        return {"ids": torch.stack(rows)}


def bits(found: state.State) -> dict[str, Any]:
    """What must be equal: every tensor as bytes, every fact but the clock."""
    facts = {name: value for name, value in found.facts.items() if name not in ("elapsed", "record")}
    if "beartype" in sys.modules:
        # The type checker of the tests draws from Python's own generator.
        facts["random"] = {name: value for name, value in facts["random"].items() if name != "python"}
    tensors = {f"{g}.{name}": bytes(tensor_bytes(t)) for g, ts in found.tensors.items() for name, t in ts.items()}
    return {"facts": json.dumps(facts, sort_keys=True), **tensors}
