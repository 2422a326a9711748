"""Answers in a passage: MiniLM on 38 of the 48 articles of SQuAD v1.1's development set, tested on the other 10; rows 59, 63.

    transept train recipes.squad:minilm                # 2 cores
    transept eval squad runs/squad-minilm-1/model --data dev-v1.1.json    # a file in SQuAD's form

Measured, seed 0, 2 cores: F1 71.0, exact match 58.5 on the 1,963 questions of the 10 articles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import nn

from recipes.text import WHERE, Tuning, last_words, samples, settings
from transept.data.source import find
from transept.data.text.tokenizer import Tokenizer
from transept.evaluation.squad import Question, evaluate, read
from transept.inference.tasks import aligned, windows
from transept.training.objectives.span import Span
from transept.training.run import Run


def divided(questions: Sequence[Question], held: int = 10) -> tuple[list[Question], list[Question]]:
    """By articles: every fifth of the sorted titles is held out, `held` in all."""
    titles = sorted({q.article for q in questions})
    test = set(titles[:: len(titles) // held][:held])
    return [q for q in questions if q.article not in test], [q for q in questions if q.article in test]


def rows(tokenizer: Tokenizer, q: Question, longest: int, stride: int) -> Iterator[dict[str, object]]:
    """The windows of a question's context with the first answer's columns; column 0 where a window does not hold it whole."""
    text, begin = q.answers[0]
    end = begin + len(text)
    for window in windows(aligned(tokenizer, q.question, q.context), longest, stride):
        inside = [i for i, (span, kind) in enumerate(zip(window.spans, window.text, strict=True)) if kind == 1 and span is not None]
        covered = [i for i in inside if window.spans[i][0] < end and window.spans[i][1] > begin]
        whole = covered and window.spans[covered[0]][0] <= begin and window.spans[covered[-1]][1] >= end
        first, last = (covered[0], covered[-1]) if whole else (0, 0)
        yield {"ids": window.ids, "segments": window.segments, "start": first, "end": last}


def minilm(*, tune: str = "full", epochs: int = 3, batch: int = 16, lr: float = 1e-4, longest: int = 384, stride: int = 128, seed: int = 0,
           data: str = "") -> Run:  # fmt: skip
    """Where the answer starts and ends. Figures: exact match and F1 on the held-out articles, in per cent."""
    questions = read(data or find("squad-dev/dev-v1.1.json.xz", WHERE))
    learnt, held = divided(questions)
    made = Tuning("minilm", "BertForQuestionAnswering", (), tune, seed=seed)
    train, test = (samples([row for q in part for row in rows(made.tokenizer, q, longest, stride)]) for part in (learnt, held))

    def finish(model: nn.Module, folder: Path) -> str:
        found = evaluate(made.loaded, held)
        return last_words(folder, {**found, "questions": len(held)}, f"saved: {made.save(folder)}")

    return Run(made.model, Span(), train, settings(len(train), lr, epochs, batch, seed, source="held"), eval={"held": test}, finish=finish)
