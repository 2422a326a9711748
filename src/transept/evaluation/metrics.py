"""The figures of GLUE and of tagging, from lists of answers (rows 60, 62)."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

import numpy as np

from transept.core.errors import InputError

Span = tuple[str, int, int]


def accuracy(found: Sequence[Hashable], true: Sequence[Hashable]) -> float:
    """The share of equal answers."""
    _paired(found, true)
    return sum(a == b for a, b in zip(found, true, strict=True)) / len(true)


def f1(found: Sequence[Hashable], true: Sequence[Hashable], positive: Hashable = 1) -> float:
    """2PR / (P + R) of one class; 0 where it is neither found nor there."""
    _paired(found, true)
    hits = sum(a == b == positive for a, b in zip(found, true, strict=True))
    return _harmonic(hits, sum(a == positive for a in found), sum(b == positive for b in true))


def matthews(found: Sequence[Hashable], true: Sequence[Hashable]) -> float:
    """Matthews' correlation of two classes or more (Gorodkin 2004); 0 where one side has a single class."""
    _paired(found, true)
    table = {c: i for i, c in enumerate(dict.fromkeys([*found, *true]))}
    a, b = (np.array([table[x] for x in side]) for side in (found, true))
    n, right = len(a), float((a == b).sum())
    p, t = (np.bincount(side, minlength=len(table)).astype(np.float64) for side in (a, b))
    below = np.sqrt((n * n - p @ p) * (n * n - t @ t))
    return float((right * n - p @ t) / below) if below else 0.0


def pearson(found: Sequence[float], true: Sequence[float]) -> float:
    """The linear correlation; 0 where one side is constant."""
    _paired(found, true)
    a, b = (np.asarray(side, dtype=np.float64) - np.mean(np.asarray(side, dtype=np.float64)) for side in (found, true))
    below = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / below) if below else 0.0


def spearman(found: Sequence[float], true: Sequence[float]) -> float:
    """The linear correlation of the ranks, equal values sharing their mean rank."""
    return pearson(_ranks(found), _ranks(true))


def entities(tags: Sequence[str]) -> list[Span]:
    """The entities (type, first, last) of a sentence in B-/I- tags, as conlleval reads them: an I- after another type begins one."""
    out: list[Span] = []
    kind, begin = "", 0
    for i, tag in enumerate([*tags, "O"]):
        prefix, _, now = tag.partition("-")
        if kind and (prefix in ("O", "B") or now != kind):
            out.append((kind, begin, i - 1))
            kind = ""
        if prefix != "O" and not kind:
            kind, begin = now, i
    return out


def entity_f1(found: Iterable[Sequence[str]], true: Iterable[Sequence[str]]) -> float:
    """F1 of whole entities over all sentences: type and both ends must be right."""
    hits = guessed = real = 0
    for a, b in zip(found, true, strict=True):
        if len(a) != len(b):
            raise InputError(f"a sentence of {len(b)} words has {len(a)} tags")
        mine, theirs = set(entities(a)), set(entities(b))
        hits, guessed, real = hits + len(mine & theirs), guessed + len(mine), real + len(theirs)
    return _harmonic(hits, guessed, real)


def _harmonic(hits: int, guessed: int, real: int) -> float:
    return 2 * hits / (guessed + real) if guessed + real else 0.0


def _ranks(values: Sequence[float]) -> list[float]:
    _, where, counts = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - counts + 1 + last) / 2)[where].tolist()


def _paired(found: Sequence[object], true: Sequence[object]) -> None:
    if len(found) != len(true) or not true:
        raise InputError(f"there are {len(found)} answers to {len(true)} questions; as many were expected, and one at least")
