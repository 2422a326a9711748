"""A recurrent language model on fifteen novels, and a GPT with as many parameters beside it; row 4.

    transept train recipes.lstm:novels --minutes 15
    transept train recipes.lstm:gpt --minutes 15            # the same text, tokens, windows and minutes; 2 cores
    python -m recipes.results --run lstm                    # both, and the table

Expected: perplexity and bits per byte on the last tenth of each book (not yet measured).
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn

import transept
from recipes.text import last_words
from recipes.text import novels as books
from transept.adapters.tune import dropped, normal
from transept.core.errors import InputError
from transept.core.registry import Family, family
from transept.core.spec import Spec
from transept.data.source import Windows
from transept.door import Model
from transept.evaluation.perplexity import foresee
from transept.models.text.gpt import GPTSpec
from transept.models.text.rnn import RecurrentSpec
from transept.training.objectives.causal import Causal
from transept.training.run import Judging, Loading, Optim, Run, Schedule, Settings, Shape


def novels(*, cell: str = "lstm", vocab: int = 4000, dim: int = 256, width: int = 448, layers: int = 2, dropout: float = 0.1,
           context: int = 128, batch: int = 32, lr: float = 3e-3, seed: int = 0) -> Run:  # fmt: skip
    """Next byte pair by an LSTM, a GRU or a plain recurrence. Figures: perplexity and bits per byte of the held-out ends."""
    if cell not in ("lstm", "gru", "rnn"):
        raise InputError(f"cell is lstm, gru or rnn, found {cell!r}")
    text = books(vocab)
    torch.manual_seed(seed)
    spec = RecurrentSpec(vocab=text[0].vocab_size, dim=dim, width=width, layers=layers, dropout=dropout)
    return run(family(cell).build(spec), family(cell), spec, text, context, batch, lr, seed)


def gpt(*, vocab: int = 4000, dim: int = 256, layers: int = 5, heads: int = 4, dropout: float = 0.0, context: int = 128, batch: int = 32,
        lr: float = 1.5e-3, seed: int = 0) -> Run:  # fmt: skip
    """The same by GPT-2's diagram with about as many parameters."""
    text = books(vocab)
    torch.manual_seed(seed)
    spec = GPTSpec(vocab=text[0].vocab_size, dim=dim, layers=layers, heads=heads, ffn=4 * dim, context=context)
    return run(dropped(normal(family("gpt").build(spec)), dropout), family("gpt"), spec, text, context, batch, lr, seed)


def run(model: nn.Module, page: Family, spec: Spec, text: tuple, context: int, batch: int, lr: float, seed: int) -> Run:
    """The same run for both."""
    tokenizer, train, held, size = text
    tail = torch.cat(held)

    def finish(trained: nn.Module, folder: Path) -> str:
        nats, count = foresee(trained, tail.tolist(), context=context)
        transept.save(Model(trained, page, None, spec, tokenizer), folder / "model")
        many = sum(p.numel() for p in trained.parameters())
        figures = {"perplexity": math.exp(nats / count), "bits per byte": nats / math.log(2) / size, "parameters": many}
        return last_words(folder, figures, f"try: transept generate {folder / 'model'} 'Alice looked'")

    settings = Settings(
        steps=3000, seed=seed, loading=Loading(batch=batch), optim=Optim(lr=lr, betas=(0.9, 0.98), decay=0.01, clip=0.5),
        schedule=Schedule(shape=Shape.COSINE, warmup=0.03, floor=0.02), judging=Judging(every=500, source="held-out"),
    )  # fmt: skip
    return Run(model, Causal(), Windows(torch.cat(train), context), settings, eval={"held-out": Windows(tail, context, context)},
               finish=finish)  # fmt: skip
