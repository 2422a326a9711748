"""The published SmolLM2-135M-Instruct (GGUF Q4_1) is transformers' own on real text, and stays so through save and reload."""

from __future__ import annotations

import lzma
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import transept
from tests.shared import shared
from transept.checkpoints.pull import pull
from transept.core.errors import SourceError
from transept.door import Model

transformers = pytest.importorskip("transformers")
TOKENS = 512
# transformers takes half a minute to read the file: once is enough
pytestmark = pytest.mark.xdist_group("smollm2")


@pytest.fixture(scope="module")
def path() -> Path:
    try:
        return pull("smollm2-135m-instruct")
    except SourceError as e:
        pytest.skip(f"the published model cannot be fetched here: {e}")


@pytest.fixture(scope="module")
def ours(path: Path) -> Model:
    return transept.load(path)


@pytest.fixture(scope="module")
def theirs(path: Path) -> Iterator[torch.nn.Module]:
    file = path if path.is_file() else next(path.glob("*.gguf"))
    yield transformers.AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def text() -> str:
    books = lzma.decompress(shared("gutenberg15/books.txt.xz").read_bytes()).decode()
    begin = books.index("It is a truth universally acknowledged")
    return books[begin : begin + 4000]


def perplexity(logits: torch.Tensor, ids: torch.Tensor) -> float:
    return math.exp(float(torch.nn.functional.cross_entropy(logits[:-1].double(), ids[1:])))


def check(ours: Model, reference: torch.Tensor, ids: torch.Tensor) -> None:
    with torch.inference_mode():
        logits = ours.model(ids[None]).logits[0]
    worst = float((logits - reference).abs().max())
    assert worst <= 1e-3, worst
    differ = (logits.argmax(-1) != reference.argmax(-1)).nonzero().flatten().tolist()
    for at in differ:
        # a proven tie: the two best of the reference lie closer than the arithmetic of either can tell
        best = reference[at].topk(2).values
        assert float(best[0] - best[1]) <= 2 * worst, f"position {at}: {best.tolist()}, largest difference {worst}"
    assert f"{perplexity(logits, ids):.3g}" == f"{perplexity(reference, ids):.3g}"
    assert abs(perplexity(logits, ids) / perplexity(reference, ids) - 1) < 5e-4


def test_equal_to_its_publisher_before_and_after_saving(ours: Model, theirs: torch.nn.Module, text: str, tmp_path: Path) -> None:
    ids = torch.tensor(ours.encode(text)[:TOKENS])
    assert len(ids) == TOKENS
    with torch.inference_mode():
        reference = theirs(ids[None]).logits[0]
    check(ours, reference, ids)

    transept.save(ours, tmp_path)
    again = transept.load(tmp_path)
    assert again.encode(text)[:TOKENS] == ids.tolist()
    check(again, reference, ids)
    assert all(torch.equal(a, b) for a, b in zip(ours.model.parameters(), again.model.parameters(), strict=True))

    back = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path), dtype=torch.float32).eval()
    with torch.inference_mode():
        assert torch.equal(back(ids[None]).logits[0], reference)


def test_answers_in_its_own_template(ours: Model, theirs: torch.nn.Module) -> None:
    ids = ours.chat_ids("What is the capital of France?")
    with torch.inference_mode():
        expected = theirs.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False)[0, len(ids) :].tolist()
    answer = ours.generate(ids, max_tokens=16)
    assert answer.ids == expected
    assert "Paris" in answer.text
