"""What a part of a model does, shown by changing it: heads taken out, and states of one run put into another."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from transept.core.shapes import Float, Int, Tensor
from transept.inspection.attention import called
from transept.inspection.sites import sites
from transept.inspection.watch import Watched, heads_off, module_of, patched, watch


def ablated(m: Watched, ids: Int[Tensor, "b t"], heads: Sequence[str], source: Tensor | None = None) -> tuple[Any, Any]:
    """The model's result with all heads, and without the named ones such as attn[3].head[2]."""
    with torch.no_grad():
        before = called(m, ids, source)
        if not heads:
            return before, before
        with heads_off(m, heads):
            return before, called(m, ids, source)


def divergence(before: Float[Tensor, "... v"], after: Float[Tensor, "... v"]) -> Float[Tensor, "..."]:
    """KL(before || after) of two rows of logits, in bits: what the change cost."""
    p, q = before.double().log_softmax(-1), after.double().log_softmax(-1)
    return ((p.exp() * (p - q)).sum(-1) / math.log(2)).clamp(min=0)


def probabilities(logits: Float[Tensor, "b t v"], ids: Int[Tensor, "b t"]) -> Float[Tensor, "b u"]:
    """What a decoder gave each token but the first, knowing those before it [b t-1]."""
    return logits[:, :-1].double().softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]


def importance_of_heads(
    m: Watched, ids: Int[Tensor, "b t"], names: Sequence[str], at: int = -1, source: Tensor | None = None
) -> dict[str, float]:
    """For each of these heads what taking it out alone costs at one position, in bits."""
    out = {}
    for name in names:
        before, after = ablated(m, ids, [name], source)
        out[name] = float(divergence(before.logits[:, at], after.logits[:, at]).mean())
    return out


def traced(
    m: Watched, given: Int[Tensor, "b t"], taken: Int[Tensor, "b t"], score: Callable[[Any], Tensor], source: Tensor | None = None
) -> Float[Tensor, "l t"]:
    """Where a difference lies (causal tracing, Meng et al. 2022, arXiv 2202.05262, section 2.1): for each layer and position the score of
    the run `taken` with the state of the run `given` put there, from 0 (no change) to 1 (the score of `given`).

    Both runs have equally many tokens.
    """
    names = [name for name in sites(module_of(m)) if name.startswith("block[") and name.endswith("]")]
    with torch.no_grad():
        with watch(m, *names) as seen:
            high = score(called(m, given, source)).double()
        low = score(called(m, taken, source)).double()
        out = torch.zeros(len(names), given.shape[1], dtype=torch.double)
        for i, name in enumerate(names):
            for at in range(given.shape[1]):
                with patched(m, {name: seen[name]}, [at]):
                    out[i, at] = (score(called(m, taken, source)) - low) / (high - low)
    return out
