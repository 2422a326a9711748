"""Classes from examples in the prompt, no weight changed (Brown et al. 2020, arXiv 2005.14165, section 2; rows 74-77)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from transept.core.batch import mixed
from transept.core.errors import InputError
from transept.door import Model
from transept.evaluation.perplexity import words_of
from transept.training.objectives.losses import IGNORE, negative_log, stacked

Example = tuple[str, str]


@dataclass(frozen=True)
class Wording:
    """How an example is written; `words` says each class."""

    words: Mapping[str, str]
    example: str = "Review: {text}\nSentiment: {word}\n\n"

    def prompt(self, shown: Sequence[Example], text: str) -> str:
        """The examples, then the text up to where its class stands."""
        told = "".join(self.example.format(text=t, word=self.words[label]) for t, label in shown)
        return told + self.example[: self.example.index("{word}")].format(text=text).rstrip(" ")


def shown(examples: Sequence[Example], shots: int, seed: int) -> list[Example]:
    """`shots` examples, of each class as many as can be, in a random order."""
    by_class: dict[str, list[Example]] = {}
    for example in examples:
        by_class.setdefault(example[1], []).append(example)
    generator = torch.Generator().manual_seed(mixed("shots", seed))
    chosen: list[Example] = []
    for i in range(shots):
        pool = by_class[sorted(by_class)[i % len(by_class)]]
        if not pool:
            raise InputError(f"{shots} examples were asked for; there are too few of each class")
        chosen.append(pool.pop(int(torch.randint(len(pool), (), generator=generator))))
    return [chosen[i] for i in torch.randperm(shots, generator=generator).tolist()]


@torch.inference_mode()
def likeliest(model: nn.Module, prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> int:
    """The answer of the highest log P per token after the prompt."""
    rows = stacked([{"ids": [*prompt, *a], "labels": [IGNORE] * len(prompt) + [*a]} for a in answers])
    rows = {name: value.to(next(model.parameters()).device) for name, value in rows.items()}
    losses = negative_log(model(rows["ids"], mask=rows.get("mask")).logits[:, :-1], rows["labels"][:, 1:])
    return int((losses.sum(1) / (rows["labels"][:, 1:] != IGNORE).sum(1)).argmin())


def evaluate(m: Model, examples: Sequence[Example], asked: Sequence[Example], wording: Wording, shots: int, seed: int = 0,
             progress: Callable[[int, int], None] | None = None) -> float:  # fmt: skip
    """The accuracy in per cent, every question after examples of its own."""
    tokenizer, labels = words_of(m), sorted(wording.words)
    unknown = {label for _, label in [*examples, *asked]} - set(labels)
    if unknown or not asked:
        raise InputError(f"the class {sorted(unknown)[0]!r} has no word" if unknown else "there is no text to classify")
    answers = [tokenizer.encode(f" {wording.words[label]}", specials=False) for label in labels]
    right = 0
    for i, (text, label) in enumerate(asked):
        prompt = tokenizer.encode(wording.prompt(shown(examples, shots, mixed(seed, i)), text))
        room = (m.context or 1 << 30) - max(map(len, answers))
        right += labels[likeliest(m.model, prompt[-room:], answers)] == label
        if progress is not None:
            progress(i + 1, len(asked))
    return 100 * right / len(asked)
