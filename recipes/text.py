"""What the recipes on text share: reading data files, models to tune, and the last words of a run."""

from __future__ import annotations

import csv
import gzip
import json
import lzma
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import transept
from transept.adapters.lora import Lora
from transept.adapters.tune import dropped, tune, under
from transept.core.batch import Batch, Draw, Sample
from transept.core.errors import InputError
from transept.core.registry import Published
from transept.core.spec import Spec
from transept.data.source import Samples, find
from transept.data.text.bpe import train_bpe
from transept.data.text.tokenizer import Tokenizer
from transept.door import Model
from transept.inference.pooling import Pooling
from transept.training.adapter import save_adapter
from transept.training.objectives.losses import stacked
from transept.training.run import Judging, Loading, Optim, Order, Schedule, Settings, Shape

WHERE = "see docs/results.md for where each data set can be had"
PAD, CLS, SEP, MASK = "[PAD]", "[CLS]", "[SEP]", "[MASK]"


def read(name: str, data: str = "") -> str:
    """A text file of the data folder, or the one named, plain, .xz or .gz."""
    path = Path(data) if data else find(name, WHERE)
    opener: Any = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)
    with opener(path, "rt", encoding="utf-8") as file:
        return file.read()


def table(name: str, data: str = "") -> list[dict[str, str]]:
    """The rows of a file of tab-separated columns under a header."""
    rows = [*csv.DictReader(read(name, data).splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)]
    if not rows:
        raise InputError(f"{data or name} has no rows under its header")
    return rows


def collate(samples: Sequence[Sample], draw: Draw) -> Batch:
    """Rows padded to the longest of the batch."""
    return stacked(samples)


def samples(rows: Sequence[Mapping[str, Any]], by: str = "ids") -> Samples:
    """Tokenised rows as a source that can be bucketed by the length of one of its lists."""
    return Samples(rows, collate, [len(row[by]) for row in rows])


def settings(size: int, lr: float, epochs: int, batch: int, seed: int, metric: str = "loss", higher: bool = False,
             source: str = "dev", average: float = 0.0) -> Settings:  # fmt: skip
    """AdamW down a line after a tenth of warm-up, rows of like length together, a look after each epoch; `average` is the last share
    of the run whose weights are averaged."""
    steps = -(-size // batch)
    return Settings(
        steps=epochs * steps, seed=seed, average=average, loading=Loading(batch=batch, order=Order.BUCKETED),
        optim=Optim(lr=lr, betas=(0.9, 0.999), decay=0.01), schedule=Schedule(shape=Shape.LINEAR, warmup=0.1, floor=0.0),
        judging=Judging(every=steps, source=source, metric=metric, higher=higher),
    )  # fmt: skip


def novels(vocab: int, held: float = 0.1) -> tuple[Tokenizer, list[torch.Tensor], list[torch.Tensor], int]:
    """Fifteen books: a byte-pair vocabulary of their first parts, these and the held-out last tenths as ids, and the latter's bytes."""
    books = [book.split("\n", 1)[1].strip() for book in read("gutenberg15/books.txt.xz").split("<|book|>")[1:]]
    cuts = [int(len(book) * (1 - held)) for book in books]
    first, last = [b[:c] for b, c in zip(books, cuts, strict=True)], [b[c:] for b, c in zip(books, cuts, strict=True)]
    tokenizer = train_bpe(first, vocab, (PAD, CLS, SEP, MASK))
    ids = [[torch.tensor(tokenizer.encode(text, specials=False)) for text in part] for part in (first, last)]
    return tokenizer, ids[0], ids[1], sum(len(text.encode()) for text in last)


class Tuning:
    """A published encoder under a new head of its family, partly frozen: what is trained, saved and asked at the end."""

    def __init__(self, source: str, architecture: str, labels: tuple[str, ...], how: str, dropout: float = 0.1, rank: int = 8,
                 seed: int = 0):  # fmt: skip
        torch.manual_seed(seed)
        base = transept.load(source)
        if base.tokenizer is None:
            raise InputError(f"{source} has no tokenizer")
        self.source, self.how = source, how
        self.family, self.tokenizer = base.family, base.tokenizer
        self.form: Published = base.family.form(architecture)
        self.spec: Spec = base.spec.replace(labels=labels)
        self.model: nn.Module
        self.model, fresh = under(base.model, base.family, architecture, self.spec)
        for name in fresh:
            p = self.model.get_parameter(name)
            nn.init.normal_(p, std=0.02) if p.dim() > 1 else nn.init.zeros_(p)
        dropped(self.model, dropout)
        self.tuned = tune(self.model, how, lora=Lora(rank=rank, alpha=2.0 * rank, targets=("*.attn.*", "*.mlp.*")))
        print(f"--tune {how}: {self.tuned}")

    @property
    def loaded(self) -> Model:
        """The model behind the library's door, with its tasks."""
        return Model(self.model, self.family, self.form, self.spec, self.tokenizer, self.source, pooling=Pooling())

    def save(self, folder: Path) -> str:
        """Writes an adapter folder or a whole model; returns where."""
        if self.how == "lora":
            return str(save_adapter(self.model, self.form, self.spec, folder / "adapter", self.source))
        transept.save(Model(self.model, self.family, self.form, self.spec, self.tokenizer, self.source), folder / "model")
        return str(folder / "model")


def last_words(folder: Path, figures: Mapping[str, float | int | str], more: str = "") -> str:
    """Writes test.json, from which `python -m recipes.results` makes a row, and says the figures."""
    (folder / "test.json").write_text(json.dumps(dict(figures), indent=1), encoding="utf-8")
    said = ", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in figures.items())
    return f"test: {said}{more and f'{chr(10)}{more}'}"

