"""Beam search: the k most probable continuations kept at each step, counted as transformers counts them (Sutskever et al. 2014; rows 39,
82e)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from transept.core.errors import InputError
from transept.core.shapes import Float, Int, Tensor
from transept.inference.generation import CHUNK
from transept.inference.predict import Predictor, device_of, prefill
from transept.inference.rules import Early, Rules


@dataclass(frozen=True)
class Beam:
    """A finished continuation and its score: summed log-probability / length ** penalty."""

    ids: tuple[int, ...]
    score: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How to search: so many `beams`, at most `max_tokens` new tokens, scores divided by length ** `penalty`, and when to end.

    One beam with Early.FIRST is greedy decoding.
    """

    beams: int
    max_tokens: int
    ends: tuple[int, ...]
    penalty: float = 1.0
    early: Early = Early.LIKELY
    rules: Rules = field(default_factory=Rules)

    def check(self) -> Plan:
        """Itself, if its numbers make sense."""
        if self.beams < 1:
            raise InputError(f"beams should be 1 or more, found {self.beams}")
        if self.max_tokens < 0:
            raise InputError(f"max_tokens should be 0 or more, found {self.max_tokens}")
        return self


class _Source:
    """The search of one source: its live beams, their scores, and what has ended."""

    def __init__(self, plan: Plan, prompt: list[int]):
        self.plan, self.prompt = plan, prompt
        self.alive: list[tuple[int, ...]] = [()]
        self.scores: list[float] = [0.0]
        self.done: list[Beam] = []

    @property
    def rows(self) -> list[list[int]]:
        """All tokens of each live beam."""
        return [[*self.prompt, *ids] for ids in self.alive]

    def step(self, logp: Float[Tensor, "k v"], length: int) -> tuple[list[int], list[int]]:
        """Takes the log-probabilities of the token number `length` of each live beam.

        Returns the live beam that each next one follows and its new token; both empty where the search is over.
        """
        plan = self.plan
        flat = (logp + torch.tensor(self.scores)[:, None]).flatten()
        best = flat.topk(min(max(2, 1 + len(plan.ends)) * plan.beams, len(flat)))
        rows, tokens, scores, alive = [], [], [], []
        for rank, (score, place) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
            row, token = divmod(place, logp.shape[1])
            ids = (*self.alive[row], token)
            if score == float("-inf"):
                break
            if token in plan.ends or length == plan.max_tokens:
                # What ranks below the beams is there only to go on in their place.
                if rank < plan.beams:
                    self.done.append(Beam(ids, score / length**plan.penalty))
            elif len(alive) < plan.beams:
                rows.append(row)
                tokens.append(token)
                scores.append(score)
                alive.append(ids)
        self.done = sorted(self.done, key=lambda beam: -beam.score)[: plan.beams]
        if not alive or self._over(scores[0], length):
            return [], []
        self.alive, self.scores = alive, scores
        return rows, tokens

    def _over(self, score: float, length: int) -> bool:
        plan = self.plan
        if len(self.done) < plan.beams:
            return False
        if plan.early is Early.FIRST:
            return True
        reach = plan.max_tokens if plan.early is Early.NEVER and plan.penalty > 0 else length
        return score / reach**plan.penalty <= self.done[-1].score


@torch.inference_mode()
def search(model: Predictor, prompt: Int[Tensor, "n t"], plan: Plan, chunk: int = CHUNK) -> list[list[Beam]]:
    """For each row of the prompt its best `plan.beams` continuations, best first; a row that is done leaves the batch."""
    plan.check()
    sources = [_Source(plan, row) for row in prompt.tolist()]
    if plan.max_tokens == 0:
        return [[Beam((), 0.0)] for _ in sources]
    device = device_of(model)
    cache = model.cache(len(prompt), prompt.shape[1] + plan.max_tokens)
    logits = prefill(model, prompt.to(device), cache, chunk)
    live = sources
    for length in range(1, plan.max_tokens + 1):
        every = [row for source in live for row in source.rows]
        logp = plan.rules.apply(logits.float().log_softmax(-1).cpu(), every, prompt.shape[1], plan.max_tokens)
        rows, tokens, still, at = [], [], [], 0
        for source in live:
            count = len(source.alive)
            follow, new = source.step(logp[at : at + count], length)
            rows += [at + row for row in follow]
            tokens += new
            still += [source] if follow else []
            at += count
        live = still
        if not live:
            break
        if rows != list(range(at)):
            cache.reorder(torch.tensor(rows, device=device))
        logits = model.head(model.hidden(torch.tensor(tokens, device=device)[:, None], cache=cache)[:, -1])
    return [source.done for source in sources]
