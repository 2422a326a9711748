"""`transept embed`, `fill`, `translate` and `search` as somebody runs them, right and wrong: one sentence, an exit code, no traceback."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import transept
from tests.cli.test_commands import run
from tests.parity.mirror import spread
from transept.core.registry import family
from transept.door import Model

CORPUS = ["the house is small", "a big dog runs in the street", "das Haus ist klein", "ein Hund rennt", "[ ] of France is Paris ."] * 20
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 40}


def words(folder: Path, kind: str) -> Any:
    """A trained little tokenizer, BERT's kind or Marian's, saved as transformers saves it."""
    if kind == "bert":
        names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.pre_tokenizer, made.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
        made.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=120, special_tokens=names))
        made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
        keys = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    else:
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        made.train_from_iterator(
            CORPUS, trainers.UnigramTrainer(vocab_size=90, special_tokens=["</s>", "<unk>", "<pad>"], unk_token="<unk>")
        )
        made.post_processor = processors.TemplateProcessing(single="$A </s>", pair="$A $B </s>", special_tokens=[("</s>", 0)])
        keys = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"}
    fast = tf.PreTrainedTokenizerFast(tokenizer_object=made, **keys)
    fast.save_pretrained(folder)
    return fast


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BERT with its masked-word head."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    spread(tf.BertForMaskedLM(tf.BertConfig(vocab_size=len(words(folder, "bert")), **SIZES))).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def marian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("marian")
    torch.manual_seed(0)
    sizes = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))}
    ends = {"pad_token_id": 2, "decoder_start_token_id": 2, "eos_token_id": 0, "forced_eos_token_id": 0}
    config = tf.MarianConfig(vocab_size=len(words(folder, "marian")), d_model=32, max_position_embeddings=40, **sizes, **ends)
    made: Any = spread(tf.MarianMTModel(config))
    made.generation_config.update(num_beams=3, max_length=16)
    made.save_pretrained(folder)
    return folder


def piped(monkeypatch: pytest.MonkeyPatch, raw: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(raw)))


def test_translate_writes_what_transformers_writes(
    capsys: pytest.CaptureFixture[str], marian: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint's own beams, others, one, and a batch of different lengths from standard input."""
    theirs, tok = tf.MarianMTModel.from_pretrained(marian).eval(), tf.AutoTokenizer.from_pretrained(marian)
    texts = ["the house is small", "a dog", "ein big Hund runs in the street of Paris ."]
    for line, beams in (((), 3), (("--beams", "2"), 2), (("--beams", "1"), 1)):
        rows = [theirs.generate(**tok(text, return_tensors="pt"), num_beams=beams) for text in texts]
        expected = [tok.decode(row[0], skip_special_tokens=True) for row in rows]
        code, out, err = run(capsys, "translate", str(marian), *texts, *line)
        assert (code, err) == (0, "") and out.splitlines() == expected and any(expected)
    piped(monkeypatch, ("\n\n".join(texts) + "\n").encode())
    code, out, _ = run(capsys, "translate", str(marian), "--beams", "1", "--json")
    assert code == 0 and json.loads(out)["translations"] == expected
    code, out, _ = run(capsys, "translate", str(marian), texts[0], "--beams", "1", "--max-tokens", "3")
    assert code == 0 and expected[0].startswith(out.strip())


def test_fill_writes_what_transformers_fills(capsys: pytest.CaptureFixture[str], encoder: Path) -> None:
    theirs, tok = tf.BertForMaskedLM.from_pretrained(encoder).eval(), tf.AutoTokenizer.from_pretrained(encoder)
    text = "the [MASK] of France is [MASK] ."
    ids = tok(text, return_tensors="pt").input_ids
    with torch.no_grad():
        best = theirs(ids).logits[0, ids[0] == tok.mask_token_id].softmax(-1).topk(3)
    code, out, err = run(capsys, "fill", str(encoder), text, "--top", "3", "--json")
    masks = json.loads(out)["masks"]
    assert (code, err) == (0, "") and [[word["id"] for word in found] for found in masks] == best.indices.tolist()
    scores = torch.tensor([[word["score"] for word in found] for found in masks])
    assert (scores - best.values).abs().max() < 1e-5
    code, out, _ = run(capsys, "fill", str(encoder), text)
    assert code == 0 and len(out.splitlines()) == 11 and masks[0][0]["token"] in out


def test_embed_writes_the_mean_of_the_states(
    capsys: pytest.CaptureFixture[str], encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint that declares no pooling; a mixed batch is what each text is alone."""
    theirs, tok = tf.BertModel.from_pretrained(encoder, add_pooling_layer=False).eval(), tf.AutoTokenizer.from_pretrained(encoder)
    texts = ["a dog", "the house is small and the dog is big", "Paris ."]
    with torch.no_grad():
        expected = [theirs(**tok(text, return_tensors="pt")).last_hidden_state[0].mean(0) for text in texts]
    code, out, err = run(capsys, "embed", str(encoder), *texts, "--json")
    record = json.loads(out)
    assert (code, err, record["dim"]) == (0, "", 32)
    assert (torch.tensor(record["vectors"]) - torch.stack(expected)).abs().max() < 1e-5
    piped(monkeypatch, "\n".join(texts).encode())
    code, out, _ = run(capsys, "embed", str(encoder), "-")
    printed = torch.tensor([[float(x) for x in line.split()] for line in out.splitlines()])
    assert code == 0 and torch.allclose(printed, torch.stack(expected), atol=1e-4)


def test_a_cut_text_is_said_aloud(capsys: pytest.CaptureFixture[str], encoder: Path) -> None:
    long = "dog " * 60
    code, _, err = run(capsys, "embed", str(encoder), "a dog", long)
    assert code == 1 and "text 1 has 62 tokens" in err and "40" in err and "--truncate" in err
    code, out, err = run(capsys, "embed", str(encoder), "a dog", long, "--truncate")
    assert code == 0 and len(out.splitlines()) == 2 and "1 of 2 texts were cut to 40 tokens" in err


def test_a_cut_source_is_said_aloud(capsys: pytest.CaptureFixture[str], marian: Path) -> None:
    """What is left of it is translated as transformers translates what its tokenizer leaves."""
    theirs, tok = tf.MarianMTModel.from_pretrained(marian).eval(), tf.AutoTokenizer.from_pretrained(marian)
    long = "the house is small " * 20
    ids = tok(long, return_tensors="pt", truncation=True, max_length=40)
    expected = tok.decode(theirs.generate(**ids, num_beams=1)[0], skip_special_tokens=True)
    code, out, err = run(capsys, "translate", str(marian), "a dog", long, "--beams", "1", "--truncate")
    assert code == 0 and out.splitlines()[1] == expected and "1 of 2 texts were cut to 40 tokens: text 1 has" in err
    code, out, _ = run(capsys, "translate", str(marian), long, "--beams", "1", "--truncate", "--json")
    record = json.loads(out)
    assert code == 0 and record["translations"] == [expected] and "were cut to 40 tokens" in record["notes"][0]


ANSWERS: dict[str, tuple[Any, int, tuple[str, ...]]] = {
    "one character on": ("dog", 7, ("'dog'", "question 7", "character 7", "'og'")),
    "behind the end": ("dog", 99, ("character 99", "9 characters")),
    "before the beginning": ("dog", -3, ("character -3",)),
    "another text": ("cat", 6, ("'cat'", "'dog'")),
    "longer than the context": ("dog and a cat", 6, ("'dog and a cat'", "9 characters")),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_outside_of_its_context_is_one_sentence(
    capsys: pytest.CaptureFixture[str], encoder: Path, tmp_path: Path, name: str
) -> None:
    """The same file of questions is what training reads."""
    text, at, said = ANSWERS[name]
    asked = {"id": "7", "question": "who?", "answers": [{"text": text, "answer_start": at}]}
    record = {"data": [{"title": "dogs", "paragraphs": [{"context": "a big dog", "qas": [asked]}]}]}
    (tmp_path / "questions.json").write_text(json.dumps(record))
    code, out, err = run(capsys, "eval", "squad", str(encoder), "--data", str(tmp_path / "questions.json"))
    assert code == 1 and out == "" and err.startswith("transept: ") and err.count("\n") == 1
    assert all(word in err for word in (*said, "questions.json")), err


def test_a_judge_of_pairs_that_is_given_one_text_says_so(capsys: pytest.CaptureFixture[str], encoder: Path, tmp_path: Path) -> None:
    shutil.copytree(encoder, tmp_path / "pairs")
    torch.manual_seed(0)
    config = tf.BertConfig.from_pretrained(encoder)
    spread(tf.BertForNextSentencePrediction(config)).save_pretrained(tmp_path / "pairs")
    (tmp_path / "SST-2").mkdir()
    (tmp_path / "SST-2" / "dev.tsv").write_text("sentence\tlabel\na big dog\t1\n")
    code, out, err = run(capsys, "eval", "glue", f"sst2={tmp_path / 'pairs'}", "--data", str(tmp_path))
    assert code == 1 and out == "" and "text 0 stands alone" in err and "pairs" in err and err.count("\n") == 1
    (tmp_path / "MRPC").mkdir()
    (tmp_path / "MRPC" / "dev.tsv").write_text("Quality\t#1 String\n1\ta big dog\n")
    code, out, err = run(capsys, "eval", "glue", f"mrpc={tmp_path / 'pairs'}", "--data", str(tmp_path))
    assert code == 1 and out == "" and "'#2 String'" in err and err.count("\n") == 1


def test_search_reports_what_it_cannot_read(
    capsys: pytest.CaptureFixture[str], encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRANSEPT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "docs").mkdir()
    for name, raw in {"dog.txt": b"a big dog runs", "house.md": b"the house is small", "latin.txt": b"caf\xe9", "none.txt": b""}.items():
        (tmp_path / "docs" / name).write_bytes(raw)
        os.utime(tmp_path / "docs" / name, (1e9, 1e9))
    for anew in (3, 0):
        code, out, err = run(capsys, "search", str(tmp_path / "docs"), "a big dog", "--model", str(encoder))
        assert code == 0 and "dog.txt:1" in out.splitlines()[1]
        assert "latin.txt was skipped: not UTF-8" in err and f"{anew} read anew, 1 empty" in err and "1 skipped" in err
    code, out, _ = run(capsys, "search", str(tmp_path / "docs"), "a big dog", "--model", str(encoder), "--json", "--top", "1")
    record = json.loads(out)
    assert code == 0 and [hit["path"] for hit in record["hits"]] == ["dog.txt"] and list(record["skipped"]) == ["latin.txt"]


WRONG: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "empty text": ("bert", ("embed", "{}", "a dog", " "), ("text 1 is empty",)),
    "long text": ("bert", ("fill", "{}", "[MASK] " + "dog " * 50), ("53 tokens", "40")),
    "no mask": ("bert", ("fill", "{}", "the dog"), ("[MASK]",)),
    "another family's mask": ("bert", ("fill", "{}", "the <mask> dog"), ("[MASK]",)),
    "no word": ("bert", ("fill", "{}", "the [MASK]", "--top", "-1"), ("-1",)),
    "nothing to fill with": ("marian", ("fill", "{}", "the [MASK]"), ("masked-language",)),
    "no states": ("marian", ("embed", "{}", "a dog"), ("states",)),
    "nothing to translate": ("marian", ("translate", "{}", ""), ("text 0 is empty",)),
    "too long to translate": ("marian", ("translate", "{}", "house " * 60), ("40",)),
    "no beam": ("marian", ("translate", "{}", "house", "--beams", "0"), ("beams", "0")),
    "fewer than no tokens": ("marian", ("translate", "{}", "house", "--max-tokens", "-1"), ("max_tokens", "-1")),
    "an encoder alone": ("bert", ("translate", "{}", "house"), ("bert", "does not translate")),
    "no query": ("bert", ("search", "{}", "", "--model", "{}"), ("empty",)),
    "no folder": ("bert", ("search", "/nowhere/at/all", "dog", "--model", "{}"), ("/nowhere/at/all",)),
    "no file": ("bert", ("search", "{}", "dog", "--model", "{}", "--top", "0"), ("--top",)),
    "no model": ("bert", ("embed", "minilmm", "dog"), ("minilmm", "minilm")),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_uses_are_one_sentence(capsys: pytest.CaptureFixture[str], encoder: Path, marian: Path, name: str) -> None:
    kind, line, said = WRONG[name]
    folder = str(encoder if kind == "bert" else marian)
    code, out, err = run(capsys, *(part.replace("{}", folder) for part in line))
    assert code == 1 and out == "" and err.startswith("transept: ") and err.count("\n") == 1
    assert all(word in err for word in said), err


@pytest.mark.parametrize("raw", [b"", b"\n \n", b"caf\xe9\n"])
def test_wrong_input_streams_are_one_sentence(
    capsys: pytest.CaptureFixture[str], encoder: Path, monkeypatch: pytest.MonkeyPatch, raw: bytes
) -> None:
    piped(monkeypatch, raw)
    code, out, err = run(capsys, "embed", str(encoder))
    assert code == 1 and out == "" and err.count("\n") == 1 and ("no text" in err or "not UTF-8" in err)


def test_special_tokens_that_the_vocabulary_lacks(capsys: pytest.CaptureFixture[str], encoder: Path, tmp_path: Path) -> None:
    """A configuration that names an unknown mask: there is none to fill; and marks written in a text are text, not marks."""
    shutil.copytree(encoder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "mask_token": "[MSK]"}))
    code, out, err = run(capsys, "fill", str(tmp_path), "the [MSK] dog")
    assert code == 1 and out == "" and "mask" in err and err.count("\n") == 1
    m = transept.load(encoder)
    assert 3 not in m.encode("a [SEP] dog")[1:-1] and m.encode("a dog")[0] == 2


def test_a_model_without_a_tokenizer_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = family("bert")
    transept.save(Model(page.build(page.tiny["two"]), page, None, page.tiny["two"]), tmp_path)
    for line in (("embed", str(tmp_path), "a dog"), ("fill", str(tmp_path), "a [MASK]")):
        code, out, err = run(capsys, *line)
        assert code == 1 and out == "" and "no tokenizer" in err and err.count("\n") == 1
