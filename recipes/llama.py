"""LLaMA's diagram on Shakespeare by characters, and on fifteen novels by byte pairs; rows 22, 25, 27, 29, 36, 81.

    transept train recipes.llama:shakespeare --minutes 3
    transept train recipes.llama:novels --minutes 15          # 5.6 MB of text; 2 cores

Expected: nats per character, and bits per byte on the last tenth of each book (not yet measured).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from recipes.gpt import Characters, write_on
from recipes.text import last_words, read  # noqa: I001
from recipes.text import novels as books
from transept.adapters.tune import normal
from transept.core.registry import family
from transept.data.source import Windows
from transept.evaluation.perplexity import foresee
from transept.models.text.llama import LlamaSpec
from transept.ops.rotary import RopeSpec
from transept.training.objectives.causal import Causal
from transept.training.run import Judging, Loading, Optim, Run, Schedule, Settings, Shape


def decoder(vocab: int, dim: int, layers: int, heads: int, context: int) -> Any:
    """The family's page at a size of one's own: feed-forward of 8/3 the width, as the paper has it."""
    ffn = 32 * math.ceil(8 * dim / 3 / 32)
    spec = LlamaSpec(vocab=vocab, dim=dim, layers=layers, heads=heads, kv_heads=heads, head_dim=dim // heads, ffn=ffn, context=context,
                     rope=RopeSpec(theta=10000.0, dims=dim // heads), eps=1e-5, tied=True)  # fmt: skip
    return normal(family("llama").build(spec), dim**-0.5)


def settings(batch: int, muon: float, seed: int) -> Settings:
    """Muon for matrices, AdamW for the rest, down a line."""
    return Settings(
        steps=2000, seed=seed, loading=Loading(batch=batch), optim=Optim(lr=3e-3, betas=(0.9, 0.95), decay=0.0, muon=muon),
        schedule=Schedule(shape=Shape.LINEAR, warmup=0.02, floor=0.0), judging=Judging(every=500, source="held-out"),
    )  # fmt: skip


def shakespeare(*, dim: int = 128, layers: int = 4, heads: int = 4, context: int = 256, batch: int = 16, seed: int = 0) -> Run:
    """Next character; the last tenth is held out. Figure: nats per character."""
    text = read("tinyshakespeare/input.txt.xz")
    characters = Characters(text)
    cut = int(0.9 * len(text))
    torch.manual_seed(seed)
    model = decoder(len(characters.table), dim, layers, heads, context)
    held = Windows(characters.encode(text[cut:]), context, context)

    def finish(model: nn.Module, folder: Path) -> str:
        return characters.decode(write_on(model, characters.encode("ROMEO:\n"), 400, context))

    return Run(model, Causal(), Windows(characters.encode(text[:cut]), context), settings(batch, 0.02, seed), eval={"held-out": held},
               finish=finish)  # fmt: skip


def novels(*, vocab: int = 4000, dim: int = 256, layers: int = 4, heads: int = 4, context: int = 256, batch: int = 8, seed: int = 0) -> Run:
    """Next byte pair. Figures: perplexity and bits per byte of the held-out ends of the books."""
    tokenizer, train, held, size = books(vocab)
    torch.manual_seed(seed)
    model = decoder(tokenizer.vocab_size, dim, layers, heads, context)
    tail = torch.cat(held)

    def finish(model: nn.Module, folder: Path) -> str:
        nats, count = foresee(model, tail.tolist(), context=context + 1)
        tokenizer.save(folder)
        begin = torch.tensor(tokenizer.encode("Alice looked", specials=False))
        sample = tokenizer.decode(write_on(model, begin, 100, context))
        return last_words(folder, {"perplexity": math.exp(nats / count), "bits per byte": nats / math.log(2) / size}, sample)

    return Run(model, Causal(), Windows(torch.cat(train), context), settings(batch, 0.02, seed), finish=finish,
               eval={"held-out": Windows(tail, context, context)})  # fmt: skip
