"""Damaged text to mend: BART's infilling (Lewis et al. 2019, arXiv 1910.13461, section 2.2; row 70), T5's spans (Raffel et al. 2019, arXiv
1910.10683, section 3.1.4). Both give samples of `Seq2Seq`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from transept.core.errors import InputError

Text = Sequence[int]


def infilled(text: Text, mask_id: int, generator: torch.Generator, rate: float = 0.3, mean: float = 3.0) -> list[int]:
    """The text with spans, their lengths from Poisson(`mean`), each replaced by one mask, until `rate` of its tokens are gone.

    A span of length 0 is a mask put between two tokens. The target is the text itself.
    """
    size = len(text)
    budget, gone, inserted = round(rate * size), torch.zeros(size, dtype=torch.bool), []
    begins = torch.zeros(size, dtype=torch.bool)
    while budget > 0:
        length = min(int(torch.poisson(torch.tensor(mean), generator=generator)), budget)
        if length == 0:
            inserted.append(int(torch.randint(size + 1, (), generator=generator)))
            budget -= 1
            continue
        # Nothing gone in the span nor beside it, or two masks would stand together.
        free = (F.pad(gone, (1, 1)).unfold(0, length + 2, 1).sum(1) == 0).nonzero()
        if not len(free):
            break
        at = int(free[int(torch.randint(len(free), (), generator=generator))])
        gone[at : at + length], begins[at] = True, True
        budget -= length
    out: list[int] = []
    for i, token in enumerate(text):
        out += [mask_id] * inserted.count(i) + ([mask_id] if begins[i] else [] if gone[i] else [token])
    return out + [mask_id] * inserted.count(size)


def permuted(sentences: Sequence[Text], generator: torch.Generator) -> list[int]:
    """The sentences in a random order (BART's second corruption)."""
    return [token for i in torch.randperm(len(sentences), generator=generator).tolist() for token in sentences[i]]


def spans(
    text: Text, sentinels: Text, end: int, generator: torch.Generator, rate: float = 0.15, mean: float = 3.0
) -> tuple[list[int], list[int]]:
    """(source, target): `rate` of the tokens in spans of `mean` tokens on average, each replaced in the source by a sentinel; the
    target names each sentinel and what it stands for, and one more sentinel; both close with `end`.

    Raises InputError where there are fewer sentinels than spans and one.
    """
    size = len(text)
    noise = min(max(round(rate * size), 1), size - 1)
    count = min(max(round(noise / mean), 1), noise, size - noise)
    if count < 1 or count >= len(sentinels):
        raise InputError(f"{size} tokens make {count} spans, which need {count + 1} sentinels; there are {len(sentinels)}")
    kept, gone = _parts(size - noise, count, generator), _parts(noise, count, generator)
    source, target, at = [], [], 0
    for sentinel, stays, goes in zip(sentinels, kept, gone, strict=False):
        source += [*text[at : at + stays], sentinel]
        target += [sentinel, *text[at + stays : at + stays + goes]]
        at += stays + goes
    return [*source, end], [*target, sentinels[count], end]


def _parts(total: int, count: int, generator: torch.Generator) -> list[int]:
    """`total` as `count` numbers of at least 1, all ways alike."""
    cuts = sorted((torch.randperm(total - 1, generator=generator)[: count - 1] + 1).tolist())
    return [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]
