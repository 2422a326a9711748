"""Choosing the next token from its logits (row 82e): the processors in the order of transformers, then greedy or by probability."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from transept.core.errors import InputError, NumericsError
from transept.core.shapes import Float, Int, Tensor
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

    def generator(self) -> torch.Generator | None:
        """The random stream of one request; None where nothing is random."""
        if self.temperature == 0.0:
            return None
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed % 2**63)
        return generator


def penalise(logits: Float[Tensor, "v"], seen: Int[Tensor, "t"], penalty: float) -> Float[Tensor, "v"]:
    """Logits of tokens already seen divided (if positive) or multiplied (if negative) by the penalty (Keskar et al. 2019, arXiv
    1909.05858).
    """
    if penalty == 1.0 or not len(seen):
        return logits
    score = logits[seen]
    return logits.index_put((seen,), torch.where(score < 0, score * penalty, score / penalty))


def shape(logits: Float[Tensor, "v"], s: Sampling) -> Float[Tensor, "v"]:
    """Temperature, then top-k, top-p (Holtzman et al. 2019) and min-p (Nguyen et al. 2024): tokens that are out get -inf."""
    logits = logits / s.temperature
    if s.top_k is not None and s.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(s.top_k).values[-1], float("-inf"))
    if s.top_p is not None and s.top_p < 1.0:
        ordered, index = logits.sort()
        out = ordered.softmax(-1).cumsum(-1) <= 1 - s.top_p
        out[-1] = False
        logits = logits.masked_fill(out.scatter(0, index, out), float("-inf"))
    if s.min_p is not None:
        p = logits.softmax(-1)
        logits = logits.masked_fill(p < s.min_p * p.max(), float("-inf"))
    return logits


def choose(logits: Float[Tensor, "v"], seen: Int[Tensor, "t"], s: Sampling, generator: torch.Generator | None) -> tuple[int, float]:
    """The next token and its log-probability under the model's own distribution; logits that are not numbers are refused."""
    logits = logits.detach().float().cpu()
    if torch.isnan(logits).any():
        raise NumericsError("the model's logits hold NaN: its weights or its input are damaged")
    scores = penalise(logits, seen, s.repetition_penalty)
    if generator is None:
        token = int(scores.argmax())
    else:
        # By the inverse of the cumulated probabilities, in float64: one random number decides, whatever the vocabulary's size.
        mass = shape(scores, s).double().softmax(-1).cumsum(-1)
        point = torch.rand((), generator=generator, dtype=torch.float64) * mass[-1]
        token = int(torch.searchsorted(mass, point, right=True).clamp(max=len(mass) - 1))
    return token, float(logits[token] - logits.logsumexp(-1))
