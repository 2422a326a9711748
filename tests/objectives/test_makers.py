"""What prepares samples and what no published loss covers: counted, taken apart, or compared with a plain loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.counts import count
from transept.core.batch import Draw
from transept.core.errors import ConfigError, InputError
from transept.core.registry import family
from transept.training.objective import Sum
from transept.training.objectives import denoising, pairs
from transept.training.objectives.causal import Causal, answer
from transept.training.objectives.in_context import Contexts, InContext, Skill
from transept.training.objectives.losses import IGNORE, row_means, stacked
from transept.training.objectives.masked import Masked, Masking
from transept.training.objectives.pretraining import Summed
from transept.training.objectives.replaced import filled
from transept.training.objectives.seq2seq import Seq2Seq, shifted
from transept.training.objectives.vectors import Cooccurrence, Negatives

texts = st.lists(st.integers(0, 50), min_size=2, max_size=60)
seeds = st.integers(0, 2**31)


def draw(seed: int) -> torch.Generator:
    return Draw(seed, 0, 0).generator()


def tiny(name: str, size: str) -> Any:
    page = family(name)
    return page.build(page.tiny[size]).eval()


@pytest.mark.parametrize("rate", [0.05, 0.15, 0.4, 0.8])
def test_masking_frequencies(rate: float) -> None:
    """Within three standard deviations on a million tokens (row 54), special ones never chosen."""
    n, vocab = 1_000_000, 1000
    ids = torch.randint(10, vocab, (n,))
    special = torch.rand(n) < 0.1
    read, labels = Masking(mask_id=3, vocab=vocab, rate=rate)(ids, ~special, draw(1))
    chosen = labels != IGNORE
    assert not (chosen & special).any() and torch.equal(labels[chosen], ids[chosen]) and torch.equal(read[~chosen], ids[~chosen])

    def near(found: Tensor, of: Tensor, share: float) -> None:
        total = int(of.sum())
        assert abs(int((found & of).sum()) - share * total) <= 3 * (total * share * (1 - share)) ** 0.5

    near(chosen, ~special, rate)
    # A random word is the true one once in `vocab` times, and the mask itself as often.
    near(read == 3, chosen, 0.8 + 0.1 / vocab)
    near(read == ids, chosen, 0.1 + 0.1 / vocab)


def test_masking_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ConfigError, match="shares"):
        Masking(mask_id=0, vocab=10, hidden=0.8, random=0.3)


@pytest.mark.parametrize("window", [1, 3, 7, 30])
def test_context_window_is_honoured(window: int) -> None:
    """Row 72: the loop of the equation, each token given the k before it and no more."""
    model = tiny("llama", "gqa")
    batch = stacked([{"ids": torch.randint(96, (n,)).tolist()} for n in (12, 9, 5)])
    found = Causal(window)(model, batch)
    total, many = torch.zeros(()), 0
    for row, real in zip(batch["ids"], batch["mask"], strict=True):
        text = row[real]
        for i in range(1, len(text)):
            before = text[max(0, i - window) : i]
            total -= model(before[None]).logits[0, -1].log_softmax(-1)[text[i]]
            many += 1
    assert int(found.count) == many
    torch.testing.assert_close(found.loss, total, atol=1e-4, rtol=1e-5)


def test_answers_need_room() -> None:
    assert answer([1, 2], [3, 4, 5], 4) == {"ids": [1, 2, 3, 4], "labels": [IGNORE, IGNORE, 3, 4]}
    with pytest.raises(InputError, match="no room"):
        answer([1, 2, 3], [4], 3)
    with pytest.raises(InputError, match="nearest"):
        Masked()(tiny("bert", "two"), {"ids": torch.ones(1, 3, dtype=torch.long), "label": torch.ones(1, 3)})


@given(texts, seeds)
@settings(max_examples=count(1000))
def test_spans_put_back_give_the_text(text: list[int], seed: int) -> None:
    """T5: filling each sentinel of the source by what the target says of it gives the text; a seventh of it is gone."""
    sentinels = range(100, 140)
    source, target = denoising.spans(text, sentinels, 99, draw(seed))
    assert source.pop() == 99 and target.pop() == 99
    said: dict[int, list[int]] = {}
    for token in target:
        if token >= 100:
            said[token] = []
        else:
            said[[*said][-1]].append(token)
    assert [t for token in source for t in said.get(token, [token])] == text
    assert sum(map(len, said.values())) == min(max(round(0.15 * len(text)), 1), len(text) - 1)
    assert said.popitem()[1] == [] and all(said.values())


@given(texts, seeds)
@settings(max_examples=count(1000))
def test_infilling_keeps_the_rest_in_order(text: list[int], seed: int) -> None:
    """BART: between the masks stand pieces of the text in their order, and at most the share asked for is gone."""
    read = denoising.infilled(text, 99, draw(seed))
    kept = [token for token in read if token != 99]
    rest = iter(text)
    assert all(token in rest for token in kept)
    assert len(text) - len(kept) <= round(0.3 * len(text))


def test_infilled_spans_are_as_long_as_asked() -> None:
    """Of long texts about 30 % are gone, and a mask stands for about three tokens (fewer where spans of length 0 are put in)."""
    text, gone, masks = list(range(100, 1100)), 0, 0
    for seed in range(10):
        read = denoising.infilled(text, 99, draw(seed))
        masks += read.count(99)
        gone += len(text) - (len(read) - read.count(99))
    assert 0.27 < gone / 10_000 <= 0.30 and 2.2 < gone / masks < 3.3


def test_sentences_are_permuted() -> None:
    sentences = [[1, 2], [3], [4, 5, 6], [7]]
    seen = {tuple(denoising.permuted(sentences, draw(seed))) for seed in range(40)}
    assert len(seen) > 10 and all(sorted(s) == [1, 2, 3, 4, 5, 6, 7] for s in seen)


def test_pairs_follow_half_of_the_time() -> None:
    documents = [[[d, s] for s in range(5)] for d in range(4)]
    found = [pairs.following(documents, 1, 2, draw(seed)) for seed in range(2000)]
    for first, second, label in found:
        assert first == [1, 2] and (second == [1, 3] if label == 0 else second[0] != 1)
    assert abs(sum(label for *_, label in found) - 1000) <= 3 * (2000 / 4) ** 0.5
    assert {second[0] for _, second, label in found if label} == {0, 2, 3}
    with pytest.raises(InputError, match="next one"):
        pairs.following(documents, 1, 4, draw(0))
    orders = [pairs.ordered([1], [2], draw(seed)) for seed in range(2000)]
    assert {tuple(map(tuple, o[:2])): o[2] for o in orders} == {((1,), (2,)): 0, ((2,), (1,)): 1}
    assert abs(sum(o[2] for o in orders) - 1000) <= 3 * (2000 / 4) ** 0.5


def test_joined_pairs() -> None:
    """[CLS] a [SEP] b [SEP], the longer text shortened first (row 53)."""
    assert pairs.joined([1, 2], [3], 8, 9, 20) == {"ids": [8, 1, 2, 9, 3, 9], "segments": [0, 0, 0, 0, 1, 1]}
    assert pairs.joined([1, 2, 3, 4, 5], [6, 7], 8, 9, 7)["ids"] == [8, 1, 2, 9, 6, 7, 9]
    assert pairs.similar([1], [2], 7, 8, 9) == ({"ids": [7, 1, 8, 2, 9]}, {"ids": [7, 2, 8, 1, 9]})


def test_words_are_drawn_as_the_generator_says() -> None:
    """The same noise draws the same words, and over many draws their shares are the generator's probabilities."""
    n = 200_000
    guess = torch.tensor([0.5, 0.1, 0.25, 0.15]).log().expand(1, n, 4)
    ids, labels = torch.full((1, n), 9), torch.zeros(1, n, dtype=torch.long)
    noise = torch.rand(1, n)
    read, replaced = filled(guess, ids, labels, noise)
    assert torch.equal(read, filled(guess, ids, labels, noise)[0]) and torch.equal(replaced, read != 0)
    for word, share in enumerate((0.5, 0.1, 0.25, 0.15)):
        assert abs(int((read == word).sum()) - share * n) <= 4 * (n * share * (1 - share)) ** 0.5
    kept, none = filled(guess, ids, torch.full((1, n), IGNORE), noise)
    assert torch.equal(kept, ids) and not none.any()


def test_contexts_show_one_rule() -> None:
    """Row 77: every row's answers follow from its own examples: a sum with one constant, one dictionary, one order."""
    contexts, seen = Contexts(symbols=6, shots=20), set()
    for seed in range(60):
        row = contexts.sample(draw(seed))
        skill = [*Skill][int(row["ids"][0]) - 8]
        seen.add(skill)
        examples = row["ids"][1:].view(20, 6)
        assert (examples[:, 2] == 6).all() and (examples[:, 5] == 7).all() and int(row["ids"].max()) < contexts.vocab
        assert torch.equal(row["labels"][1:].view(20, 6)[:, 3:5], examples[:, 3:5]) and int((row["labels"] != IGNORE).sum()) == 40
        rule: dict[Any, Any] = {}
        for a, b, _, y, z, _ in examples.tolist():
            match skill:
                case Skill.ARITHMETIC:
                    assert y == z and rule.setdefault("c", (y - a - b) % 6) == (y - a - b) % 6
                case Skill.TRANSLATION:
                    assert rule.setdefault(a, y) == y and rule.setdefault(b, z) == z
                case Skill.CORRECTION:
                    assert sorted((a, b)) == sorted((y, z)) and rule.setdefault(frozenset((a, b)), (y, z)) == (y, z)
    assert seen == set(Skill)


def test_accuracy_by_examples_seen() -> None:
    contexts = Contexts(symbols=6, shots=4)

    class Perfect(nn.Module):
        def forward(self, ids: Tensor, mask: Tensor | None = None) -> Any:
            told = torch.cat((ids[:, 1:], batch["ids"][:, -1:]), 1)
            wrong = F.one_hot(told, contexts.vocab).float() * 9
            wrong[:, :12] = 0
            return type("Out", (), {"logits": wrong})

    batch = stacked([contexts.sample(draw(seed)) for seed in range(8)])
    found = InContext(contexts)(Perfect(), batch)
    shares = [float(a / b) for a, b in (m for m in found.metrics.values() if isinstance(m, tuple))]
    assert shares[2:] == [1.0, 1.0] and max(shares[:2]) < 1.0 and int(found.count) == 8 * 4 * 2


def test_word_vectors_are_counted() -> None:
    page = family("word2vec")
    for way in page.tiny:
        model = page.build(page.tiny[way])
        nn.init.normal_(model.context.weight)
        batch = {"centre": torch.randint(40, (9,)), "near": torch.randint(40, (9, 4)), "real": torch.rand(9, 4) < 0.7,
                 "negatives": torch.randint(40, (9, 3))}  # fmt: skip
        assert int(splits_alike(Negatives(), model, batch).count) == int(batch["real"].sum())
    glove = family("glove").build(family("glove").tiny["one"])
    cells = {"i": torch.randint(40, (9,)), "j": torch.randint(40, (9,)), "times": torch.rand(9) * 100 + 1}
    assert splits_alike(Cooccurrence(), glove, cells).count == 9


def splits_alike(objective: Callable[[nn.Module, dict[str, Tensor]], Sum], model: nn.Module, batch: dict[str, Tensor]) -> Sum:
    """The sums of any split are the whole's, loss and gradients; returns the whole's."""
    whole = objective(model, batch)
    whole_grads = torch.autograd.grad(whole.loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    size = len(next(iter(batch.values())))
    for cut in (1, size // 2, size - 1):
        parts = [objective(model, {k: v[part] for k, v in batch.items()}) for part in (slice(0, cut), slice(cut, size))]
        torch.testing.assert_close(parts[0].loss + parts[1].loss, whole.loss, atol=1e-5, rtol=1e-5)
        assert int(parts[0].count + parts[1].count) == int(whole.count)
        grads = torch.autograd.grad(parts[0].loss + parts[1].loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
        for a, b in zip(whole_grads, grads, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    return whole


def test_every_split_gives_the_same_sum() -> None:
    ids, labels = torch.randint(96, (4, 9)), torch.randint(96, (4, 9)).masked_fill(torch.rand(4, 9) < 0.7, IGNORE)
    mask = torch.arange(9) < torch.tensor([9, 7, 9, 4])[:, None]
    batch = {"ids": ids, "mask": mask, "labels": labels.masked_fill(~mask, IGNORE)}
    splits_alike(Masked(), family("bert").published[1].build(family("bert").tiny["two"]), batch)  # type: ignore[misc]
    splits_alike(Summed(), tiny("bert", "two"), {**batch, "next": torch.tensor([0, 1, 1, 0])})
    splits_alike(Causal(), tiny("gpt", "gpt2"), batch)
    splits_alike(Causal(4), tiny("gpt", "gpt2"), {"ids": ids, "mask": mask})
    rows = stacked([shifted(ids[i, : 9 - i].tolist(), ids[i, : 5 + i].tolist(), 1, 2) for i in range(4)])
    splits_alike(Seq2Seq(0.1), tiny("transformer", "2017"), rows)


def test_rows_of_unlike_length() -> None:
    batch = stacked([{"ids": [1, 2, 3], "labels": [4, 5, 6], "next": 1}, {"ids": [1], "labels": [7], "next": 0}])
    assert batch["ids"].tolist() == [[1, 2, 3], [1, 0, 0]] and batch["labels"].tolist() == [[4, 5, 6], [7, IGNORE, IGNORE]]
    assert batch["mask"].tolist() == [[True] * 3, [True, False, False]] and batch["next"].tolist() == [1, 0]
    assert "mask" not in stacked([{"ids": [1]}, {"ids": [2]}])
    found = row_means(torch.tensor([[1.0, 5.0], [2.0, 3.0]]), torch.tensor([[True, False], [False, False]]))
    assert found.tolist() == [1.0, 0.0]
    with pytest.raises(InputError, match="one sample"):
        stacked([])
