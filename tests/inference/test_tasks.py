"""The tasks at the door: MiniLM against transformers on real sentences, the heads against transformers' numbers or a plain search."""

from __future__ import annotations

import csv
import itertools
import lzma
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf

import transept
from tests.counts import count
from tests.parity.mirror import spread
from tests.shared import shared
from transept.checkpoints import pull
from transept.core.errors import InputError
from transept.door import Model


def minilm() -> Path:
    """The folder of the published sentence encoder; skips, saying why, where it has not been fetched."""
    found = pull.locate("minilm")
    if found is None:
        pytest.skip("needs all-MiniLM-L6-v2: transept pull minilm")
    return found


def sentences(number: int) -> list[str]:
    with lzma.open(shared("sts-benchmark-open/dev.tsv.xz"), "rt", encoding="utf-8") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        both = itertools.chain.from_iterable((row["sentence1"], row["sentence2"]) for row in rows)
        return list(itertools.islice(dict.fromkeys(text for text in both if text and text.strip()), number))


def small(tmp_path: Path, architecture: str, **changes: Any) -> tuple[Any, Model]:
    """A random tiny model of transformers with MiniLM's vocabulary, and the same one loaded here."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 30522,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
    }
    theirs = spread(getattr(tf, architecture)(tf.BertConfig(**{**sizes, **changes}))).eval()
    theirs.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copy(minilm() / name, tmp_path / name)
    return theirs, transept.load(tmp_path)


def tokenizer() -> Any:
    return tf.AutoTokenizer.from_pretrained(minilm())


def test_sentence_vectors_are_the_published_ones(tmp_path: Path) -> None:
    """Real sentences, one by one through transformers: cosine and the ten nearest neighbours; and again after saving and loading."""
    texts = sentences(max(200, count(1000)))
    assert len(texts) >= 200
    m, theirs, tok = transept.load(minilm()), tf.BertModel.from_pretrained(minilm()).eval(), tokenizer()
    with torch.no_grad():
        expected = torch.cat([F.normalize(theirs(**tok(text, return_tensors="pt")).last_hidden_state.mean(1), dim=-1) for text in texts])
    found = m.embed(texts)
    assert found.shape == expected.shape
    assert (found * expected).sum(1).min().item() >= 0.99999
    near = [(v @ v.T).fill_diagonal_(-1).topk(10) for v in (found, expected)]
    # Two neighbours may change places only where their similarities are equal to rounding.
    moved = near[0].indices != near[1].indices
    assert (near[0].values - near[1].values)[moved].abs().max().item() < 1e-6 if moved.any() else True
    transept.save(m, tmp_path)
    again = transept.load(tmp_path)
    assert again.pooling == m.pooling and m.pooling is not None and m.pooling.normalised
    assert (again.embed(texts[:20]) - found[:20]).abs().max().item() <= 1e-6
    assert all(torch.equal(a, b) for a, b in zip(again.model.state_dict().values(), m.model.state_dict().values(), strict=True))


def test_order_and_batch_change_nothing() -> None:
    m = transept.load(minilm())
    texts = ["One.", "A rather longer sentence about nothing at all, with a tail.", "Two words", "One.", "x " * 100]
    found = m.embed(texts, batch=2)
    alone = torch.cat([m.embed(text) for text in texts])
    assert (found - alone).abs().max() < 1e-6
    assert m.embed([]).shape[0] == 0


def test_a_long_text_is_refused_or_cut_aloud() -> None:
    m = transept.load(minilm())
    long = "word " * 300
    with pytest.raises(InputError, match="text 1 has 302 tokens.*256"):
        m.embed(["short", long])
    with pytest.warns(UserWarning, match="1 of 2 texts were cut to 256 tokens"):
        found = m.embed(["short", long], truncate=True)
    assert (found[1] - m.embed("word " * 254)[0]).abs().max() < 1e-6
    for empty in ("", "  "):
        with pytest.raises(InputError, match="empty"):
            m.embed([empty])


def test_masks_are_filled(tmp_path: Path) -> None:
    theirs, m = small(tmp_path, "BertForMaskedLM")
    text, tok = "Paris is the [MASK] of [MASK] today.", tokenizer()
    ids = tok(text, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = theirs(ids).logits[0, ids[0] == tok.mask_token_id].softmax(-1).topk(4)
    found = m.fill_mask(text, top=4)
    assert [[fill.id for fill in fills] for fills in found] == expected.indices.tolist()
    assert torch.allclose(torch.tensor([[fill.score for fill in fills] for fills in found]), expected.values, atol=1e-5)
    assert found[0][0].token == tok.convert_ids_to_tokens(found[0][0].id)
    with pytest.raises(InputError, match=r"\[MASK\]"):
        m.fill_mask("no mask here")
    with pytest.raises(InputError, match="question-answering form"):
        m.answer("who?", "nobody")


def test_texts_and_pairs_are_classified(tmp_path: Path) -> None:
    names = {0: "no", 1: "yes", 2: "maybe"}
    theirs, m = small(tmp_path, "BertForSequenceClassification", id2label=names, label2id={v: k for k, v in names.items()})
    tok, inputs = tokenizer(), ["a text", ("first text", "and the second, which is longer"), "another text of more words", ("x", "y")]
    found = m.classify(inputs, batch=2)
    for given, label in zip(inputs, found, strict=True):
        with torch.no_grad():
            expected = theirs(**tok(*((given,) if isinstance(given, str) else given), return_tensors="pt")).logits[0].softmax(-1)
        assert torch.allclose(torch.tensor(list(label.scores.values())), expected, atol=1e-5)
        assert label.label == names[int(expected.argmax())] and list(label.scores) == ["no", "yes", "maybe"]


def test_a_pair_task_refuses_one_text(tmp_path: Path) -> None:
    _, m = small(tmp_path, "BertForNextSentencePrediction")
    assert m.classify([("One.", "Two.")])[0].label in ("follows", "does not follow")
    with pytest.raises(InputError, match="text 0 stands alone"):
        m.classify(["One."])


def test_words_are_tagged_at_their_first_piece(tmp_path: Path) -> None:
    names = {i: f"T{i}" for i in range(5)}
    theirs, m = small(tmp_path, "BertForTokenClassification", id2label=names, label2id={v: k for k, v in names.items()})
    text, tok = "  Wolfgang Amadeus  unbelievabilities in Zürich, 1756 .", tokenizer()
    words = text.split()
    batch = tok(words, is_split_into_words=True, return_tensors="pt")
    with torch.no_grad():
        best = theirs(**batch).logits[0].argmax(-1).tolist()
    pieces = batch.word_ids(0)
    found = m.tag(text)
    assert [t.word for t in found] == words
    assert [t.label for t in found] == [names[best[pieces.index(i)]] for i in range(len(words))]
    assert all(text[t.start : t.end] == t.word for t in found)


@pytest.mark.parametrize("words", [12, 150])
def test_the_answer_is_the_best_span_of_all_windows(tmp_path: Path, words: int) -> None:
    """Against every pair of tokens in every window, tried one by one with transformers' scores; windows and marks made by its tokenizer."""
    theirs, m = small(tmp_path, "BertForQuestionAnswering")
    question, tok = "Which river is it?", tokenizer()
    rng = torch.Generator().manual_seed(words)
    stock = "the river Thames flows slowly through London and onwards to a cold sea".split()
    context = " ".join(stock[int(i)] for i in torch.randint(len(stock), (words,), generator=rng))
    windows = tok(
        question,
        context,
        truncation="only_second",
        max_length=64,
        stride=16,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        padding=True,
        return_tensors="pt",
    )
    offsets = windows.pop("offset_mapping")
    windows.pop("overflow_to_sample_mapping")
    assert (len(offsets) > 1) == (words > 100)
    with torch.no_grad():
        out = theirs(**windows)
    best = (-1e9, 0, 0)
    for w in range(len(offsets)):
        inside = [i for i, s in enumerate(windows.sequence_ids(w)) if s == 1]
        for i, j in itertools.product(inside, inside):
            if i <= j < i + 30:
                best = max(
                    best,
                    (float(out.start_logits[w, i] + out.end_logits[w, j]), int(offsets[w][i][0]), int(offsets[w][j][1])),
                    key=lambda x: x[0],
                )
    found = m.answer(question, context, stride=16)
    assert (found.start, found.end) == best[1:]
    assert found.text == context[found.start : found.end] and 0 < found.score <= 1
    with pytest.raises(InputError, match="empty"):
        m.answer(question, " ")
    with pytest.raises(InputError, match="question has"):
        m.answer("word " * 80, context)


def test_a_decoder_gives_features_by_the_same_call(tmp_path: Path) -> None:
    """Row 40: embed reads the states of a GPT before its head."""
    torch.manual_seed(0)
    theirs = spread(tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=30522, n_positions=64, n_embd=32, n_layer=1, n_head=4))).eval()
    theirs.save_pretrained(tmp_path)
    shutil.copy(minilm() / "tokenizer.json", tmp_path / "tokenizer.json")
    m, tok = transept.load(tmp_path), tokenizer()
    with torch.no_grad():
        expected = theirs.transformer(tok("a few words", return_tensors="pt").input_ids).last_hidden_state.mean(1)
    assert (m.embed("a few words") - expected).abs().max() < 1e-5
