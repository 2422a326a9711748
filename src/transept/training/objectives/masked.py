"""Masked words (Devlin et al. 2018, section 3.1, task 1; rows 54, 65): the rate and the 80/10/10 are numbers of the batch maker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from transept.core.batch import Batch
from transept.core.errors import ConfigError
from transept.core.shapes import Bool, Float, Int, Tensor
from transept.training.objective import Sum
from transept.training.objectives.losses import IGNORE, call, cross_entropy, given, right


@dataclass(frozen=True)
class Masking:
    """Of the tokens that may be chosen a share `rate` is; of these `hidden` become the mask, `random` any word, the others stay."""

    mask_id: int
    vocab: int
    rate: float = 0.15
    hidden: float = 0.8
    random: float = 0.1

    def __post_init__(self) -> None:
        if not (0 <= self.rate <= 1 and self.hidden >= 0 and self.random >= 0 and self.hidden + self.random <= 1):
            raise ConfigError(f"rate {self.rate}, hidden {self.hidden} and random {self.random} should be shares, the last two 1 in all")

    def __call__(
        self, ids: Int[Tensor, "*n"], choosable: Bool[Tensor, "*n"], generator: torch.Generator
    ) -> tuple[Int[Tensor, "*n"], Int[Tensor, "*n"]]:
        """The ids as the model reads them, and the labels: the true ids at chosen tokens, IGNORE elsewhere."""
        chosen = (torch.rand(ids.shape, generator=generator) < self.rate) & choosable
        fate = torch.rand(ids.shape, generator=generator)
        word = torch.randint(self.vocab, ids.shape, generator=generator)
        read = torch.where(chosen & (fate < self.hidden), self.mask_id, ids)
        read = torch.where(chosen & (fate >= self.hidden) & (fate < self.hidden + self.random), word, read)
        return read, torch.where(chosen, ids, IGNORE)


@dataclass(frozen=True)
class Masked:
    """The chosen tokens of `labels` [b t]. With `sparse` the vocabulary is scored at these alone, which is most of a small model's time."""

    sparse: bool = False

    def __call__(self, model: nn.Module, batch: Batch, /) -> Sum:
        labels = given(batch, "labels")
        if self.sparse:
            chosen = labels != IGNORE
            logits, labels = words_at(model, states_of(model, batch), chosen), labels[chosen]
        else:
            logits = call(model, batch).logits
        loss = cross_entropy(logits, labels)
        return Sum(loss.loss, loss.count, {"accuracy": right(logits, labels)})


def states_of(model: Any, batch: Batch) -> Float[Tensor, "b t d"]:
    """An encoder's last states, before its head."""
    return model.states(batch["ids"], **{name: batch[name] for name in ("mask", "segments") if name in batch})


def words_at(model: Any, states: Float[Tensor, "b t d"], chosen: Bool[Tensor, "b t"]) -> Float[Tensor, "n v"]:
    """Scores of the vocabulary at the chosen tokens only, by the encoder's masked-word head."""
    return getattr(model.head, "mlm", model.head).scores(states[chosen][None])[0]
