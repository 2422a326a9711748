"""Do two sentences say the same? MiniLM on STS-B's open part, and on any GLUE task from its files; rows 58, 61, 62.

    transept train recipes.paraphrase:sts                              # the pair read together; 2 cores
    transept train recipes.paraphrase:apart                            # each text read alone, by the cosine of their means
    transept train recipes.paraphrase:glue --set task=mrpc --set data=glue_data
    transept eval glue mrpc=runs/paraphrase-glue-1/model --data glue_data

Measured, seed 0, 2 cores: Spearman's correlation on the 629 test pairs 68.9 for pairs read together (1,008 to learn from), 82.5 for
texts read alone (82.4 before any training).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import transept
from recipes.sentiment import RATES
from recipes.text import Tuning, collate, last_words, samples, settings, table
from transept.core.batch import Batch, Draw, Sample
from transept.core.errors import InputError
from transept.data.source import Samples
from transept.data.text.tokenizer import Tokenizer
from transept.evaluation import glue as tasks
from transept.evaluation.metrics import pearson, spearman
from transept.training.objectives.classification import Classification
from transept.training.objectives.losses import call, stacked
from transept.training.objectives.regression import Alike, Regression, mean_state
from transept.training.run import Run


def pair(tokenizer: Tokenizer, first: str, second: str, longest: int = 256) -> dict[str, Any]:
    """`[CLS] a [SEP] b [SEP]` with its segments, cut at `longest` tokens."""
    ids, segments = tokenizer.encode_pair(first, second)
    return {"ids": ids[:longest], "segments": segments[:longest]}


@torch.no_grad()
def scores(model: nn.Module, source: Samples, batch: int = 64) -> list[float]:
    """The model's one score for each row."""
    out: list[float] = []
    for at in range(0, len(source), batch):
        rows = [source[i] for i in range(at, min(at + batch, len(source)))]
        out += call(model, source.collate(rows, Draw(0, 0, at))).logits[:, 0].tolist()
    return out


def sts(*, tune: str = "full", epochs: int = 6, batch: int = 16, lr: float = 0.0, seed: int = 0) -> Run:
    """A number from 0 to 5 for a pair read together. Figures: Spearman and Pearson on the test pairs, in per cent."""
    made = Tuning("minilm", "BertForSequenceClassification", ("similarity",), tune, seed=seed)
    source = {
        split: samples([{**pair(made.tokenizer, r["sentence1"], r["sentence2"]), "scores": float(r["score"]) / 5}
                        for r in table(f"sts-benchmark-open/{split}.tsv.xz")])
        for split in ("train", "dev", "test")
    }  # fmt: skip

    def judged(model: nn.Module, split: str) -> dict[str, float]:
        found, true = scores(model, source[split]), [row["scores"] for row in source[split].samples]
        return {"spearman": 100 * spearman(found, true), "pearson": 100 * pearson(found, true)}

    def finish(model: nn.Module, folder: Path) -> str:
        return last_words(folder, judged(model, "test"), f"saved: {made.save(folder)}")

    chosen = settings(len(source["train"]), lr or RATES[tune], epochs, batch, seed, "spearman", True)
    return Run(made.model, Regression(), source["train"], chosen, eval={"dev": source["dev"]}, measure=lambda m: judged(m, "dev"),
               finish=finish)  # fmt: skip


def apart(*, epochs: int = 4, batch: int = 16, lr: float = 2e-5, seed: int = 0) -> Run:
    """The cosine of two texts' mean states learns the number. Figures: Spearman on the test pairs before and after, in per cent."""
    torch.manual_seed(seed)
    m = transept.load("minilm")
    tokenizer = m.tokenizer
    if tokenizer is None:
        raise InputError("minilm has no tokenizer")
    rows = {split: table(f"sts-benchmark-open/{split}.tsv.xz") for split in ("train", "dev", "test")}
    source = {split: twos(tokenizer, found) for split, found in rows.items()}

    def judged(model: nn.Module, split: str) -> float:
        with torch.no_grad():
            found: list[float] = []
            for at in range(0, len(source[split]), 64):
                batch = source[split].collate([source[split][i] for i in range(at, min(at + 64, len(source[split])))], Draw(0, 0, at))
                vectors = mean_state(call(model, batch).hidden, batch.get("mask"))
                found += torch.cosine_similarity(vectors[::2], vectors[1::2]).tolist()
        return 100 * spearman(found, [float(r["score"]) for r in rows[split]])

    before = judged(m.model.eval(), "test")

    def finish(model: nn.Module, folder: Path) -> str:
        transept.save(m, folder / "model")
        return last_words(folder, {"spearman": judged(model, "test"), "untuned": before})

    chosen = settings(len(source["train"]), lr, epochs, batch, seed, "spearman", True)
    return Run(m.model, Alike(), source["train"], chosen, eval={"dev": source["dev"]}, measure=lambda m: {"spearman": judged(m, "dev")},
               finish=finish)  # fmt: skip


def twos(tokenizer: Tokenizer, rows: Sequence[Mapping[str, str]]) -> Samples:
    """Pairs whose texts become rows of their own, two for each pair."""
    made = [{"a": tokenizer.encode(r["sentence1"]), "b": tokenizer.encode(r["sentence2"]), "scores": float(r["score"]) / 5} for r in rows]

    def both(some: Sequence[Sample], draw: Draw) -> Batch:
        texts = stacked([{"ids": row[side]} for row in some for side in ("a", "b")])
        return {"scores": torch.tensor([row["scores"] for row in some]), **texts}

    return Samples(made, both, [max(len(row["a"]), len(row["b"])) for row in made])


def glue(*, task: str = "mrpc", data: str = "glue_data", tune: str = "full", epochs: int = 3, batch: int = 32, lr: float = 0.0,
         seed: int = 0) -> Run:  # fmt: skip
    """Any of GLUE's eight tasks from the files of its download. Figures: the task's own on its development file."""
    chosen = tasks.task(task)
    made = Tuning("minilm", "BertForSequenceClassification", chosen.classes or ("score",), tune, seed=seed)
    parts = {"train": tasks.read(data, task, "train"), "dev": tasks.read(data, task, chosen.files[0])}
    source = {}
    for name, rows in parts.items():
        for line in rows.bad[:3]:
            print(f"left out {line}")
        ids = [pair(made.tokenizer, *t) if isinstance(t, tuple) else {"ids": made.tokenizer.encode(t)[:256]} for t in rows.texts]
        ends = [{"labels": chosen.classes.index(x)} if chosen.classes else {"scores": float(x)} for x in rows.labels]
        source[name] = Samples([{**a, **b} for a, b in zip(ids, ends, strict=True)], collate, [len(row["ids"]) for row in ids])

    def finish(model: nn.Module, folder: Path) -> str:
        found = tasks.evaluate(made.loaded, data, task)
        return last_words(folder, {f"{column} {name}": value for column, figures in found.items() for name, value in figures.items()},
                          f"saved: {made.save(folder)}")  # fmt: skip

    objective = Classification() if chosen.classes else Regression()
    metric, higher = ("accuracy", True) if chosen.classes else ("loss", False)
    wanted = settings(len(source["train"]), lr or RATES[tune], epochs, batch, seed, metric, higher)
    return Run(made.model, objective, source["train"], wanted,
               eval={"dev": source["dev"]}, finish=finish)  # fmt: skip
