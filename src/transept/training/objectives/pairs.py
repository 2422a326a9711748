"""Two texts in one row: the next sentence (Devlin et al. 2018, section 3.1, task 2; row 55), sentences in order (Lan et al. 2019, section
3.1; row 66), the special tokens that join a pair for an encoder, and for a decoder (Radford et al. 2018, section 3.3; row 71)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from transept.core.batch import Batch, Sample
from transept.core.errors import InputError
from transept.training.objective import Sum
from transept.training.objectives.losses import call, cross_entropy, given, right

Text = Sequence[int]


@dataclass(frozen=True)
class NextSentence:
    """Class 0 of `next` [b]: the second text follows the first; class 1: it does not. The model's result has `nsp` [b 2]."""

    def __call__(self, model: nn.Module, batch: Batch, /) -> Sum:
        scores, follows = call(model, batch).nsp, given(batch, "next")
        loss = cross_entropy(scores, follows)
        return Sum(loss.loss, loss.count, {"accuracy": right(scores, follows)})


@dataclass(frozen=True)
class SentenceOrder(NextSentence):
    """Class 0 of `next` [b]: the texts stand in their order; class 1: they were swapped. The loss is that of the next sentence."""


def following(documents: Sequence[Sequence[Text]], document: int, sentence: int, generator: torch.Generator) -> tuple[Text, Text, int]:
    """A sentence and, half of the time, the one after it (0), else one of another document (1).

    Raises InputError where the sentence is its document's last, or there is no other document.
    """
    here = documents[document]
    if sentence + 1 >= len(here) or len(documents) < 2:
        raise InputError(f"sentence {sentence} of {len(here)}, in one of {len(documents)} documents, has no next one or no other document")
    if torch.rand((), generator=generator) < 0.5:
        return here[sentence], here[sentence + 1], 0
    # One fewer than there are documents, so that this one is stepped over.
    other = int(torch.randint(len(documents) - 1, (), generator=generator))
    elsewhere = documents[other + (other >= document)]
    return here[sentence], elsewhere[int(torch.randint(len(elsewhere), (), generator=generator))], 1


def ordered(first: Text, second: Text, generator: torch.Generator) -> tuple[Text, Text, int]:
    """Two texts that follow one another, as they stand (0) or, half of the time, swapped (1)."""
    return (second, first, 1) if torch.rand((), generator=generator) < 0.5 else (first, second, 0)


def joined(first: Text, second: Text, begin: int, end: int, longest: int) -> dict[str, list[int]]:
    """`[CLS] a [SEP] b [SEP]` as `ids` and `segments`; of the longer text the end is left out until both fit (row 53)."""
    a, b = list(first), list(second)
    while len(a) + len(b) + 3 > longest:
        (a if len(a) > len(b) else b).pop()
    return {"ids": [begin, *a, end, *b, end], "segments": [0] * (len(a) + 2) + [1] * (len(b) + 1)}


def entailed(premise: Text, hypothesis: Text, start: int, delimiter: int, extract: int) -> Sample:
    """GPT-1's row of a pair: start, premise, delimiter, hypothesis, extract; the last token's state is classified."""
    return {"ids": [start, *premise, delimiter, *hypothesis, extract]}


def similar(first: Text, second: Text, start: int, delimiter: int, extract: int) -> tuple[Sample, Sample]:
    """GPT-1's rows of a similarity, which has no order: both ways round, the states of the two to be added."""
    return entailed(first, second, start, delimiter, extract), entailed(second, first, start, delimiter, extract)
