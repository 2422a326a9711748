"""The one boundary to the native tokenizer: panics become typed errors, and files that would hang or fill memory are refused first."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Native

from transept.core.errors import TokenizerError

LARGEST = 1 << 29
MODELS = ("BPE", "WordPiece", "Unigram", "WordLevel")


@contextmanager
def boundary(what: str) -> Iterator[None]:
    """Turn every failure of the native code into a TokenizerError; its panics are no Exceptions, a Ctrl-C passes through."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, TokenizerError):
        raise
    except BaseException as error:
        raise TokenizerError(f"{what}: {type(error).__name__}: {str(error)[:300]}") from None


def read_json(path: Path, most: int = 1 << 25) -> Any:
    """A JSON file's content; its size is checked first. Errors: TokenizerError."""
    size = path.stat().st_size
    if size > most:
        raise TokenizerError(f"{path}: {size} bytes; a tokenizer file has at most {most}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: not valid JSON: {str(error)[:200]}") from None


def build(source: Mapping[str, Any], where: str) -> Native:
    """The native tokenizer of a `tokenizer.json` mapping, checked before and after. Errors: TokenizerError naming the field."""
    check(source, where)
    with boundary(where):
        native = Native.from_str(json.dumps(source, ensure_ascii=False))
        native.no_truncation()
        native.no_padding()
        native.encode("a Ünïcode text 123 \U0001f999")
        native.encode("a", "b")
    return native


def check(source: Any, where: str) -> None:
    """What the native reader does not check: the model's kind, ids, ranges, patterns that run away."""
    if not isinstance(source, Mapping) or not isinstance(source.get("model"), Mapping):
        raise TokenizerError(f"{where}: field model is missing; a tokenizer.json with a model was expected")
    model = source["model"]
    kind = model.get("type") or ("BPE" if "merges" in model else "WordPiece" if "max_input_chars_per_word" in model else "Unigram")
    if kind not in MODELS:
        raise TokenizerError(f"{where}: model.type is {kind!r}; one of {', '.join(MODELS)} was expected")
    vocab = model.get("vocab")
    if not isinstance(vocab, list if kind == "Unigram" else dict) or not vocab:
        raise TokenizerError(f"{where}: model.vocab is missing, empty or of the wrong kind for {kind}")
    added = source.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(t, dict) and isinstance(t.get("content"), str) and t["content"] for t in added):
        raise TokenizerError(f"{where}: added_tokens holds an entry without content")
    size = len(vocab) + len(added)
    ids = [*([] if isinstance(vocab, list) else vocab.values()), *(token.get("id") for token in added)]
    for found in ids:
        if not isinstance(found, int) or isinstance(found, bool) or not 0 <= found < 2 * size + 100_000:
            raise TokenizerError(f"{where}: token id {str(found)[:40]}; ids from 0 to about {size} were expected")
    check_model(model, kind, vocab, where)
    check_template(source.get("post_processor"), where)
    for pattern in patterns({name: value for name, value in source.items() if name != "model"}):
        check_pattern(pattern, where)


def check_model(model: Mapping[str, Any], kind: str, vocab: Any, where: str) -> None:
    """Fields of the model itself: merges that make something, scores that are numbers, ids that exist."""
    if kind == "Unigram":
        unk = model.get("unk_id")
        if unk is not None and not (isinstance(unk, int) and 0 <= unk < len(vocab)):
            raise TokenizerError(f"{where}: model.unk_id is {unk!r}; an index below {len(vocab)} was expected")
        for n, row in enumerate(vocab):
            if not (isinstance(row, list) and len(row) == 2 and isinstance(row[0], str) and isinstance(row[1], (int, float))):
                raise TokenizerError(f"{where}: model.vocab[{n}] is {str(row)[:60]}; a pair of text and score was expected")
            if row[1] != row[1] or abs(row[1]) == float("inf"):
                raise TokenizerError(f"{where}: model.vocab[{n}] has the score {row[1]}; a finite number was expected")
        return
    if "" in vocab and kind == "BPE":
        raise TokenizerError(f"{where}: model.vocab holds an empty token")
    unk = model.get("unk_token")
    if unk is not None and unk not in vocab:
        raise TokenizerError(f"{where}: model.unk_token {str(unk)[:60]!r} is not in model.vocab")
    if kind == "BPE":
        for n, merge in enumerate(model.get("merges") or []):
            parts = merge.split(" ") if isinstance(merge, str) else merge
            if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(p, str) and p for p in parts):
                raise TokenizerError(f"{where}: model.merges[{n}] is {str(merge)[:60]!r}; two tokens were expected")
        dropout = model.get("dropout")
        if dropout is not None:
            raise TokenizerError(f"{where}: model.dropout is {dropout!r}; none was expected, since ids would differ from call to call")


def check_template(post: Any, where: str) -> None:
    """A template of special tokens must hold the text itself."""
    for step in [post, *(post.get("processors") or [])] if isinstance(post, Mapping) else []:
        if isinstance(step, Mapping) and step.get("type") == "TemplateProcessing":
            pieces = step.get("single")
            if not isinstance(pieces, list) or not any(isinstance(piece, Mapping) and "Sequence" in piece for piece in pieces):
                raise TokenizerError(f"{where}: post_processor.single has no place for the text")


def patterns(value: Any) -> Iterator[str]:
    """Every regular expression of a tokenizer.json's normalizer, pre-tokenizer, post-processor and decoder."""
    stack = [value]
    while stack:
        found = stack.pop()
        if isinstance(found, Mapping):
            if isinstance(found.get("Regex"), str):
                yield found["Regex"]
            if found.get("type") in ("Replace", "Split") and found.get("pattern") in ({"String": ""}, {"Regex": ""}):
                raise TokenizerError("tokenizer.json: an empty pattern in a Replace or Split step")
            if found.get("type") == "FixedLength" and not found.get("length"):
                raise TokenizerError("tokenizer.json: a FixedLength step of length 0")
            stack += found.values()
        elif isinstance(found, list):
            stack += found


def check_pattern(pattern: str, where: str) -> None:
    """Refuse expressions whose matching time can explode: an unbounded repeat around an unbounded repeat or a choice."""
    plain = re.sub(r"\\[pP]\{[^}]*\}|\\x\{[^}]*\}|\\.", "x", pattern)
    plain = re.sub(r"\[\^?\]?[^\]]*\]", "x", plain)
    if len(pattern) > 1 << 14:
        raise TokenizerError(f"{where}: a regular expression of {len(pattern)} characters")
    stack: list[bool] = [False]
    for n, letter in enumerate(plain):
        after = plain[n + 1 : n + 12]
        if letter == "(":
            stack.append(False)
        elif letter == ")" and len(stack) > 1:
            risky = stack.pop()
            unbounded = after[:1] in ("*", "+") or re.match(r"\{\d*,\d*\}", after) is not None
            if risky and unbounded:
                raise TokenizerError(f"{where}: the regular expression {pattern[:80]!r} repeats a repeat, which can run without end")
            stack[-1] = stack[-1] or risky
        elif letter in "*+|" or re.match(r"\{\d+,\d*\}", letter + after):
            stack[-1] = stack[-1] or letter != "|" or len(stack) > 1
