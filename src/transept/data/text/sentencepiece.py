"""SentencePiece's unigram models (Kudo 2018, arXiv 1804.10959; Kudo and Richardson 2018, 1808.06226) as `tokenizer.json` mappings.

The file is a protocol buffer (sentencepiece_model.proto): 1 pieces (1 text, 2 score, 3 kind), 2 training (3 kind of model, 24 spaces end
words, 35 bytes for what is unknown), 3 normalisation (2 table, 3 a space first, 4 spaces joined). It is read without the package.
"""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transept.core.errors import TokenizerError
from transept.data.text import rebuild

LARGEST = 1 << 26
SPACE = "▁"
LOWER: rebuild.Json = {"type": "Lowercase"}
_UNIGRAM, _UNUSED = 1, (rebuild.UNKNOWN, rebuild.CONTROL, rebuild.UNUSED)
Wire = Iterator[tuple[int, int | memoryview]]


@dataclass(frozen=True)
class Pieces:
    """A model file: each piece's text, score and kind, the table of the normaliser, and how spaces are read."""

    texts: tuple[str, ...]
    scores: tuple[float, ...]
    kinds: tuple[int, ...]
    table: bytes
    leading: bool
    joined: bool
    where: str

    @property
    def unknown(self) -> int:
        """The number of the piece for what no piece spells."""
        if rebuild.UNKNOWN not in self.kinds:
            raise TokenizerError(f"{self.where}: no piece stands for the unknown")
        return self.kinds.index(rebuild.UNKNOWN)


def read(path: Path) -> Pieces:
    """The pieces of a model file. Errors: TokenizerError naming the file where it is damaged or of another kind than unigram."""
    where, size = str(path), path.stat().st_size
    if size > LARGEST:
        raise TokenizerError(f"{where}: {size} bytes; a SentencePiece model has at most {LARGEST}")
    texts, scores, kinds = [], [], []
    parts: dict[int, dict[int, int | memoryview]] = {2: {}, 3: {}}
    for number, value in wire(memoryview(path.read_bytes()), where):
        if number == 1:
            found = dict(wire(block(value, where), where))
            texts.append(text(found.get(1, memoryview(b"")), where))
            scores.append(score(found.get(2), where))
            kinds.append(integer(found.get(3, rebuild.NORMAL), where))
        elif number in parts:
            parts[number] |= dict(wire(block(value, where), where))
    if not texts:
        raise TokenizerError(f"{where}: no pieces; a SentencePiece model was expected")
    if len(set(texts)) != len(texts):
        twice = next(t for n, t in enumerate(texts) if t in texts[:n])
        raise TokenizerError(f"{where}: the piece {twice[:60]!r} stands there twice")
    training, spelling = parts[2], parts[3]
    for field, only, what in ((3, _UNIGRAM, "kind of model"), (24, 0, "rule that spaces end words"), (35, 0, "rule of bytes")):
        if integer(training.get(field, only), where) != only:
            raise TokenizerError(f"{where}: the {what} is {training[field]}; {only} was expected (a unigram model)")
    return Pieces(
        tuple(texts),
        tuple(scores),
        tuple(kinds),
        bytes(block(spelling.get(2, memoryview(b"")), where)),
        bool(integer(spelling.get(3, 1), where)),
        bool(integer(spelling.get(4, 1), where)),
        where,
    )


def wire(data: memoryview, where: str) -> Wire:
    """The fields of a message: (number, an integer or its bytes); every length is checked before it is believed."""
    at = 0
    while at < len(data):
        key, at = varint(data, at, where)
        kind = key & 7
        if kind == 0:
            value, at = varint(data, at, where)
            yield key >> 3, value
            continue
        if kind not in (1, 2, 5):
            raise TokenizerError(f"{where}: byte {at} begins no field of a SentencePiece model")
        size, at = varint(data, at, where) if kind == 2 else (8 if kind == 1 else 4, at)
        if size > len(data) - at:
            raise TokenizerError(f"{where}: a field of {size} bytes begins {len(data) - at} bytes before the end")
        yield key >> 3, data[at : at + size]
        at += size


def varint(data: memoryview, at: int, where: str) -> tuple[int, int]:
    """(An integer of seven bits a byte, where it ends.)"""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value, at
    raise TokenizerError(f"{where}: a number at byte {at} does not end")


def block(value: int | memoryview, where: str) -> memoryview:
    if isinstance(value, int):
        raise TokenizerError(f"{where}: the number {value} was found where bytes were expected")
    return value


def integer(value: int | memoryview, where: str) -> int:
    if not isinstance(value, int):
        raise TokenizerError(f"{where}: {len(value)} bytes were found where a number was expected")
    return value


def text(value: int | memoryview, where: str) -> str:
    try:
        return str(block(value, where), "utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{where}: a piece is not UTF-8 ({error.reason})") from None


def score(value: int | memoryview | None, where: str) -> float:
    if value is None:
        return 0.0
    raw = block(value, where)
    found = struct.unpack("<f", raw)[0] if len(raw) == 4 else math.nan
    if not math.isfinite(found):
        raise TokenizerError(f"{where}: a piece's score is no finite number of four bytes")
    return found


class Spelling:
    """The normaliser of a model: the longest beginning that its table knows is replaced, again and again.

    The table is a number of bytes, a double array of so many (Yata 2012, darts-clone: each unit a label, an offset, and whether a value
    follows), and the replacements, each ended by a zero.
    """

    def __init__(self, pieces: Pieces):
        raw, self.where, self.joined = pieces.table, pieces.where, pieces.joined
        size = struct.unpack_from("<I", raw)[0] if len(raw) >= 4 else 0
        if raw and (size % 4 or not 4 <= size <= len(raw) - 4 or raw[-1]):
            raise TokenizerError(f"{self.where}: a table of {len(raw)} bytes whose first part has {size}; it does not fit")
        self.units: tuple[int, ...] = struct.unpack_from(f"<{size // 4}I", raw, 4) if raw else ()
        self.words = raw[4 + size :]

    def __call__(self, text: str) -> str:
        """The text as the model's pieces spell it."""
        data, at, out = text.encode("utf-8", "replace"), 0, bytearray()
        while self.units and at < len(data):
            length, value = self.longest(data, at)
            if length:
                out += self.words[value : self.words.index(0, value)]
            else:
                length = 1 + sum(data[at] >= first for first in (0xC0, 0xE0, 0xF0))
                out += data[at : at + length]
            at += length
        found = out.decode("utf-8", "replace") if self.units else text
        return " ".join(part for part in found.split(" ") if part) if self.joined else found

    def longest(self, data: bytes, at: int) -> tuple[int, int]:
        """(Length of the longest known word that begins there, or 0; where its replacement stands)."""
        node, length, value = self.step(0, self.units[0]), 0, 0
        for n in range(at, len(data)):
            node ^= data[n]
            unit = self.units[node] if node < len(self.units) else 0
            if unit & 0x800000FF != data[n]:
                break
            node = self.step(node, unit)
            if unit >> 8 & 1:
                value = self.units[node] & 0x7FFFFFFF if node < len(self.units) else len(self.words)
                if value >= len(self.words):
                    raise TokenizerError(f"{self.where}: the table names the replacement at {value} of {len(self.words)} bytes")
                length = n - at + 1
        return length, value

    def step(self, node: int, unit: int) -> int:
        """The node where a unit's children begin."""
        return node ^ (unit >> 10) << ((unit & 512) >> 6)


def unigram(pieces: Pieces, *, extra: tuple[str, ...] = (), named: bool = True, before: Sequence[rebuild.Json] = ()) -> rebuild.Json:
    """The mapping of a model, `extra` tokens behind its pieces, texts changed by some steps before the model's own. Where special pieces
    are not `named`, no text can spell them."""
    hidden = {n for n, kind in enumerate(pieces.kinds) if kind in _UNUSED}
    if named:
        hidden = {n for n in hidden if pieces.kinds[n] == rebuild.UNUSED}
    names = [f"\U000f0000{n}" if n in hidden else text for n, text in enumerate(pieces.texts)]
    vocab = [[name, value] for name, value in zip(names, pieces.scores, strict=True)] + [[name, 0.0] for name in extra]
    steps = list(before)
    if pieces.table:
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(pieces.table).decode()})
    if pieces.joined:
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
        steps.append({"type": "Replace", "pattern": {"Regex": "^ | $"}, "content": ""})
    space = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "always" if pieces.leading else "never", "split": True}
    tokens = [(n, pieces.texts[n], kind != rebuild.USER) for n, kind in enumerate(pieces.kinds) if kind in (*_UNUSED, rebuild.USER)]
    tokens = [token for token in tokens if token[0] not in hidden and (named or not token[2])]
    tokens += [(len(pieces.texts) + n, name, True) for n, name in enumerate(extra)]
    return rebuild.document(
        {"type": "Unigram", "unk_id": pieces.unknown, "vocab": vocab, "byte_fallback": False},
        rebuild.added(tokens),
        normalizer={"type": "Sequence", "normalizers": steps} if steps else None,
        pre=space,
        post=None,
        decoder=space,
    )


def t5(pieces: Pieces, config: Mapping[str, Any]) -> rebuild.Json:
    """T5's vocabulary (Raffel et al. 2019): the sentinels, the last first, behind the pieces, and `</s>` after each text."""
    count = config.get("extra_ids", 100)
    if not isinstance(count, int) or not 0 <= count <= 10_000:
        raise TokenizerError(f"{pieces.where}: extra_ids is {count!r}; a number up to 10000 was expected")
    source = unigram(pieces, extra=tuple(f"<extra_id_{n}>" for n in reversed(range(count))))
    if "</s>" not in pieces.texts:
        raise TokenizerError(f"{pieces.where}: no piece '</s>', which ends T5's texts")
    return source | {"post_processor": rebuild.bookends(None, ("</s>", pieces.texts.index("</s>")))}


def deberta(pieces: Pieces, config: Mapping[str, Any]) -> rebuild.Json:
    """DeBERTa v2's and v3's vocabulary (He et al. 2021): `[MASK]` behind the pieces, and BERT's marks around each text."""
    if config.get("split_by_punct"):
        raise TokenizerError(f"{pieces.where}: split_by_punct is set; a vocabulary that does not split at punctuation was expected")
    extra = () if "[MASK]" in pieces.texts else ("[MASK]",)
    return around(pieces, unigram(pieces, extra=extra, before=[LOWER] if config.get("do_lower_case") is True else ()), "[CLS]", "[SEP]")


def albert(pieces: Pieces, config: Mapping[str, Any]) -> rebuild.Json:
    """ALBERT's vocabulary (Lan et al. 2019): small letters without accents unless the folder says otherwise, quotes of two marks as one.

    A piece that ends with a digit and a comma is taken only where nothing else spells the text, as the publisher splits it.
    """
    quotes = [{"type": "Replace", "pattern": {"String": two}, "content": '"'} for two in ("``", "''")]
    accents = [] if config.get("keep_accents") is True else [{"type": "NFKD"}, {"type": "StripAccents"}]
    lower = [LOWER] if config.get("do_lower_case", True) is True else []
    known = zip(pieces.texts, pieces.scores, strict=True)
    scores = tuple(score - 100 if piece[-1:] == "," and piece[-2:-1].isdigit() else score for piece, score in known)
    spaces = {"type": "Replace", "pattern": {"Regex": r"[\s\x1c-\x1f\x85]+"}, "content": " "}
    return around(pieces, unigram(replace(pieces, scores=scores), before=[spaces, *quotes, *accents, *lower]), "[CLS]", "[SEP]", "[MASK]")


def big_bird(pieces: Pieces, config: Mapping[str, Any]) -> rebuild.Json:
    """BigBird's vocabulary (Zaheer et al. 2020): the pieces as they are, and BERT's marks around each text."""
    return around(pieces, unigram(pieces), "[CLS]", "[SEP]", "[MASK]")


def xlm_roberta(pieces: Pieces, config: Mapping[str, Any]) -> rebuild.Json:
    """XLM-R's vocabulary (Conneau et al. 2019): fairseq's four marks instead of the first three pieces, `<mask>` behind the others."""
    if pieces.texts[:3] != ("<unk>", "<s>", "</s>"):
        raise TokenizerError(f"{pieces.where}: the first pieces are {', '.join(pieces.texts[:3])}; <unk>, <s>, </s> were expected")
    marks, kinds = ("<s>", "<pad>", "</s>", "<unk>"), (*[rebuild.CONTROL] * 3, rebuild.UNKNOWN)
    scores = (*[0.0] * 4, *pieces.scores[3:])
    moved = replace(pieces, texts=(*marks, *pieces.texts[3:]), scores=scores, kinds=(*kinds, *pieces.kinds[3:]))
    if len(set(moved.texts)) != len(moved.texts) or "<mask>" in moved.texts:
        raise TokenizerError(f"{pieces.where}: one of <pad> and <mask>, which fairseq adds, is a piece already")
    return around(moved, unigram(moved, extra=("<mask>",)), "<s>", "</s>", "<mask>", one=True)


def around(pieces: Pieces, source: rebuild.Json, cls: str, sep: str, mask: str = "", *, one: bool = False) -> rebuild.Json:
    """The mapping with marks around each text (`one` segment for both of a pair, as RoBERTa has it); the mask takes the space before it."""
    ids = {name: pieces.texts.index(name) for name in (cls, sep) if name in pieces.texts}
    if len(ids) < 2:
        raise TokenizerError(f"{pieces.where}: no pieces {cls!r} and {sep!r}, which stand around the texts")
    tokens = [token | {"lstrip": token["content"] == mask} for token in source["added_tokens"]]
    return source | {"post_processor": rebuild.pair(cls, sep, ids, one=one), "added_tokens": tokens}
