"""SQuAD: exact match and F1 as the official script counts them (Rajpurkar et al. 2016, arXiv 1606.05250, section 5.1; row 63)."""

from __future__ import annotations

import lzma
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transept.checkpoints.tensorfile import strict_json
from transept.core.errors import InputError
from transept.door import Model

HUMAN = (82.3, 91.2)
"""Exact match and F1 of people on the test set, and below BERT's, as the lectures print them."""
PRINTED = {"human (test)": HUMAN, "BERT-base (dev)": (80.8, 88.5), "BERT-large (dev)": (84.1, 90.9)}

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_LARGEST = 1 << 30


@dataclass(frozen=True)
class Question:
    """A question, the text that answers it, and every right answer with the character where it starts; none: unanswerable."""

    id: str
    article: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...]


def read(path: str | Path) -> list[Question]:
    """The questions of a file in SQuAD's JSON, plain or .xz. Errors: InputError for another form and for an answer that does not stand in
    its context where it is said to, CheckpointError for damage."""
    path = Path(path)
    if path.stat().st_size > _LARGEST:
        raise InputError(f"{path} is {path.stat().st_size} bytes long; at most {_LARGEST} are read")
    raw = path.read_bytes()
    record = strict_json(path, "the file", lzma.decompress(raw) if path.suffix == ".xz" else raw)
    try:
        found = [_question(a["title"], p["context"], q) for a in record["data"] for p in a["paragraphs"] for q in p["qas"]]
    except (KeyError, TypeError, ValueError) as e:
        raise InputError(f"{path} is not of SQuAD's form: data, paragraphs, qas, answers ({e})") from e
    for q in found:
        for text, at in q.answers:
            if at < 0 or q.context[at : at + len(text)] != text:
                there = q.context[max(at, 0) :][: len(text)]
                said = f"{path}: the answer {text[:60]!r} to question {q.id} should stand at character {at} of its context"
                raise InputError(f"{said}, which has {len(q.context)} characters and there {there[:60]!r}")
    return found


def normalised(answer: str) -> str:
    """Lower case, without punctuation, articles, and spaces beyond one."""
    bare = "".join(c for c in answer.lower() if c not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def exact(found: str, true: str) -> float:
    """1 where the two are equal once normalised."""
    return float(normalised(found) == normalised(true))


def f1(found: str, true: str) -> float:
    """The overlap of words: 2PR / (P + R); where one has no words, 1 if neither has."""
    a, b = normalised(found).split(), normalised(true).split()
    if not a or not b:
        return float(a == b)
    return 2 * sum((Counter(a) & Counter(b)).values()) / (len(a) + len(b))


def score(found: Mapping[str, str], questions: Sequence[Question]) -> dict[str, float]:
    """Exact match and F1 in per cent, each question by the right answer nearest to it; one without an answer found counts 0."""
    if not questions:
        raise InputError("there is no question to score")
    total = {"exact": 0.0, "f1": 0.0}
    for q in questions:
        if q.id in found:
            # An answer that is nothing but an article and a comma is no answer to compare with.
            true = [text for text, _ in q.answers if normalised(text)] or [""]
            total["exact"] += max(exact(found[q.id], text) for text in true)
            total["f1"] += max(f1(found[q.id], text) for text in true)
    return {name: 100 * value / len(questions) for name, value in total.items()}


def evaluate(m: Model, questions: Sequence[Question], progress: Callable[[int, int], None] | None = None) -> dict[str, float]:
    """The figures of a question-answering model that answers each question from its context."""
    found: dict[str, str] = {}
    for i, q in enumerate(questions):
        found[q.id] = m.answer(q.question, q.context).text
        if progress is not None:
            progress(i + 1, len(questions))
    return score(found, questions)


def _question(title: str, context: str, record: Mapping[str, Any]) -> Question:
    answers = () if record.get("is_impossible") else tuple((str(a["text"]), int(a["answer_start"])) for a in record["answers"])
    return Question(str(record["id"]), str(title), str(record["question"]), str(context), answers)
