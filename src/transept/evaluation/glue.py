"""GLUE's eight tasks from the files of its own download, each with its metric, beside the table of the lectures (Wang et al. 2018, arXiv
1804.07461; Devlin et al. 2018, table 1; row 62)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transept.core.errors import InputError, nearest
from transept.door import Model
from transept.evaluation.metrics import accuracy, f1, matthews, pearson, spearman

Pair = tuple[str, str]
Text = str | Pair


@dataclass(frozen=True)
class Task:
    """Where a task's rows are and what is counted: names or numbers of columns, the classes in their order (none: a number is asked)."""

    folder: str
    first: str | int
    second: str | int | None
    label: str | int
    classes: tuple[str, ...]
    metrics: tuple[str, ...]
    files: tuple[str, ...] = ("dev",)
    rows: int = 0
    """Training rows, in thousands, as the lectures' table prints them."""


_ENTAILS = ("entailment", "not_entailment")
TASKS = {
    "mnli": Task("MNLI", "sentence1", "sentence2", "gold_label", ("entailment", "neutral", "contradiction"), ("accuracy",),
                 ("dev_matched", "dev_mismatched"), 392),
    "qqp": Task("QQP", "question1", "question2", "is_duplicate", ("0", "1"), ("f1", "accuracy"), rows=363),
    "qnli": Task("QNLI", "question", "sentence", "label", _ENTAILS, ("accuracy",), rows=108),
    "sst2": Task("SST-2", "sentence", None, "label", ("0", "1"), ("accuracy",), rows=67),
    "cola": Task("CoLA", 3, None, 1, ("0", "1"), ("matthews",), rows=8),
    "stsb": Task("STS-B", "sentence1", "sentence2", "score", (), ("spearman", "pearson"), rows=5),
    "mrpc": Task("MRPC", "#1 String", "#2 String", "Quality", ("0", "1"), ("f1", "accuracy"), rows=3),
    "rte": Task("RTE", "sentence1", "sentence2", "label", _ENTAILS, ("accuracy",), rows=2),
}  # fmt: skip

COLUMNS = ("mnli", "mnli-mm", "qqp", "qnli", "sst2", "cola", "stsb", "mrpc", "rte")
PRINTED = {
    "Pre-OpenAI SOTA": (80.6, 80.1, 66.1, 82.3, 93.2, 35.0, 81.0, 86.0, 61.7),
    "BiLSTM+ELMo+Attn": (76.4, 76.1, 64.8, 79.8, 90.4, 36.0, 73.3, 84.9, 56.8),
    "OpenAI GPT": (82.1, 81.4, 70.3, 87.4, 91.3, 45.4, 80.0, 82.3, 56.0),
    "BERT-base": (84.6, 83.4, 71.2, 90.5, 93.5, 52.1, 85.8, 88.9, 66.4),
    "BERT-large": (86.7, 85.9, 72.1, 92.7, 94.9, 60.5, 86.5, 89.3, 70.1),
}
"""The lectures' table: test scores in per cent, in the order of COLUMNS."""


@dataclass(frozen=True)
class Rows:
    """The texts of a file with their classes or numbers, and the lines that had too few columns or an unknown class."""

    texts: list[Text]
    labels: list[str]
    bad: list[str]


def task(name: str) -> Task:
    """The task of that name; another is refused with the nearest."""
    if name not in TASKS:
        raise InputError(f"GLUE has no task {name!r}{nearest(name, TASKS)}; it has {', '.join(TASKS)}")
    return TASKS[name]


def read(folder: str | Path, name: str, split: str = "dev") -> Rows:
    """The rows of a task's split below GLUE's folder. A row that is broken is left out and named `file:line: reason`.

    Errors: InputError where the file is not there, lacks a column, or holds no good row.
    """
    found = task(name)
    path = Path(folder) / found.folder / f"{split}.tsv"
    if not path.is_file():
        raise InputError(f"there is no {path}; GLUE's download has it under that name")
    lines = path.read_text(encoding="utf-8", errors="replace").rstrip("\n").split("\n")
    at, lines, before = _columns(path, found, lines)
    rows = Rows([], [], [])
    for number, line in enumerate(lines, before + 1):
        cells = line.rstrip("\r").split("\t")
        why = _wrong(found, cells, at)
        if why:
            rows.bad.append(f"{path}:{number}: {why}")
            continue
        first = cells[at["first"]]
        rows.texts.append(first if found.second is None else (first, cells[at["second"]]))
        rows.labels.append(cells[at["label"]])
    if not rows.texts:
        raise InputError(f"{path} holds no good row{f'; the first is wrong: {rows.bad[0]}' if rows.bad else ''}")
    return rows


def score(name: str, found: Sequence[str] | Sequence[float], labels: Sequence[str]) -> dict[str, float]:
    """A task's metrics in per cent; the first is the one that the lectures print."""
    chosen = task(name)
    if not chosen.classes:
        numbers, true = [float(x) for x in found], [float(x) for x in labels]
        return {m: 100 * {"pearson": pearson, "spearman": spearman}[m](numbers, true) for m in chosen.metrics}
    words = [str(x) for x in found]
    count: Mapping[str, Callable[[Sequence[str], Sequence[str]], float]] = {
        "accuracy": accuracy, "matthews": matthews, "f1": lambda a, b: f1(a, b, positive="1"),
    }  # fmt: skip
    return {m: 100 * count[m](words, labels) for m in chosen.metrics}


def evaluate(m: Model, folder: str | Path, name: str, limit: int | None = None, batch: int = 32) -> dict[str, dict[str, float]]:
    """The metrics of a classifier on the development files of a task, by column of the lectures' table."""
    out: dict[str, dict[str, float]] = {}
    for split in task(name).files:
        rows = read(folder, name, split)
        labels = m.classify(rows.texts[:limit], truncate=True, batch=batch)
        found = [x.score for x in labels] if not task(name).classes else [_class(name, m.labels, x.label) for x in labels]
        out[f"{name}-mm" if split.endswith("mismatched") else name] = score(name, found, rows.labels[:limit])
    return out


def average(scores: Mapping[str, float]) -> float | None:
    """The mean of the nine columns, as the lectures' table has it; None where one is missing."""
    return sum(scores[c] for c in COLUMNS) / len(COLUMNS) if all(c in scores for c in COLUMNS) else None


def _columns(path: Path, found: Task, lines: list[str]) -> tuple[dict[str, int], list[str], int]:
    wanted = {"first": found.first, "second": found.second, "label": found.label}
    if isinstance(found.label, int):
        return {k: v for k, v in wanted.items() if isinstance(v, int)}, lines, 0
    header = lines[0].rstrip("\r").split("\t")
    for column in wanted.values():
        if column is not None and column not in header:
            raise InputError(f"{path} has no column {column!r}{nearest(str(column), header)}; it has {', '.join(header)}")
    return {k: header.index(str(v)) for k, v in wanted.items() if v is not None}, lines[1:], 1


def _wrong(found: Task, cells: list[str], at: Mapping[str, int]) -> str:
    if len(cells) <= max(at.values()):
        return f"{len(cells)} columns, {max(at.values()) + 1} were expected"
    label = cells[at["label"]]
    if found.classes:
        return "" if label in found.classes else f"the class {label!r} is none of {', '.join(found.classes)}"
    return "" if label.replace(".", "", 1).isdigit() else f"{label!r} is not a number"


def _class(name: str, known: Sequence[str], label: str) -> str:
    """The task's class that a model means: by its own name, or by its place where the model's classes have no names."""
    classes = task(name).classes
    if label in classes:
        return label
    if label.startswith("LABEL_") and label[6:].isdigit() and int(label[6:]) < len(classes):
        return classes[int(label[6:])]
    raise InputError(f"the model's classes {', '.join(known)} are not those of {name}: {', '.join(classes)}")
