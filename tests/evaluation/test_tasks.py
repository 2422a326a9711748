"""Perplexity and examples in the prompt against plain loops over transformers, and `transept eval` on every task."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import transept
from tests.counts import count
from tests.evaluation.test_metrics import glue_folder
from tests.parity.mirror import mirror
from tests.serving.tiny import decoder, encoder
from transept.cli.main import main
from transept.core.errors import InputError
from transept.evaluation.kshot import Wording, likeliest, shown
from transept.evaluation.perplexity import Foreseen, foresee, windows


@given(st.integers(2, 80), st.integers(2, 30), st.integers(1, 29))
@settings(max_examples=count(1000))
def test_windows_score_every_token_once(length: int, context: int, stride: int) -> None:
    if stride >= context:
        with pytest.raises(InputError, match="stride"):
            [*windows(length, context, stride)]
        return
    scored: list[int] = []
    for begin, end, new in windows(length, context, stride):
        assert 0 < end - begin <= context
        scored += range(end - new, end)
        # Every scored token has something before it, and all but the first ones as much as was asked for.
        assert end - new > begin and (begin == 0 or end - new - begin >= context - stride)
    assert scored == [*range(1, length)]


@pytest.mark.parametrize(("context", "stride"), [(64, None), (9, 4), (9, 1), (5, 3)])
def test_perplexity_is_a_loop_over_transformers(context: int, stride: int | None) -> None:
    m = mirror("GPT2LMHeadModel", tf.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    ids = m.ids(1, 40)[0].tolist()
    total = 0.0
    with torch.no_grad():
        for begin, end, new in windows(len(ids), context, stride or context // 2):
            logits = m.theirs(torch.tensor([ids[begin:end]])).logits[0].log_softmax(-1)
            total -= sum(float(logits[i - 1 - begin, ids[i]]) for i in range(end - new, end))
    nats, many = foresee(m.ours.model, ids, context=context, stride=stride, batch=3)
    assert many == 39 and nats == pytest.approx(total, rel=1e-5)
    if context > len(ids):
        loss = float(m.theirs(torch.tensor([ids]), labels=torch.tensor([ids])).loss.detach())
        assert Foreseen(nats, many, 10).perplexity == pytest.approx(math.exp(loss), rel=1e-5)


def test_bits_per_byte() -> None:
    """A model that gives each of 256 bytes the same chance needs eight bits for each, whatever a token is."""
    assert Foreseen(100 * math.log(256), 100, 100).bits_per_byte == pytest.approx(8)
    assert Foreseen(50 * math.log(65536), 50, 100).bits_per_byte == pytest.approx(8)
    with pytest.raises(InputError, match="two or more"):
        foresee(torch.nn.Linear(1, 1), [3], context=8)


def test_likeliest_answer_is_a_loop_over_transformers() -> None:
    m = mirror("GPT2LMHeadModel", tf.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    prompt, answers = m.ids(1, 9)[0].tolist(), [[5], [7, 8, 9], [11, 12]]
    for start in range(20):
        prompt = m.ids(1, 9, start)[0].tolist()
        scores = []
        for a in answers:
            with torch.no_grad():
                logp = m.theirs(torch.tensor([[*prompt, *a]])).logits[0].log_softmax(-1)
            scores.append(sum(float(logp[len(prompt) - 1 + i, token]) for i, token in enumerate(a)) / len(a))
        assert likeliest(m.ours.model, prompt, answers) == scores.index(max(scores))


def test_shown_examples_are_balanced() -> None:
    examples = [(f"text {i}", str(i % 2)) for i in range(20)]
    for seed in range(10):
        found = shown(examples, 6, seed)
        assert len({*found}) == 6 and Counter(label for _, label in found) == {"0": 3, "1": 3} and found == shown(examples, 6, seed)
    assert len({tuple(shown(examples, 6, seed)) for seed in range(10)}) == 10
    with pytest.raises(InputError, match="too few"):
        shown(examples[:4], 6, 0)
    wording = Wording({"0": "bad", "1": "good"})
    assert wording.prompt([("fine", "1")], "dull") == "Review: fine\nSentiment: good\n\nReview: dull\nSentiment:"


def answered(capsys: Any, *line: str) -> dict[str, Any]:
    assert main(["eval", *line, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_command(tmp_path: Path, capsys: Any) -> None:
    model = str(decoder(tmp_path / "lm"))
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 5)
    found = answered(capsys, "perplexity", model, "--data", str(tmp_path / "text.txt"))
    m = transept.load(model)
    ids = torch.tensor([m.tokenizer.encode((tmp_path / "text.txt").read_text(), specials=False)])  # type: ignore[union-attr]
    with_start = torch.cat((torch.tensor([[m.tokenizer.bos_id]]), ids), 1)  # type: ignore[union-attr]
    theirs: Any = tf.LlamaForCausalLM.from_pretrained(model).eval()
    loss = float(theirs(with_start, labels=with_start).loss.detach())
    assert found["tokens"] == ids.shape[1] and found["bytes"] == 225
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert found["bits per byte"] == pytest.approx(loss * found["tokens"] / math.log(2) / 225, rel=1e-4)
    (tmp_path / "rows.tsv").write_text("text\tlabel\n" + "".join(f"the fox {i}\t{i % 2}\n" for i in range(12)))
    found = answered(capsys, "kshot", model, "--data", *[str(tmp_path / "rows.tsv")] * 2, "--shots", "2", "--limit", "5")
    assert 0 <= found["accuracy"] <= 100 and found["questions"] == 5

    classifier = str(encoder(tmp_path / "classifier", "BertForSequenceClassification"))
    folder = glue_folder(tmp_path)
    assert main(["eval", "glue", f"sst2={classifier}", "--data", str(folder)]) == 1
    assert "classes no, yes are not those of sst2: 0, 1" in capsys.readouterr().err
    record = json.loads((Path(classifier) / "config.json").read_text())
    (Path(classifier) / "config.json").write_text(json.dumps({**record, "id2label": {"0": "0", "1": "1"}, "label2id": {"0": 0, "1": 1}}))
    found = answered(capsys, "glue", f"sst2={classifier}", f"mrpc={classifier}", "--data", str(folder))
    assert set(found["yours (dev)"]) == {"sst2", "mrpc"} and found["BERT-base (test)"]["average"] == pytest.approx(79.6, abs=0.05)
    label = transept.load(classifier).classify(["fine", "bad"])
    assert found["yours (dev)"]["sst2"] == 50.0 * sum(x.label == true for x, true in zip(label, "10", strict=True))

    answerer = str(encoder(tmp_path / "answerer", "BertForQuestionAnswering"))
    paragraph = {"context": "a dog ran", "qas": [{"id": "1", "question": "who ran?", "answers": [{"text": "dog", "answer_start": 2}]}]}
    (tmp_path / "squad.json").write_text(json.dumps({"data": [{"title": "x", "paragraphs": [paragraph]}]}))
    found = answered(capsys, "squad", answerer, "--data", str(tmp_path / "squad.json"))
    assert 0 <= found["exact match"] <= found["F1"] <= 100 and found["questions"] == 1


def test_command_says_what_is_wrong(tmp_path: Path, capsys: Any) -> None:
    model = str(decoder(tmp_path / "lm"))
    (tmp_path / "rows.tsv").write_text("one\t1\ntwo\n")
    (tmp_path / "bytes.txt").write_bytes(b"a\xff")
    rows = str(tmp_path / "rows.tsv")
    for line, words in (
        (["perplexity", model, "--data", str(tmp_path / "rows.tsw")], "nearest: 'rows.tsv'"),
        (["perplexity", model, "--data", str(tmp_path / "bytes.txt")], "not UTF-8 at byte 1"),
        (["kshot", model, "--data", rows, rows], "rows.tsv:2: 1 columns"),
        (["bleu", model, "--data", rows], "two files"),
        (["glue", model, "--data", str(tmp_path)], "TASK=MODEL"),
        (["glue", f"sst={model}", "--data", str(tmp_path)], "nearest: 'sst2'"),
    ):
        assert main(["eval", *line]) == 1
        assert words in capsys.readouterr().err
