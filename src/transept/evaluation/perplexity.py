"""How well a language model foresees a text: perplexity per token, and bits per byte, in which tokenizers compare (rows 4, 72)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from transept.core.errors import InputError, TokenizerError
from transept.data.text.tokenizer import Tokenizer
from transept.door import Model
from transept.training.objectives.losses import IGNORE, cross_entropy


@dataclass(frozen=True)
class Foreseen:
    """The summed -log P in nats, of so many tokens, which are so many bytes of UTF-8."""

    nats: float
    tokens: int
    bytes: int

    @property
    def perplexity(self) -> float:
        """exp of the mean per token."""
        return math.exp(min(self.nats / self.tokens, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """The mean per byte to the base 2."""
        return self.nats / math.log(2) / self.bytes


def windows(length: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, end, scored): windows of at most `context` tokens, of which the last `scored` were not in the one before.

    The first token of all is only read.
    """
    if not 1 <= stride < context:
        raise InputError(f"the stride should be from 1 to {context - 1}, one less than the context, found {stride}")
    end = 1
    while end < length:
        new = min(end + (context - 1 if end == 1 else stride), length)
        yield max(0, new - context), new, new - end
        end = new


@torch.inference_mode()
def foresee(
    model: nn.Module,
    ids: Sequence[int],
    *,
    context: int,
    stride: int | None = None,
    batch: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[float, int]:
    """(summed -log P, number) of all tokens but the first, each given at least `context - stride` before it (default: half a context)."""
    if len(ids) < 2:
        raise InputError(f"the text has {len(ids)} tokens; two or more were expected")
    device = next(model.parameters()).device
    every = list(windows(len(ids), context, stride or max(1, context // 2)))
    total, count = 0.0, 0
    for at in range(0, len(every), batch):
        some = every[at : at + batch]
        for same in {end - begin for begin, end, _ in some}:
            rows = [w for w in some if w[1] - w[0] == same]
            text = torch.tensor([ids[b:e] for b, e, _ in rows], device=device)
            labels = text.clone()
            for row, (_, _, scored) in zip(labels, rows, strict=True):
                row[: same - scored] = IGNORE
            found = cross_entropy(model(text[:, :-1]).logits, labels[:, 1:])
            total, count = total + float(found.loss), count + int(found.count)
        if progress is not None:
            progress(min(at + batch, len(every)), len(every))
    return total, count


def evaluate(m: Model, text: str, *, context: int | None = None, stride: int | None = None, **options: Any) -> Foreseen:
    """A text under a loaded language model, after its beginning-of-text token where it has one; else the first token is only read."""
    tokenizer = words_of(m)
    ids = tokenizer.encode(text, specials=False)
    begin = tokenizer.bos_id
    size = len(text.encode("utf-8"))
    if begin is None:
        size -= len(tokenizer.decode(ids[:1]).encode("utf-8"))
    whole = ids if begin is None else [begin, *ids]
    nats, count = foresee(m.model, whole, context=min(context or 1024, m.context or 1 << 30), stride=stride, **options)
    return Foreseen(nats, count, max(size, 1))


def words_of(m: Model) -> Tokenizer:
    """The model's tokenizer. Raises TokenizerError where it has none."""
    if m.tokenizer is None:
        raise TokenizerError(f"{m.source or 'this model'} has no tokenizer, which a text needs")
    return m.tokenizer
