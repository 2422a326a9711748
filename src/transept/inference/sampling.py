"""Choosing the next token from its logits (row 82e): the processors in the order of transformers, then greedy or by probability.

Written for numpy, so that a compiled decoder answers without torch; tensors on the CPU are taken as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from transept import native
from transept.core.errors import InputError, NumericsError
from transept.core.spec import Spec

GROUP = 64
COLDEST = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True, kw_only=True)
class Sampling(Spec):
    """How to choose: `temperature` 0 is greedy; the same `seed` gives the same text; None switches a filter off."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None

    def check(self) -> Sampling:
        """Itself, if every number is within its range."""
        ranges = {
            "temperature": (self.temperature, 0.0, 100.0),
            "top_k": (self.top_k, 1, 2**31),
            "top_p": (self.top_p, 0.0, 1.0),
            "min_p": (self.min_p, 0.0, 1.0),
            "repetition_penalty": (self.repetition_penalty, 1e-3, 1e3),
            "seed": (self.seed, -(2**63), 2**64 - 1),
        }
        for name, (value, low, high) in ranges.items():
            if value is not None and not low <= value <= high:
                raise InputError(f"{name} should be between {low} and {high}, found {value}")
        return self

    def generator(self) -> np.random.RandomState | None:
        """The random stream of one request; None where nothing is random."""
        if self.temperature == 0.0:
            return None
        if self.seed is None:
            return np.random.RandomState()
        # All 64 bits of the seed count.
        return np.random.RandomState([self.seed & 0xFFFFFFFF, self.seed >> 32 & 0xFFFFFFFF])


def penalise(logits: ArrayLike, seen: ArrayLike, penalty: float) -> NDArray[np.float32]:
    """Logits [v] of tokens already seen [t] divided (if positive) or multiplied (if negative) by the penalty (Keskar et al. 2019, arXiv
    1909.05858).
    """
    scores, index = np.asarray(logits, np.float32), np.asarray(seen, np.int64)
    if penalty == 1.0 or not len(index):
        return scores
    scores, known, factor = scores.copy(), scores[index], np.float32(penalty)
    scores[index] = np.where(known < 0, known * factor, known / factor)
    return scores


def kept(logits: ArrayLike, s: Sampling) -> tuple[NDArray[np.int64] | slice, NDArray[np.float32]]:
    """Temperature, then top-k, top-p (Holtzman et al. 2019) and min-p (Nguyen et al. 2024) on logits [v].

    Returns the tokens that stay, rising [n] (a slice where all do), and their weights [n] beside the likeliest one's, which is 1.
    """
    scores = np.asarray(logits, np.float32)
    with np.errstate(over="ignore"):
        weights = np.exp((scores - scores.max()) / np.float32(max(s.temperature, COLDEST)))
    ids: NDArray[np.int64] | slice = slice(None)
    if s.top_k is not None and s.top_k < len(scores):
        ids = np.flatnonzero(scores >= _largest(scores, s.top_k))
    if s.top_p is not None and s.top_p < 1.0:
        heavy = _nucleus(weights[ids], s.top_p)
        ids = heavy if isinstance(ids, slice) else ids[heavy]
    if s.min_p is not None:
        likely = np.flatnonzero(weights[ids] >= np.float32(s.min_p))
        ids = likely if isinstance(ids, slice) else ids[likely]
    return ids, weights[ids]


def _largest(scores: NDArray[np.float32], k: int) -> np.float32:
    """The k-th largest of the scores [v]."""
    # k groups have a member as large as the k-th largest of the groups' peaks, so nothing below that is among the k.
    peaks = scores[: len(scores) // GROUP * GROUP].reshape(-1, GROUP).max(1)
    some = scores[scores >= np.partition(peaks, -k)[-k]] if k <= len(peaks) else scores
    return np.partition(some, -k)[-k]


def _nucleus(weights: NDArray[np.float32], p: float) -> NDArray[np.int64]:
    """The places of the heaviest that make up a share p of all, rising; of equal ones the last stays first."""
    total = weights.sum(dtype=np.float64)
    rest = (1 - p) * total
    # What weighs less than its part of the rest is out: all of that together weighs less than the rest. Only the others are sorted.
    heavy = np.flatnonzero(weights >= np.float32(0.999 * rest / len(weights)))
    some = weights[heavy]
    order = np.argsort(some, kind="stable")
    out = total - some.sum(dtype=np.float64) + np.cumsum(some[order], dtype=np.float64) <= rest
    out[-1] = False
    return np.sort(heavy[order[~out]])


def _drawn(weights: NDArray[np.float32], share: float) -> int:
    """The place at which the cumulated weights [n] exceed this share of all, 0 <= share < 1; one that weighs nothing is never drawn."""
    parts = np.cumsum(np.add.reduceat(weights, np.arange(0, len(weights), GROUP), dtype=np.float64))
    wanted = share * parts[-1]
    group = min(int(np.searchsorted(parts, wanted, side="right")), int(np.searchsorted(parts, parts[-1])))
    mine = weights[group * GROUP : (group + 1) * GROUP]
    within = np.cumsum(mine, dtype=np.float64) + (parts[group - 1] if group else 0.0)
    return group * GROUP + min(int(np.searchsorted(within, wanted, side="right")), int(np.flatnonzero(mine)[-1]))


def log_sum_exp(logits: NDArray[np.float32], most: float | None = None) -> float:
    """The logarithm of the sum of the exponentials of logits [v], of which `most` is the largest."""
    top = np.float32(logits.max() if most is None else most)
    if native.available() and (found := native.exp_sum(logits, float(top))) > 0:
        return float(top) + math.log(found)
    return float(top) + float(np.log(np.exp(logits - top).sum(dtype=np.float64)))


def choose(logits: ArrayLike, seen: Sequence[int] | ArrayLike, s: Sampling, generator: np.random.RandomState | None) -> tuple[int, float]:
    """The next token and its log-probability under the model's own distribution [v]; logits that are not numbers are refused."""
    raw = np.asarray(logits, np.float32)
    # The first NaN, where there is one, counts as the largest.
    best = int(raw.argmax())
    most = float(raw[best])
    if not math.isfinite(most):
        raise NumericsError("the model's logits hold NaN or an infinite number: its weights or its input are damaged")
    scores = penalise(raw, seen, s.repetition_penalty) if s.repetition_penalty != 1.0 else raw
    if generator is None:
        token = best if scores is raw else int(scores.argmax())
    else:
        # By the inverse of the cumulated probabilities, in float64: one random number decides, whatever the vocabulary's size.
        ids, weights = kept(scores, s)
        place = _drawn(weights, generator.random_sample())
        token = place if isinstance(ids, slice) else int(ids[place])
    return token, float(raw[token]) - log_sum_exp(raw, most)
