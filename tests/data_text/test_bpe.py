"""Training a byte-level BPE, and the few-shot prompt helper."""

from __future__ import annotations

import doctest
import lzma
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tests.counts import count
from tests.shared import shared
from transept.core.errors import InputError, TokenizerError
from transept.data.text import prompts
from transept.data.text.bpe import train_bpe
from transept.data.text.prompts import Shots

TEXT = "the lower the lowest, the newer the newest; low and lower\n" * 20


def pairs_by_hand(words: dict[tuple[str, ...], int], steps: int) -> list[tuple[str, str]]:
    """Algorithm 1 of Sennrich et al. 2016: merge the most frequent pair, again and again."""
    merges = []
    for _ in range(steps):
        seen: dict[tuple[str, str], int] = {}
        for word, n in words.items():
            for pair in zip(word, word[1:], strict=False):
                seen[pair] = seen.get(pair, 0) + n
        best = max(seen.values())
        if list(seen.values()).count(best) > 1:
            break
        pair = next(p for p, n in seen.items() if n == best)
        merges.append(pair)
        merged = {}
        for word, n in words.items():
            out: list[str] = []
            for letter in word:
                out[-1:] = [out[-1] + letter] if out and (out[-1], letter) == pair else [*out[-1:], letter]
            merged[tuple(out)] = n
        words = merged
    return merges


def test_merges_are_the_algorithms() -> None:
    ours = train_bpe("xy" + " xy" * 7 + " abc" * 3 + " abd" * 2 + " zab", vocab=300)
    words = {("x", "y"): 1, ("Ġ", "x", "y"): 7, ("Ġ", *"abc"): 3, ("Ġ", *"abd"): 2, ("Ġ", *"zab"): 1}
    expected = pairs_by_hand(words, 5)
    found = [tuple(merge) for merge in ours.source["model"]["merges"]]
    assert len(expected) == 5 and found[:5] == expected


@given(st.text(max_size=80))
@settings(max_examples=count(2000), deadline=None)
def test_any_text_comes_back(text: str) -> None:
    assert OURS.decode(OURS.encode(text)) == text


OURS = train_bpe(TEXT, vocab=300)


def test_gpt3s_size_on_real_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(lzma.decompress(shared("tinyshakespeare/input.txt.xz").read_bytes()))
    ours = train_bpe(path, vocab=2000)
    assert ours.vocab_size == 2000 and ours.token(1999) == "<|endoftext|>" and ours.eos_ids == (1999,)
    text = path.read_text()[:20_000] + " مرحبا \U0001f999"
    ids = ours.encode(text)
    assert ours.decode(ids) == text and len(ids) < len(text) / 2
    ours.save(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")(text).input_ids == ids


def test_a_small_text_gives_what_it_can() -> None:
    assert 256 < train_bpe("one line", vocab=50257).vocab_size < 270
    assert train_bpe(["a"], vocab=257).decode(OURS.encode("é")) == "é"


def test_bad_requests_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("")
    (tmp_path / "latin").write_bytes(b"caf\xe9 " * 10)
    for texts, vocab, specials, word in (
        ("", 300, (), "no text"),
        ([], 300, (), "no text"),
        (tmp_path / "empty", 300, (), "no text"),
        (tmp_path / "absent", 300, (), "no such file"),
        (tmp_path / "latin", 300, (), "UTF-8"),
        ("abc", 256, ("<s>",), "257"),
        ("abc", 300, ("<s>", "<s>"), "specials"),
    ):
        with pytest.raises(TokenizerError, match=word):
            train_bpe(texts, vocab, specials)


def test_shots_are_written_as_in_the_paper() -> None:
    assert doctest.testmod(prompts).failed == 0
    task = Shots("Add:", [("1+1", "2"), ("2+2", "4"), ("3+3", "6")], arrow=" = ")
    assert task.prompt("4+4") == "Add:\n4+4 ="
    assert task.prompt("4+4", shots=1) == "Add:\n1+1 = 2\n4+4 ="
    assert task.prompt("1+1", shots=2) == "Add:\n2+2 = 4\n3+3 = 6\n1+1 ="
    assert task.prompt("4+4", shots=3, seed=1) == task.prompt("4+4", shots=3, seed=1)
    assert len({task.prompt("4+4", shots=2, seed=seed) for seed in range(20)}) > 2
    with pytest.raises(InputError, match="shots is 4"):
        task.prompt("4+4", shots=4)
    with pytest.raises(InputError, match="empty"):
        task.prompt("")
