"""The plan beside the module on the published model: greedy text and logits of real prompts, and what 8-bit activations cost."""

from __future__ import annotations

import time

import pytest
import torch

from tests.counts import FULL, count
from tests.figures import record
from transept import native
from transept.checkpoints.load import describe
from transept.checkpoints.pull import pull
from transept.core.errors import SourceError
from transept.door import Model, load
from transept.inference import generation
from transept.inference.engine import Ask, Local
from transept.inference.plan import NativeRunner, StoredWeights
from transept.inference.rows import Row
from transept.inference.sampling import Sampling

pytestmark = pytest.mark.skipif(not native.available(), reason=f"the native core is not compiled here: {native.why_not()}")

ASKED = (
    "Why is the sky blue?",
    "Write a haiku about the sea in winter.",
    "What is the capital of Australia, and why is it not Sydney?",
    "Explain to a child how a seed becomes a tree.",
    "Give me three reasons to learn to swim.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Who wrote Pride and Prejudice?",
    "Summarise the story of Romeo and Juliet in two sentences.",
    "How do I boil an egg?",
    "What is the difference between weather and climate?",
)
BEGUN = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune,",
    "In the beginning God created the heaven and the earth. And the earth was",
    "Water boils at a lower temperature on a mountain because",
    "The three most important inventions of the nineteenth century were",
    "def quicksort(items):\n    ",
    "Once upon a time, in a village at the foot of a mountain, there lived",
    "To be, or not to be, that is the question:",
    "Dear Sir or Madam,\n\nI am writing to complain about",
    "The mitochondrion is the part of the cell that",
    "1, 1, 2, 3, 5, 8, 13,",
)


@pytest.fixture(scope="module")
def smollm2() -> Model:
    try:
        return load(pull("smollm2-135m-instruct"))
    except SourceError as e:
        pytest.skip(f"the published model cannot be fetched here: {e}")


@pytest.mark.reliability
@pytest.mark.timeout(3600)
def test_greedy_text_and_logits_are_the_module_s(smollm2: Model) -> None:
    """What the plan writes in the engine is, token by token, what the module finds most probable behind the same tokens; at full counts
    the module's own plain loop writes it too. All logits on the way agree, taken relative to the largest of them.
    """
    began, source = time.perf_counter(), describe(pull("smollm2-135m-instruct"))
    runner = NativeRunner(source.empty(), StoredWeights(source), pages=40, max_rows=256)
    engine = Local(runner, pages=39, page=16, context=512)
    prompts = [ids for asked, begun in zip(ASKED, BEGUN, strict=True) for ids in (smollm2.chat_ids(asked), smollm2.encode(begun))]
    chosen, new, module = prompts[: count(20)], 128 if FULL else 32, smollm2.look()
    bad, worst = 0, 0.0
    for ids in chosen:
        found = generation.last(engine.stream(Ask(prompt=ids, max_tokens=new))).ids
        whole = tuple([*ids, *found])
        with torch.inference_mode():
            theirs = module(torch.tensor([whole])).logits[0]
        wanted = theirs[len(ids) - 1 : -1].argmax(-1).tolist()
        if FULL:
            assert [step.id for step in generation.steps(module, ids, Sampling(), max_tokens=new, context=512)] == found
        bad += sum(a != b for a, b in zip(found, wanted, strict=True))
        pages = engine.reserve(len(whole))
        ours = torch.from_numpy(runner.run([Row(whole, 0, pages, len(whole))]))
        engine.release(pages)
        worst = max(worst, float((ours - theirs).abs().max() / theirs.abs().max()))
    total = len(chosen) * new
    record("greedy text of the plan", n_tried=total, n_ok=total - bad, n_bad=bad, seconds=time.perf_counter() - began)
    print(f"largest difference of a logit, beside the largest logit: {worst:.1e}")
    assert bad == 0 and worst <= 1e-5


TEXT = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife. "
    "However little known"
)


def test_activations_in_eight_bits_cost_little(smollm2: Model) -> None:
    """The test above holds the stored numbers in floats to the module; this one what `fast` may lose."""
    source = describe(pull("smollm2-135m-instruct"))
    ids = smollm2.encode(TEXT)
    runner = NativeRunner(source.empty(), StoredWeights(source), pages=8, fast=True)
    fast = torch.from_numpy(runner.run([Row(tuple(ids), 0, (0, 1, 2, 3), len(ids))]))
    with torch.inference_mode():
        want = smollm2.look()(torch.tensor([ids])).logits[0]
    p, q = want.log_softmax(-1), fast.log_softmax(-1)
    assert 0.0 < float((p.exp() * (p - q)).sum(-1).mean()) <= 0.01
