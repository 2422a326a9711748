"""Choosing tokens: equal to transformers' processors, fair, and the same for the same seed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from transept.core.errors import InputError, NumericsError
from transept.inference.sampling import Sampling, choose, penalise, shape

warpers = pytest.importorskip("transformers.generation.logits_process")


@given(
    seed=st.integers(0, 10_000),
    temperature=st.floats(0.1, 3.0),
    top_k=st.none() | st.integers(1, 60),
    top_p=st.none() | st.floats(0.05, 0.999),
    min_p=st.none() | st.floats(0.01, 0.5),
    penalty=st.floats(0.5, 2.0),
)
def test_processors_are_those_of_transformers(
    seed: int, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None, penalty: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, seen = torch.randn(50, generator=generator) * 4, torch.randint(0, 50, (9,), generator=generator)
    expected = warpers.RepetitionPenaltyLogitsProcessor(penalty)(seen[None], logits[None].clone())
    expected = warpers.TemperatureLogitsWarper(temperature)(seen[None], expected)
    if top_k is not None:
        expected = warpers.TopKLogitsWarper(top_k)(seen[None], expected)
    if top_p is not None:
        expected = warpers.TopPLogitsWarper(top_p)(seen[None], expected)
    if min_p is not None:
        expected = warpers.MinPLogitsWarper(min_p)(seen[None], expected)
    ours = shape(penalise(logits, seen, penalty), Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p))
    assert torch.equal(torch.from_numpy(ours), expected[0])


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -3.0])
    s = Sampling(temperature=1.0, seed=3)
    generator, none = s.generator(), torch.empty(0, dtype=torch.long)
    n = 20_000
    counts = torch.bincount(torch.tensor([choose(logits, none, s, generator)[0] for _ in range(n)]), minlength=5)
    expected = logits.softmax(-1) * n
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    assert chi2 < 18.47, chi2  # 4 degrees of freedom, p = 0.001


def test_the_same_seed_gives_the_same_draws() -> None:
    logits, none = torch.randn(100, generator=torch.Generator().manual_seed(0)), torch.empty(0, dtype=torch.long)

    def draws(seed: int) -> list[int]:
        s = Sampling(temperature=1.0, seed=seed)
        generator = s.generator()
        return [choose(logits, none, s, generator)[0] for _ in range(50)]

    assert draws(7) == draws(7)
    assert draws(7) != draws(8)


def test_greedy_takes_the_largest_and_says_its_probability() -> None:
    logits = torch.tensor([0.0, 3.0, 1.0])
    token, logprob = choose(logits, torch.empty(0, dtype=torch.long), Sampling(), None)
    assert token == 1
    assert logprob == pytest.approx(float(logits.log_softmax(-1)[1]), abs=1e-6)


@pytest.mark.parametrize(
    "bad",
    [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 1.5}, {"min_p": -0.1}, {"repetition_penalty": 0.0}, {"temperature": float("nan")}],
)
def test_numbers_out_of_range_are_refused_by_name(bad: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(bad))):
        Sampling.checked(bad).check()


def test_nan_logits_are_refused() -> None:
    with pytest.raises(NumericsError):
        choose(torch.tensor([0.0, float("nan")]), torch.empty(0, dtype=torch.long), Sampling(), None)
