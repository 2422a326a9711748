"""BERT-tiny from nothing: masked words and the next sentence on fifteen novels; ELECTRA's game beside it; rows 53-57, 67.

    transept train recipes.bert:tiny --minutes 20                          # both losses summed; 2 cores
    transept train recipes.bert:tiny --minutes 20 --set alternating=true   # one update words, the next one pairs
    transept train recipes.bert:tiny --set rate=0.4                        # another share of masks
    transept train recipes.bert:electra --minutes 20                       # a generator's words to be found

The corpus is 0.92 million words (BERT's: 3,300 million). A pair is two stretches of a book, the second following the first or taken from
another book; the last tenth of each book is held out. Measured, seed 0, 2 cores with AVX2, both losses summed, after 20 minutes (7,420
updates): of 2,698 held-out pairs 83.0 % are told (one standard error is 0.7), of masked words 14.8 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from recipes.text import CLS, MASK, SEP, last_words
from recipes.text import novels as books
from transept.adapters.tune import dropped, normal
from transept.core.batch import Batch, Draw, Sample
from transept.core.errors import InputError
from transept.core.registry import family
from transept.data.text.tokenizer import Tokenizer
from transept.models.text.bert import BertSpec
from transept.training.judge import measure
from transept.training.objectives.losses import stacked
from transept.training.objectives.masked import Masking
from transept.training.objectives.pairs import following, joined
from transept.training.objectives.pretraining import Summed, Turns
from transept.training.objectives.replaced import Replaced
from transept.training.run import Judging, Loading, Optim, Run, Schedule, Settings, Shape


class Pairs:
    """Stretches of books as pairs: which pairs, and which words are masked, is drawn anew in each epoch."""

    def __init__(self, documents: Sequence[torch.Tensor], stretch: int, masking: Masking, ends: tuple[int, int]):
        self.documents = [[part.tolist() for part in text.split(stretch)] for text in documents]
        self.places = [(d, s) for d, parts in enumerate(self.documents) for s in range(len(parts) - 1)]
        self.masking, self.ends, self.longest = masking, ends, 2 * stretch + 3

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Sample:
        return {"place": self.places[index]}

    def collate(self, samples: Sequence[Sample], draw: Draw) -> Batch:
        """Each pair with its masks, by the draw of its own place."""
        return stacked([self.row(*sample["place"], draw.at(j).generator("pairs")) for j, sample in enumerate(samples)])

    def row(self, document: int, sentence: int, generator: torch.Generator) -> dict[str, object]:
        """`[CLS] a [SEP] b [SEP]`, some of its words masked; `noise` serves a generator."""
        a, b, label = following(self.documents, document, sentence, generator)
        whole = joined(a, b, *self.ends, self.longest)
        ids = torch.tensor(whole["ids"])
        read, labels = self.masking(ids, ~torch.isin(ids, torch.tensor(self.ends)), generator)
        noise = torch.rand(len(ids), generator=generator)
        return {"ids": read, "labels": labels, "segments": whole["segments"], "noise": noise, "next": label}


def text(vocab: int, stretch: int, rate: float) -> tuple[Tokenizer, Pairs, Pairs]:
    """The vocabulary, and pairs of both parts of the books."""
    tokenizer, train, held, _ = books(vocab)
    masking = Masking(tokenizer.id(MASK), tokenizer.vocab_size, rate)
    ends = tokenizer.id(CLS), tokenizer.id(SEP)
    words = sum(len(tokenizer.decode(part.tolist()).split()) for part in train)
    print(f"{words:,} words, {sum(map(len, train)):,} tokens of {tokenizer.vocab_size:,} kinds")
    return tokenizer, Pairs(train, stretch, masking, ends), Pairs(held, stretch, masking, ends)


def sized(vocab: int, dim: int, layers: int, heads: int) -> BertSpec:
    """A row of the paper's table at a small size."""
    return BertSpec(vocab=vocab, width=dim, dim=dim, layers=layers, heads=heads, ffn=4 * dim, context=512, segments=2)


def tiny(*, alternating: bool = False, rate: float = 0.15, vocab: int = 4000, dim: int = 128, layers: int = 2, heads: int = 2,
         stretch: int = 60, dropout: float = 0.1, batch: int = 32, lr: float = 1e-3, steps: int = 6000, seed: int = 0) -> Run:  # fmt: skip
    """Masked words and the next sentence. Figures on held-out text: both accuracies, in per cent."""
    tokenizer, train, held = text(vocab, stretch, rate)
    torch.manual_seed(seed)
    model = dropped(normal(family("bert").build(sized(tokenizer.vocab_size, dim, layers, heads))), dropout)

    def finish(trained: nn.Module, folder: Path) -> str:
        found = measure(Summed(sparse=True), trained, held)
        tokenizer.save(folder)
        return last_words(folder, {"nsp": 100 * found["nsp_accuracy"], "mlm": 100 * found["mlm_accuracy"], "pairs": len(held)})

    objective = Turns(sparse=True) if alternating else Summed(sparse=True)
    return Run(model, objective, train, settings(steps, batch, lr, "nsp_accuracy", seed), eval={"held-out": held},
               eval_objective=Summed(sparse=True), finish=finish)  # fmt: skip


def electra(*, rate: float = 0.15, vocab: int = 4000, dim: int = 128, layers: int = 2, heads: int = 2, stretch: int = 60,
            share: float = 0.5, dropout: float = 0.1, batch: int = 32, lr: float = 1e-3, steps: int = 6000,
            seed: int = 0) -> Run:  # fmt: skip
    """A generator of `share` of the width fills masks, the model finds its words. Figure: accuracy on held-out tokens, beside the share
    of tokens that are their own."""
    tokenizer, train, held = text(vocab, stretch, rate)
    torch.manual_seed(seed)
    small = heads * max(8, round(share * dim / heads))
    specs = [sized(tokenizer.vocab_size, width, layers, heads) for width in (dim, small)]
    page = family("electra")
    generator = page.form("ElectraForMaskedLM").build
    if generator is None:
        raise InputError("ELECTRA's masked-word form has no wiring")
    objective = Replaced(dropped(normal(generator(specs[1])), dropout))

    def finish(trained: nn.Module, folder: Path) -> str:
        found = measure(objective.eval(), trained, held)
        return last_words(folder, {"accuracy": 100 * found["accuracy"], "own": 100 - 100 * found["replaced"]})

    return Run(dropped(normal(page.build(specs[0])), dropout), objective, train, settings(steps, batch, lr, "accuracy", seed),
               eval={"held-out": held}, finish=finish)  # fmt: skip


def settings(steps: int, batch: int, lr: float, metric: str, seed: int) -> Settings:
    """AdamW down a line, as BERT's."""
    return Settings(
        steps=steps, seed=seed, loading=Loading(batch=batch), optim=Optim(lr=lr, betas=(0.9, 0.98), decay=0.01),
        schedule=Schedule(shape=Shape.LINEAR, warmup=0.05, floor=0.0),
        judging=Judging(every=1000, source="held-out", metric=metric, higher=True),
    )  # fmt: skip
