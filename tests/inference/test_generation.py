"""The plain loop: limits, stop strings across tokens, chunks, seeds."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from transept.core.errors import ConfigError, InputError
from transept.core.registry import family
from transept.door import Model
from transept.inference import generation
from transept.inference.generation import StopScanner
from transept.inference.sampling import Sampling


def tiny(label: str = "gqa") -> Model:
    fam = family("llama")
    torch.manual_seed(1)
    model = fam.build(fam.tiny[label]).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return Model(model, fam, None, fam.tiny[label])


class Letters:
    """A tokenizer's stream in which id i is the letter i."""

    def push(self, ids: int | Sequence[int], /) -> str:
        return "".join(chr(97 + i % 26) for i in ([ids] if isinstance(ids, int) else ids))

    def finish(self) -> str:
        return ""


def test_greedy_is_the_argmax_of_the_uncached_model() -> None:
    m = tiny()
    ids = [3, 14, 15, 92]
    for _ in range(20):
        with torch.inference_mode():
            ids.append(int(m.model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert m.generate([3, 14, 15, 92], max_tokens=20).ids == ids[4:]


@given(chunk=st.integers(1, 40))
def test_chunks_of_the_prompt_change_nothing(chunk: int) -> None:
    m = tiny()
    prompt = torch.randint(0, 96, (40,), generator=torch.Generator().manual_seed(5)).tolist()
    whole = list(generation.steps(m.model, prompt, Sampling(), max_tokens=5))
    parts = list(generation.steps(m.model, prompt, Sampling(), max_tokens=5, chunk=chunk))
    assert [s.id for s in whole] == [s.id for s in parts]
    assert max(abs(a.logprob - b.logprob) for a, b in zip(whole, parts, strict=True)) < 2e-5


def test_the_context_is_a_limit_with_both_numbers() -> None:
    m = tiny()
    with pytest.raises(InputError, match=r"65 tokens.*context is 64"):
        m.generate([1] * 65)
    at_end = m.generate([1] * 60, max_tokens=50)
    assert len(at_end.ids) == 4 and at_end.finish_reason == "length"
    assert m.generate([1] * 64, max_tokens=5).ids == []


def test_empty_prompts_and_unknown_options_are_refused() -> None:
    m = tiny()
    with pytest.raises(InputError, match="empty"):
        m.generate([])
    with pytest.raises(ConfigError, match="temperature"):
        m.generate([1], temprature=1.0)
    with pytest.raises(InputError, match="vocabulary of 96"):
        m.generate([96])


def test_the_same_seed_gives_the_same_text() -> None:
    m = tiny()
    one, two, other = (m.generate([5, 6], max_tokens=30, temperature=1.5, seed=s).ids for s in (11, 11, 12))
    assert one == two and one != other


@given(text=st.text("ab", max_size=30), stop=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), cut=st.integers(1, 5))
def test_stop_strings_across_pieces(text: str, stop: list[str], cut: int) -> None:
    scanner, shown, met = StopScanner(stop), "", False
    for i in range(0, len(text), cut):
        piece, met = scanner.feed(text[i : i + cut])
        shown += piece
        if met:
            break
    if not met:
        shown += scanner.end()
    # the earliest end of a stop string within what was fed, by a naive scan over prefixes
    ends = [n for n in range(1, len(text) + 1) if any(text[:n].endswith(s) for s in stop)]
    assert met == bool(ends)
    assert text.startswith(shown)
    assert not any(s in shown for s in stop)
    if not met:
        assert shown == text


def test_a_stream_is_the_whole_text_and_ends_with_its_reason() -> None:
    m = tiny()
    steps = list(generation.steps(m.model, [1, 2, 3], Sampling(), max_tokens=12))
    text = "".join(chr(97 + s.id % 26) for s in steps)
    stop = text[5:8]
    pieces = list(generation.stream(iter(steps), Letters(), prompt_tokens=3, ends=(), stop=(stop,)))
    final = pieces[-1].final
    assert final is not None and final.finish_reason == "stop"
    assert final.text == text[: text.index(stop)] == "".join(p.text for p in pieces)
    ended = generation.last(generation.stream(iter(steps), Letters(), prompt_tokens=3, ends=(steps[4].id,)))
    first = [s.id for s in steps].index(steps[4].id)
    assert ended.finish_reason == "stop" and ended.text == text[:first] and ended.usage.completion_tokens == first + 1


def test_beams_find_at_least_what_greedy_finds() -> None:
    m = tiny()

    def score(new: list[int]) -> float:
        with torch.inference_mode():
            logp = m.model(torch.tensor([[7, 8, *new]])).logits[0].log_softmax(-1)
        return float(sum(logp[1 + i, t] for i, t in enumerate(new))) / len(new)

    greedy, best = m.generate([7, 8], max_tokens=8).ids, m.generate([7, 8], max_tokens=8, beams=5).ids
    assert score(best) >= score(greedy) - 1e-6
