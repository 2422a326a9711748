"""Choosing the next token from its logits (row 82e): the processors in the order of transformers, then greedy or by probability.

Written for numpy, so that a compiled decoder answers without torch; tensors on the CPU are taken as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from transept.core.errors import InputError, NumericsError
from transept.core.spec import Spec


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


def shape(logits: ArrayLike, s: Sampling) -> NDArray[np.float32]:
    """Temperature, then top-k, top-p (Holtzman et al. 2019) and min-p (Nguyen et al. 2024): tokens [v] that are out get -inf."""
    scores = np.asarray(logits, np.float32) / np.float32(s.temperature)
    if s.top_k is not None and s.top_k < len(scores):
        scores[scores < np.partition(scores, -s.top_k)[-s.top_k]] = -np.inf
    if s.top_p is not None and s.top_p < 1.0:
        order = np.argsort(scores, kind="stable")
        out = np.cumsum(softmax(scores[order])) <= 1 - s.top_p
        out[-1] = False
        scores[order[out]] = -np.inf
    if s.min_p is not None:
        p = softmax(scores)
        scores[p < np.float32(s.min_p) * p.max()] = -np.inf
    return scores


def softmax(scores: NDArray[np.floating]) -> NDArray[np.floating]:
    """Probabilities [v] of scores [v], in the type of the scores."""
    mass = np.exp(scores - scores.max())
    return mass / mass.sum()


def choose(logits: ArrayLike, seen: Sequence[int] | ArrayLike, s: Sampling, generator: np.random.RandomState | None) -> tuple[int, float]:
    """The next token and its log-probability under the model's own distribution [v]; logits that are not numbers are refused."""
    raw = np.asarray(logits, np.float32)
    most = raw.max()
    if not np.isfinite(most):
        raise NumericsError("the model's logits hold NaN or an infinite number: its weights or its input are damaged")
    scores = penalise(raw, seen, s.repetition_penalty) if s.repetition_penalty != 1.0 else raw
    if generator is None:
        token = int(scores.argmax())
    else:
        # By the inverse of the cumulated probabilities, in float64: one random number decides, whatever the vocabulary's size.
        mass = np.cumsum(softmax(shape(scores, s).astype(np.float64)))
        token = min(int(np.searchsorted(mass, generator.random_sample() * mass[-1], side="right")), len(mass) - 1)
    return token, float(raw[token] - most) - float(np.log(np.exp(raw - most).sum(dtype=np.float64)))
