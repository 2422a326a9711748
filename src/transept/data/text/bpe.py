"""Byte-pair encoding trained on text (Sennrich et al. 2016; on bytes: Radford et al. 2019). Lecture row 29: GPT-3 has 50257 tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from transept.core.errors import TokenizerError
from transept.data.text.native import Native, boundary
from transept.data.text.tokenizer import Tokenizer

LINE = 1 << 16


def train_bpe(texts: str | Path | Iterable[str | Path], vocab: int = 50257, specials: Sequence[str] = ("<|endoftext|>",)) -> Tokenizer:
    """A byte-level BPE of `vocab` tokens: 256 bytes, the merges that the text earns, then `specials`.

    texts: a Path is read as a UTF-8 file, a str is text itself. The first special token is the beginning and the end of a text.
    A text too small for `vocab` gives as many tokens as it can; `Tokenizer.vocab_size` says how many.
    Errors: TokenizerError for a missing or empty text, a vocabulary that cannot hold the bytes, a special token named twice.
    """
    sources = [texts] if isinstance(texts, (str, Path)) else list(texts)
    if vocab < 256 + len(specials):
        raise TokenizerError(f"vocab is {vocab}; at least {256 + len(specials)} are needed: 256 bytes and {len(specials)} special tokens")
    if len(set(specials)) != len(specials) or not all(specials):
        raise TokenizerError(f"specials are {list(specials)}; different texts that are not empty were expected")
    check_sources(sources)
    native = Native(models.BPE())
    native.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    native.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab - len(specials), show_progress=False, initial_alphabet=sorted(alphabet), special_tokens=[]
    )
    with boundary("train_bpe"):
        native.train_from_iterator(pieces(sources), trainer)
        native.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    first = native.token_to_id(specials[0]) if specials else None
    names = {} if first is None else {"bos": first, "eos": first}
    return Tokenizer(json.loads(native.to_str()), names, where="train_bpe")


def check_sources(sources: Sequence[str | Path]) -> None:
    """At least one character of text must be there."""
    some = False
    for source in sources:
        if isinstance(source, Path):
            if not source.is_file():
                raise TokenizerError(f"{source}: no such file; a text file to train on was expected")
            some = some or source.stat().st_size > 0
        else:
            some = some or bool(source)
    if not some:
        names = ", ".join(str(source) for source in sources if isinstance(source, Path)) or "the given texts"
        raise TokenizerError(f"train_bpe: {names} hold no text; at least one line was expected")


def pieces(sources: Sequence[str | Path]) -> Iterator[str]:
    """The text in pieces of at most LINE characters, cut at line ends where there are any."""
    for source in sources:
        if isinstance(source, Path):
            try:
                with source.open(encoding="utf-8", newline="") as lines:
                    while piece := lines.read(LINE):
                        yield piece + lines.readline(LINE)
            except UnicodeDecodeError as error:
                raise TokenizerError(f"{source}: not UTF-8 at byte {error.start}") from None
        else:
            yield from (source[n : n + LINE] for n in range(0, len(source), LINE))
