"""Models, requests and a toy tokenizer for the engine's tests."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from tests.contracts.decoders import Case, cases, draw_ids, spec
from transept.inference.engine import Ask, Engine, Limits
from transept.inference.generation import Generation
from transept.inference.sampling import Sampling


def case_of(name: str, tiny: str) -> Case:
    """A decoder by its names."""
    return next(case for case in cases() if (case[0].name, case[1]) == (name, tiny))


def paged() -> list[Case]:
    """The decoders whose memory lies in pages: all but the recurrent ones, which keep one state."""
    return [case for case in cases() if hasattr(spec(case), "context")]


def draw_ask(seed: int, case: Case, new: int = 32, shared: Sequence[int] = (), **rest: object) -> Ask:
    """A random request, often with the beginning that others have too; every second one is drawn by seed."""
    rng = random.Random(seed)
    s = spec(case)
    longest = s.context - new
    own = draw_ids(seed, (rng.randint(1, longest),), s.vocab).tolist()
    prompt = [*shared[: rng.randint(0, longest - 1)], *own][:longest] if rng.random() < 0.6 else own
    sampling = Sampling() if seed % 2 else Sampling(temperature=rng.choice([0.7, 1.0]), seed=seed, top_p=rng.choice([None, 0.9]))
    return Ask(prompt=prompt, max_tokens=new, sampling=sampling, **rest)


def alone(model: torch.nn.Module, ask: Ask, context: int) -> Generation:
    """The request in an engine of its own, its prompt in one piece."""
    engine = Engine(model, context=context, limits=Limits(pages=32, page=16, rows=1, budget=4096), drafter=None)
    return engine.run([ask])[0][0]


class Letters:
    """Token n is the letter or space number n of the alphabet, again and again: text for the tests of stop strings."""

    def push(self, ids: int | Sequence[int], /) -> str:
        return "".join("abcdefghijklmnop qrstuvwxyz"[n % 27] for n in ([ids] if isinstance(ids, int) else ids))

    def finish(self) -> str:
        return ""
