"""Choosing tokens: equal to transformers' processors, fair, and the same for the same seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from transept.core.errors import InputError, NumericsError
from transept.inference.sampling import Sampling, choose, kept, penalise

warpers = pytest.importorskip("transformers.generation.logits_process")


@given(
    seed=st.integers(0, 10_000),
    temperature=st.floats(0.1, 3.0),
    top_k=st.none() | st.integers(1, 60),
    top_p=st.none() | st.floats(0.05, 0.999),
    min_p=st.none() | st.floats(0.01, 0.5),
    penalty=st.floats(0.5, 2.0),
    vocab=st.sampled_from([50, 700, 5000]),
)
def test_processors_are_those_of_transformers(
    seed: int, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None, penalty: float, vocab: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, seen = torch.randn(vocab, generator=generator) * 4, torch.randint(0, vocab, (9,), generator=generator)
    expected = warpers.RepetitionPenaltyLogitsProcessor(penalty)(seen[None], logits[None].clone())
    expected = warpers.TemperatureLogitsWarper(temperature)(seen[None], expected)
    if top_k is not None:
        expected = warpers.TopKLogitsWarper(top_k)(seen[None], expected)
    if top_p is not None:
        expected = warpers.TopPLogitsWarper(top_p)(seen[None], expected)
    if min_p is not None:
        expected = warpers.MinPLogitsWarper(min_p)(seen[None], expected)
    found, weights = kept(penalise(logits, seen, penalty), Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p))
    ids = np.arange(vocab)[found]
    assert ids.tolist() == expected[0].isfinite().nonzero()[:, 0].tolist()
    torch.testing.assert_close(torch.from_numpy(weights / weights.sum()), expected[0].softmax(-1)[ids], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("s", [{"top_p": 0.0}, {"top_p": 0.3}, {"top_p": 0.999}, {"top_k": 3}, {"min_p": 1.0}, {"top_k": 2, "top_p": 0.5}])
def test_equal_scores(s: dict[str, float]) -> None:
    """As many of equal tokens stay as in transformers; something always stays."""
    logits = torch.tensor([1.0] * 200 + [-torch.inf] * 100)
    expected = logits[None]
    for name, kind in (("top_k", warpers.TopKLogitsWarper), ("top_p", warpers.TopPLogitsWarper), ("min_p", warpers.MinPLogitsWarper)):
        expected = kind(s[name])(torch.zeros(1, 0), expected) if name in s else expected
    found, weights = kept(logits, Sampling(temperature=1.0, **s))
    ids = np.arange(300)[found]
    known = expected[0].isfinite().nonzero()[:, 0].tolist()
    assert len(known) == int((weights > 0).sum()) > 0 and (set(known) == set(ids[weights > 0].tolist()) or "top_p" in s)


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -3.0])
    s = Sampling(temperature=1.0, seed=3)
    generator, none = s.generator(), torch.empty(0, dtype=torch.long)
    n = 20_000
    counts = torch.bincount(torch.tensor([choose(logits, none, s, generator)[0] for _ in range(n)]), minlength=5)
    expected = logits.softmax(-1) * n
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    assert chi2 < 18.47, chi2  # 4 degrees of freedom, p = 0.001


@pytest.mark.parametrize("vocab", [1, 5, 64, 1000])
def test_a_draw_is_where_the_cumulated_probability_passes_the_random_number(vocab: int) -> None:
    """Also at both ends, and never a token that cannot be."""
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(vocab)) * 3
    logits[vocab // 2 + 1 :: 3] = -torch.inf
    mass = logits.double().softmax(-1).cumsum(-1)

    class Told(np.random.RandomState):
        share = 0.0

        def random_sample(self, size: None = None) -> float:  # type: ignore[override]
            return self.share

    told = Told()
    for share in [0.0, 1.0 - 2.0**-53, *torch.rand(200, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).tolist()]:
        told.share = share
        token, _ = choose(logits, [], Sampling(temperature=1.0), told)
        below = float(mass[token - 1]) if token else 0.0
        assert below - 1e-6 <= share <= float(mass[token]) + 1e-6 and logits[token].isfinite()


def test_the_coldest_temperature_is_greedy() -> None:
    logits = torch.tensor([0.0, 3.0, 1.0, 2.9999])
    assert choose(logits, [], Sampling(temperature=1e-300), np.random.RandomState(0))[0] == 1


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
