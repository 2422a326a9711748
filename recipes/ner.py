"""Names in noisy text: MiniLM on WNUT-17 (Derczynski et al. 2017); row 60.

    transept train recipes.ner:minilm           # 2 cores

Measured, seed 0, 2 cores: F1 41.8 of whole entities on the 1,287 test sentences, 54.8 on dev.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from recipes.text import Tuning, last_words, read, samples, settings
from transept.core.batch import Draw
from transept.core.errors import InputError
from transept.data.source import Samples
from transept.data.text.tokenizer import Tokenizer
from transept.evaluation.metrics import accuracy, entity_f1
from transept.training.objectives.classification import Tokens
from transept.training.objectives.losses import IGNORE, call
from transept.training.run import Run

Sentence = list[tuple[str, str]]


def sentences(text: str) -> list[Sentence]:
    """Sentences in CoNLL's columns: a word and its tag on a line, an empty line between."""
    out: list[Sentence] = [[]]
    for number, line in enumerate(text.splitlines(), 1):
        cells = line.split("\t")
        if not line.strip():
            out.append([])
        elif len(cells) != 2:
            raise InputError(f"line {number} has {len(cells)} columns; a word and a tag were expected")
        else:
            out[-1].append((cells[0], cells[1]))
    return [sentence for sentence in out if sentence]


def rows(tokenizer: Tokenizer, found: Sequence[Sentence], tags: Sequence[str], longest: int = 256) -> Samples:
    """Each word's pieces; its tag is asked at the first, the others are not counted."""
    made = []
    for sentence in found:
        ids, labels = [*tokenizer.before], [IGNORE] * len(tokenizer.before)
        for word, tag in sentence:
            # A word of nothing that the vocabulary knows still needs a place for its tag.
            pieces = tokenizer.encode(word, specials=False) or [tokenizer.unk_id or 0]
            ids += pieces
            labels += [tags.index(tag), *[IGNORE] * (len(pieces) - 1)]
        made.append({"ids": [*ids[: longest - 1], *tokenizer.after], "labels": [*labels[: longest - 1], *[IGNORE] * len(tokenizer.after)]})
    return samples(made)


@torch.no_grad()
def judged(model: nn.Module, source: Samples, found: Sequence[Sentence], tags: Sequence[str]) -> dict[str, float]:
    """Entity F1 and the accuracy of tags, in per cent; words beyond the longest row are taken as no name."""
    guesses: list[list[str]] = []
    for at in range(0, len(source), 64):
        some = [source[i] for i in range(at, min(at + 64, len(source)))]
        batch = source.collate(some, Draw(0, 0, at))
        best = call(model, batch).logits.argmax(-1)
        guesses += [[tags[int(i)] for i in row[labels != IGNORE]] for row, labels in zip(best, batch["labels"], strict=True)]
    true = [[tag for _, tag in sentence] for sentence in found]
    guesses = [[*g, *["O"] * (len(t) - len(g))] for g, t in zip(guesses, true, strict=True)]
    return {"f1": 100 * entity_f1(guesses, true), "accuracy": 100 * accuracy(sum(guesses, []), sum(true, []))}


def minilm(*, tune: str = "full", epochs: int = 8, batch: int = 16, lr: float = 2e-4, seed: int = 0) -> Run:
    """Each word's tag at its first piece. Figures: entity F1 and accuracy on the test sentences, in per cent."""
    found = {split: sentences(read(f"wnut17-ner/{split}.conll.xz")) for split in ("train", "dev", "test")}
    tags = sorted({tag for part in found.values() for sentence in part for _, tag in sentence}, key=lambda tag: (tag != "O", tag))
    made = Tuning("minilm", "BertForTokenClassification", tuple(tags), tune, seed=seed)
    source = {split: rows(made.tokenizer, part, tags) for split, part in found.items()}

    def finish(model: nn.Module, folder: Path) -> str:
        return last_words(folder, judged(model, source["test"], found["test"], tags), f"saved: {made.save(folder)}")

    chosen = settings(len(source["train"]), lr, epochs, batch, seed, "f1", True)
    return Run(made.model, Tokens(), source["train"], chosen, eval={"dev": source["dev"]}, finish=finish,
               measure=lambda m: judged(m, source["dev"], found["dev"], tags))  # fmt: skip
