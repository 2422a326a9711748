"""Beam search: the k most probable continuations kept at each step, as transformers counts them (early_stopping=False)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from transept.core.shapes import Float, Tensor


@dataclass(frozen=True)
class Beam:
    """A finished continuation and its score: summed log-probability / length ** penalty."""

    ids: tuple[int, ...]
    score: float


def beam_search(
    first: Float[Tensor, "v"],
    advance: Callable[[Tensor, Tensor], Float[Tensor, "k v"]],
    *,
    beams: int,
    max_tokens: int,
    ends: Sequence[int],
    penalty: float = 1.0,
) -> list[Beam]:
    """The best `beams` continuations, best first.

    `first` are the logits after the prompt; `advance(rows, tokens)` reorders the state so that beam i follows what beam rows[i] was, appends
    tokens[i] [k], and returns the next logits.
    """
    logp = first.float().log_softmax(-1)[None]
    scores, alive = torch.zeros(1), [()]
    done: list[Beam] = []
    keep = max(2, 1 + len(ends)) * beams
    for length in range(1, max_tokens + 1):
        flat = (logp + scores[:, None]).flatten()
        best = flat.topk(min(keep, len(flat)))
        rows, tokens, kept, running = [], [], [], []
        for rank, (score, place) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
            row, token = divmod(place, logp.shape[1])
            ids = (*alive[row], token)
            if token in ends or length == max_tokens:
                if rank < beams:
                    done.append(Beam(ids, score / length**penalty))
            elif len(running) < beams:
                rows.append(row)
                tokens.append(token)
                kept.append(score)
                running.append(ids)
        done = sorted(done, key=lambda b: -b.score)[:beams]
        if not running or (len(done) == beams and kept[0] / length**penalty <= done[-1].score):
            break
        alive, scores = running, torch.tensor(kept)
        logp = advance(torch.tensor(rows), torch.tensor(tokens)).float().log_softmax(-1)
    return done
