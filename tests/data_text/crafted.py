# ruff: noqa: E501  (templates and files stand as they are found)
"""Damaged and hostile tokenizer.json files, one function per class."""

from __future__ import annotations

import copy
import json
from typing import Any

BASE: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [
        {"id": 3, "content": "<s>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    ],
    "normalizer": None,
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    "post_processor": None,
    "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    "model": {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {"a": 0, "b": 1, "ab": 2, "<s>": 3},
        "merges": [["a", "b"]],
    },
}
UNIGRAM = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0], ["b", -2.0]], "byte_fallback": False}


def changed(path: str, value: Any) -> str:
    """The base file with one field set; a path is written with dots."""
    made = copy.deepcopy(BASE)
    *heads, last = path.split(".")
    place = made
    for head in heads:
        place = place[head]
    place[last] = value
    return json.dumps(made)


def regex(pattern: str) -> str:
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return changed("pre_tokenizer", step)


def template(pieces: list[Any], specials: dict[str, Any]) -> str:
    return changed("post_processor", {"type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": specials})


WORDS = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
CRAFTED = {
    "empty file": "",
    "not json": "{",
    "a list": "[]",
    "deeply nested": "[" * 100_000 + "]" * 100_000,
    "no model": json.dumps({k: v for k, v in BASE.items() if k != "model"}),
    "unknown model": changed("model", {"type": "Neural", "vocab": {"a": 0}}),
    "empty vocabulary": changed("model.vocab", {}),
    "vocabulary of the wrong kind": changed("model.vocab", [["a", 1]]),
    "id of ten million": changed("model.vocab", {"a": 0, "b": 10_000_000, "ab": 2, "<s>": 3}),
    "id beyond 32 bits": changed("model.vocab", {"a": 1 << 40}),
    "negative id": changed("model.vocab", {"a": -1, "b": 1, "ab": 2}),
    "id as text": changed("model.vocab", {"a": "0", "b": 1, "ab": 2}),
    "merge of an unknown token": changed("model.merges", [["a", "zz"]]),
    "merge of an empty token": changed("model.merges", [["", "a"]]),
    "merge of three": changed("model.merges", ["a b c"]),
    "merge without a result": changed("model.merges", [["b", "a"]]),
    "unigram unk beyond the end": changed("model", UNIGRAM | {"unk_id": 99}),
    "unigram score not a number": changed("model", UNIGRAM | {"vocab": [["<unk>", 0.0], ["a", float("nan")]]}),
    "unigram row of one": changed("model", UNIGRAM | {"vocab": [["<unk>", 0.0], ["a"]]}),
    "unigram empty": changed("model", UNIGRAM | {"vocab": []}),
    "wordpiece without unk": changed("model", WORDS | {"vocab": {"a": 0}}),
    "unknown unk": changed("model.unk_token", "<zz>"),
    "dropout out of range": changed("model.dropout", 7.5),
    "added token without content": changed("added_tokens", [{"id": 3}]),
    "added token empty": changed("added_tokens", [BASE["added_tokens"][0] | {"content": ""}]),
    "added token far away": changed("added_tokens", [BASE["added_tokens"][0] | {"id": 1 << 31, "content": "far"}]),
    "template of an unknown token": template([{"SpecialToken": {"id": "[X]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}], {}),
    "template without the text": template([], {}),
    "unknown pre-tokenizer": changed("pre_tokenizer", {"type": "Import", "path": "os"}),
    "unknown decoder": changed("decoder", {"type": "Exec"}),
    "damaged characters map": changed("normalizer", {"type": "Precompiled", "precompiled_charsmap": "////"}),
    "broken regex": regex("(unclosed"),
    "regex bomb, nested": regex(r"(a+)+$"),
    "regex bomb, choice": regex(r"(a|a)*b"),
    "regex bomb, deep": regex(r"((a*)*)*c"),
    "regex bomb, counted": regex(r"(a{1,9}){1,99}$"),
    "empty replace": changed("normalizer", {"type": "Replace", "pattern": {"String": ""}, "content": "x"}),
    "fixed length of none": changed("pre_tokenizer", {"type": "FixedLength", "length": 0}),
}
HARMLESS = {
    "nested normalizers": changed("normalizer", json.loads('{"type":"Sequence","normalizers":[' * 60 + "]}" * 60)),
    "truncation that would cut": changed("truncation", {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}),
    "stride above the length": changed("truncation", {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 9}),
    "padding": changed(
        "padding",
        {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "a"},
    ),
    "metaspace of two letters": changed(
        "pre_tokenizer", {"type": "Metaspace", "replacement": "ab", "prepend_scheme": "always", "split": True}
    ),
    "unused unicode vocabulary": changed("model.vocab", {"a": 0, "b": 1, "ab": 2, "<s>": 3, "\ud7ff\ufffd": 4}),
}
