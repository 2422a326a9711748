"""In-context learning: a row shows examples of a task made up for it, and each answer is predicted from those before (row 77; Brown et al.
2020, arXiv 2005.14165, figure 1.1: arithmetic, correction, translation as the inner loop of pre-training)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import nn

from transept.core.batch import Batch
from transept.core.shapes import Int, Tensor
from transept.training.objective import Sum
from transept.training.objectives.losses import IGNORE, cross_entropy, given


class Skill(Enum):
    """What a row's hidden rule does with two symbols a, b of an alphabet of n; only its examples show the rule."""

    ARITHMETIC = "a b -> (a + b + c) mod n"
    TRANSLATION = "a b -> the words of a and b in a dictionary made for the row"
    CORRECTION = "a b -> the two in the order of a grammar made for the row"


@dataclass(frozen=True)
class Contexts:
    """Makes rows of `shots` examples, each `a b > y z ;`, of `symbols` symbols; the next ids are `>`, `;` and the skills' marks."""

    symbols: int = 10
    shots: int = 8

    @property
    def vocab(self) -> int:
        """Symbols, two separators, the marks of the skills."""
        return self.symbols + 2 + len(Skill)

    def sample(self, generator: torch.Generator) -> dict[str, Int[Tensor, "t"]]:
        """A row under a skill and a rule drawn for it; `labels` count the answers only."""
        skill = [*Skill][int(torch.randint(len(Skill), (), generator=generator))]
        n = self.symbols
        rule, shift = torch.randperm(n, generator=generator), int(torch.randint(n, (), generator=generator))
        asked = torch.randint(n, (self.shots, 2), generator=generator)
        match skill:
            case Skill.ARITHMETIC:
                total = (asked.sum(1) + shift) % n
                told = torch.stack((total, total), 1)
            case Skill.TRANSLATION:
                told = rule[asked]
            case Skill.CORRECTION:
                first = rule[asked[:, 0]] <= rule[asked[:, 1]]
                told = torch.where(first[:, None], asked, asked.flip(1))
        ones = torch.ones(self.shots, 1, dtype=torch.long)
        ids = torch.cat((asked, ones * n, told, ones * (n + 1)), 1)
        counted = torch.tensor([False, False, False, True, True, False]).expand_as(ids)
        mark = torch.tensor([n + 2 + [*Skill].index(skill)])
        labels = torch.cat((torch.tensor([IGNORE]), torch.where(counted, ids, IGNORE).flatten()))
        return {"ids": torch.cat((mark, ids.flatten())), "labels": labels}


@dataclass(frozen=True)
class InContext:
    """The next-token loss of answers, with the accuracy after each number of examples seen: `after_0`, `after_1`, ..."""

    contexts: Contexts

    def __call__(self, model: nn.Module, batch: Batch, /) -> Sum:
        ids, labels = given(batch, "ids"), given(batch, "labels")[:, 1:]
        logits = model(ids[:, :-1]).logits
        loss = cross_entropy(logits, labels)
        found = (logits.detach().argmax(-1) == labels).unflatten(1, (self.contexts.shots, -1)).sum((0, 2))
        asked = (labels != IGNORE).unflatten(1, (self.contexts.shots, -1)).sum((0, 2))
        return Sum(loss.loss, loss.count, {f"after_{i}": (found[i], asked[i]) for i in range(self.contexts.shots)})
