"""SentencePiece's models read without its package, against the package and transformers: the folders of T5, BERT's relatives and Marian."""

from __future__ import annotations

import functools
import io
import json
import tempfile
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece as theirs
import transformers as tf
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import transept
from tests.cli.test_commands import run
from tests.counts import count
from tests.parity.mirror import spread
from tests.parity.test_seq2seq import marian as marian_config
from transept import door
from transept.core.errors import TokenizerError
from transept.data.text import sentencepiece
from transept.data.text.tokenizer import Tokenizer


def lines(*names: str) -> list[str]:
    """The lines of some of the repository's own pages."""
    return [line for name in names for line in (Path(__file__).parents[2] / name).read_text().splitlines() if line.strip()]


LINES = lines("README.md", "CONTRIBUTING.md", "SECURITY.md")
OTHER = [*lines("docs/architecture.md"), *["Straße für größere Häuser ★"] * 9]
TEXTS = st.one_of(st.sampled_from(LINES + OTHER), st.text(max_size=30), st.text("aeiou st\t\n▁ößé★½ﬁ　Ⅳ>><<_-.,\u0301", max_size=30))
EXAMPLES = settings(max_examples=count(1000), deadline=None)
quiet = pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")


@functools.cache
def trained(kind: str) -> bytes:
    """A little model trained by the package, with the special pieces of a kind of model."""
    names = {
        "t5": {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
        "deberta": {"control_symbols": "[CLS],[SEP],[PAD]", "unk_piece": "[UNK]", "pad_id": -1, "bos_id": -1, "eos_id": -1, "unk_id": 0},
        "albert": {"control_symbols": "[CLS],[SEP],[MASK]", "pad_id": 0, "unk_id": 1, "bos_id": -1, "eos_id": -1},
        "big_bird": {"control_symbols": "[CLS],[SEP],[MASK]", "pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3},
    }
    out = io.BytesIO()
    rest = {"normalization_rule_name": "identity"} if kind == "plain" else {"user_defined_symbols": "<br>"} if kind == "user" else {}
    theirs.SentencePieceTrainer.Train(
        sentence_iterator=iter(OTHER if kind == "target" else LINES), model_writer=out, vocab_size=250, character_coverage=0.995,
        hard_vocab_limit=False, minloglevel=2, num_threads=1, **names.get(kind, {}), **rest,
    )  # fmt: skip
    return out.getvalue()


FOLDERS = {"deberta": ("deberta-v2", "spm.model"), "xlm-roberta": ("xlm-roberta", "sentencepiece.bpe.model")}


@functools.cache
def folder(kind: str) -> Path:
    """A folder with the model's file and what tells its kind."""
    made = Path(tempfile.mkdtemp(prefix="transept-pieces-"))
    model_type, file = FOLDERS.get(kind, (kind, "spiece.model"))
    (made / file).write_bytes(trained(kind))
    (made / "config.json").write_text(json.dumps({"model_type": model_type} | ({"eos_token_id": 1} if kind == "t5" else {})))
    return made


@functools.cache
def both(kind: str) -> tuple[Tokenizer, theirs.SentencePieceProcessor]:
    return Tokenizer.from_folder(folder(kind)), theirs.SentencePieceProcessor(model_proto=trained(kind))


@pytest.mark.parametrize("kind", ["t5", "deberta", "plain", "user", "target"])
def test_the_pieces_are_the_packages(kind: str, tmp_path: Path) -> None:
    (tmp_path / "a.model").write_bytes(trained(kind))
    found, model = sentencepiece.read(tmp_path / "a.model"), theirs.SentencePieceProcessor(model_proto=trained(kind))
    assert list(found.texts) == [model.id_to_piece(n) for n in range(model.get_piece_size())] and len(found.texts) > 150
    assert list(found.scores) == [model.get_score(n) for n in range(len(found.texts))]
    assert found.unknown == model.unk_id() and bool(found.table) == (kind != "plain")


def published(kind: str, model: theirs.SentencePieceProcessor, text: str) -> list[int]:
    """What the publishers' own code makes of a text with the package: ALBERT changes it first, fairseq renumbers the pieces of XLM-R."""
    if kind == "albert":
        text = unicodedata.normalize("NFKD", " ".join(text.split()).replace("``", '"').replace("''", '"'))
        text = "".join(c for c in text if not unicodedata.combining(c)).lower()
    ids = model.encode(text)
    return [3 if n == model.unk_id() else n + 1 for n in ids] if kind == "xlm-roberta" else ids


def same(kind: str, text: str) -> None:
    ours, model = both(kind)
    expected = published(kind, model, text)
    if kind == "xlm-roberta":
        second = published(kind, model, "a")
        assert ours.encode(text) == [0, *expected, 2], text
        assert ours.encode_pair(text, "a") == ([0, *expected, 2, 2, *second, 2], [0] * (len(expected) + len(second) + 4))
    elif kind == "t5":
        assert ours.encode(text) == [*expected, 1], text
        # What was unknown cannot come back.
        assert 2 in expected or ours.decode(expected) == model.decode(expected), text
    else:
        second = published(kind, model, "a")
        cls, sep = (model.piece_to_id(mark) for mark in ("[CLS]", "[SEP]"))
        assert ours.encode(text) == [cls, *expected, sep], text
        assert ours.encode_pair(text, "a") == ([cls, *expected, sep, *second, sep], [0] * (len(expected) + 2) + [1] * (len(second) + 1))


@pytest.mark.parametrize("kind", ["t5", "deberta", "albert", "big_bird", "xlm-roberta"])
@EXAMPLES
@given(text=TEXTS)
def test_ids_are_the_packages(kind: str, text: str) -> None:
    """But for marks that combine: where the normaliser has no word for letter and mark, the tokenizers library loses the mark."""
    assume(not any(unicodedata.category(c).startswith("M") or "\u1100" <= c < "\u1200" for c in text))
    same(kind, text)


def test_the_special_tokens_of_t5_and_deberta() -> None:
    t5, deberta = both("t5")[0], both("deberta")[0]
    size = both("t5")[1].get_piece_size()
    assert (t5.pad_id, t5.eos_ids, t5.unk_id) == (0, (1,), 2) and t5.vocab_size == size + 100
    assert t5.id("<extra_id_0>") == size + 99 and t5.id("<extra_id_99>") == size
    text = "a <extra_id_0> b"
    assert size + 99 in t5.encode(text, parse_specials=True) and size + 99 not in t5.encode(text)
    assert deberta.token(deberta.mask_id or 0) == "[MASK]" and deberta.mask_id == both("deberta")[1].get_piece_size()
    assert deberta.id("[CLS]") not in deberta.encode("a [CLS] b")[1:]


def transformers_own(kind: str) -> Any:
    """transformers' tokenizer over the same pieces; its mask takes the space before it, as in the published files."""
    model = both(kind)[1]
    pieces = [(model.id_to_piece(n), model.get_score(n)) for n in range(model.get_piece_size())]
    mask = tf.AddedToken("<mask>" if kind == "xlm-roberta" else "[MASK]", lstrip=True)
    if kind == "xlm-roberta":
        marks = [(name, 0.0) for name in ("<s>", "<pad>", "</s>", "<unk>")]
        return tf.XLMRobertaTokenizer(vocab=[*marks, *pieces[3:], ("<mask>", 0.0)], mask_token=mask)
    made = tf.AlbertTokenizer if kind == "albert" else tf.BigBirdTokenizer
    return made(vocab=pieces, mask_token=mask)


@pytest.mark.parametrize("kind", ["albert", "big_bird", "xlm-roberta"])
def test_marks_and_masks_are_transformers(kind: str) -> None:
    ours, other = both(kind)[0], transformers_own(kind)
    for name in ("pad", "mask", "sep", "cls", "bos", "unk"):
        assert ours.named[name] == getattr(other, f"{name}_token_id"), name
    for text in (LINES[2], f"the {other.mask_token} of a page", f"a{other.mask_token}"):
        assert ours.encode(text, parse_specials=True) == other(text).input_ids, text
    assert ours.mask_id not in ours.encode(f"the {other.mask_token} of a page")
    assert ours.encode_pair(LINES[2], LINES[3])[0] == other(LINES[2], LINES[3]).input_ids


def test_albert_splits_a_comma_from_its_digits_and_keeps_accents_where_it_shall(tmp_path: Path) -> None:
    found = sentencepiece.read(folder("albert") / "spiece.model")
    likely = replace(found, texts=(*found.texts[:-2], "▁12,", "12"), scores=(*found.scores[:-2], 0.0, 0.0))
    for source, whole in ((sentencepiece.unigram(likely), True), (sentencepiece.albert(likely, {}), False)):
        tokenizer = Tokenizer(source, {})
        assert ("▁12," in [tokenizer.token(n) for n in tokenizer.encode("in 12, and")]) == whole
    (tmp_path / "spiece.model").write_bytes(trained("albert"))
    (tmp_path / "config.json").write_text('{"model_type": "albert"}')
    assert Tokenizer.from_folder(tmp_path).encode("The Pagé") == both("albert")[0].encode("the page")
    (tmp_path / "tokenizer_config.json").write_text('{"keep_accents": true, "do_lower_case": false}')
    assert Tokenizer.from_folder(tmp_path).encode("The Pagé")[1:-1] == both("albert")[1].encode("The Pagé")


def test_xlm_rs_first_pieces_are_checked(tmp_path: Path) -> None:
    (tmp_path / "sentencepiece.bpe.model").write_bytes(trained("t5"))
    (tmp_path / "config.json").write_text('{"model_type": "xlm-roberta"}')
    with pytest.raises(TokenizerError, match="<unk>, <s>, </s> were expected"):
        Tokenizer.from_folder(tmp_path)


@functools.cache
def marian() -> Path:
    """A folder as the translation models are published: two models of pieces, one vocabulary, and no tokenizer.json."""
    made = Path(tempfile.mkdtemp(prefix="transept-marian-"))
    sides = [theirs.SentencePieceProcessor(model_proto=trained(kind)) for kind in ("source", "target")]
    pieces = {side.id_to_piece(n) for side in sides for n in range(side.get_piece_size()) if not side.is_control(n)} - {"<unk>"}
    # Some pieces of the source have no number, and one that only the target has is a letter.
    kept = [piece for n, piece in enumerate(sorted(pieces)) if n % 17 or len(piece) == 1]
    vocab = {piece: n for n, piece in enumerate(["</s>", "<unk>", *kept, ">>fra<<", "<pad>"])}
    for side in ("source", "target"):
        (made / f"{side}.spm").write_bytes(trained(side))
    (made / "vocab.json").write_text(json.dumps(vocab))
    (made / "tokenizer_config.json").write_text('{"source_lang": "eng", "target_lang": "deu", "model_max_length": 60}')
    pad = vocab["<pad>"]
    config = marian_config(vocab_size=len(vocab), pad_token_id=pad, decoder_start_token_id=pad)
    model: Any = spread(tf.MarianMTModel(config))
    model.generation_config.update(num_beams=2, max_length=24, bad_words_ids=[[pad]])
    model.save_pretrained(made)
    return made


@functools.cache
def marian_pair() -> tuple[Tokenizer, tf.MarianTokenizer]:
    return Tokenizer.from_folder(marian()), tf.MarianTokenizer.from_pretrained(marian())


@quiet
@EXAMPLES
@given(text=TEXTS, code=st.sampled_from(["", "", ">>fra<<", ">>fra<< ", ">>deu<<"]), data=st.data())
def test_marian_gives_transformers_ids_and_texts(text: str, code: str, data: st.DataObject) -> None:
    ours, other = marian_pair()
    assert ours.encode(code + text) == other(code + text).input_ids
    ids = data.draw(st.lists(st.integers(0, ours.vocab_size - 1), max_size=12))
    assert ours.decode(ids) == other.decode(ids, skip_special_tokens=True)


@quiet
def test_marian_folders_translate_and_are_saved_as_they_were(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tok: Any = marian_pair()[1]
    model: Any = tf.MarianMTModel.from_pretrained(marian()).eval()
    ids = tok(LINES[5]).input_ids
    stream = marian_pair()[0].stream()
    assert ("".join(stream.push(n) for n in ids) + stream.finish()).strip() == marian_pair()[0].decode(ids)
    for text in (LINES[3], "Straße für ★", ">>fra<< a page"):
        expected = tok.decode(model.generate(**tok(text, return_tensors="pt"))[0], skip_special_tokens=True)
        code, out, err = run(capsys, "translate", str(marian()), text)
        assert (code, err) == (0, "") and out.strip() == expected and expected
    transept.save(door.load(marian()), tmp_path)
    again = tf.AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(again, tf.MarianTokenizer) and again(LINES[5]).input_ids == ids == transept.load(tmp_path).encode(LINES[5])


@settings(max_examples=count(400), deadline=None)
@given(at=st.integers(0, 10**6), kind=st.sampled_from(["cut", "flip", "length"]), value=st.integers(1, 255), side=st.booleans())
def test_a_damaged_model_is_refused_or_read(at: int, kind: str, value: int, side: bool) -> None:
    """Never another error than a TokenizerError, and never more memory than the file says."""
    raw = bytearray(trained("source" if side else "t5"))
    at %= len(raw)
    if kind == "cut":
        raw = raw[:at]
    else:
        raw[at] = raw[at] ^ value if kind == "flip" else 255
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / ("source.spm" if side else "spiece.model")).write_bytes(bytes(raw))
        (Path(name) / "config.json").write_text('{"model_type": "t5"}')
        if side:
            (Path(name) / "vocab.json").write_bytes((marian() / "vocab.json").read_bytes())
        try:
            assert Tokenizer.from_folder(name).encode("a page of téxt½")
        except TokenizerError as error:
            assert name in str(error)


def test_folders_that_lie_are_refused(tmp_path: Path) -> None:
    vocab = json.loads((marian() / "vocab.json").read_text())
    for name in ("source.spm", "target.spm"):
        (tmp_path / name).write_bytes((marian() / name).read_bytes())
    for wrong, said in (
        ({**vocab, "more": 0}, "an id of its own"),
        ({piece: n for piece, n in vocab.items() if piece != "<unk>"}, "<unk>"),
        (["a"], "a mapping"),
        ({**vocab, "more": 10**9}, "1000000000"),
    ):
        (tmp_path / "vocab.json").write_text(json.dumps(wrong))
        with pytest.raises(TokenizerError, match=said):
            Tokenizer.from_folder(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "target_vocab.json").write_text("{}")
    with pytest.raises(TokenizerError, match="for both languages"):
        Tokenizer.from_folder(tmp_path)
