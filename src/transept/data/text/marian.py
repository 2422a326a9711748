"""Marian's folders as published (Junczys-Dowmunt et al. 2018): `source.spm` cuts texts, `vocab.json` numbers both languages' pieces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transept.core.errors import TokenizerError
from transept.data.text import native, sentencepiece
from transept.data.text.sentencepiece import SPACE

FILES = ("vocab.json", "source.spm", "target.spm")
NAMES = {"eos": "</s>", "unk": "<unk>", "pad": "<pad>"}


@dataclass(frozen=True)
class Numbers:
    """The numbers of a vocabulary that another one's pieces are given: `ids` by piece, the special pieces' `names`, how texts are spelled,
    and the files."""

    ids: Mapping[str, int]
    names: Mapping[str, int]
    spelling: sentencepiece.Spelling
    files: Mapping[str, bytes] = field(repr=False)


@dataclass(frozen=True)
class Coded:
    """What the native tokenizer says of a text, renumbered."""

    ids: list[int]
    type_ids: list[int]


class Renumbered:
    """A native tokenizer whose pieces have the numbers of another vocabulary; a piece that this one lacks is unknown."""

    def __init__(self, inner: native.Native, numbers: Numbers):
        self.inner, self.ids, self.names, self.spelling = inner, numbers.ids, numbers.names, numbers.spelling
        special = set(numbers.names.values())
        self.spelled = {piece: n for piece, n in numbers.ids.items() if n not in special}
        self.pieces = {n: piece for piece, n in numbers.ids.items()}

    def encode(self, a: str, b: str | None = None, add_special_tokens: bool = True) -> Coded:
        """The pieces of a text, or of two one behind the other, and `</s>`; a code such as `>>fra<<` in front is one piece."""
        ids: list[int] = []
        for text in (a,) if b is None else (a, b):
            begun = text.find("<<") + 2 if text.startswith(">>") and "<<" in text else 0
            pieces = self.inner.encode(self.spelling(text[begun:]), add_special_tokens=False).tokens
            ids += [self.spelled.get(piece, self.names["unk"]) for piece in ([text[:begun]] if begun else []) + pieces]
        ids += [self.names["eos"]] if add_special_tokens else []
        return Coded(ids, [0] * len(ids))

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """The text of some pieces, without the space that its first word begins with."""
        special = set(self.names.values()) if skip_special_tokens else ()
        return "".join(self.pieces[n] for n in ids if n not in special).replace(SPACE, " ").lstrip()

    def token_to_id(self, token: str) -> int | None:
        """The number of a piece."""
        return self.ids.get(token)

    def id_to_token(self, id: int) -> str | None:
        """The piece of a number."""
        return self.pieces.get(id)

    def get_vocab(self, with_added_tokens: bool = True) -> dict[str, int]:
        """All pieces with their numbers."""
        return dict(self.ids)


def fits(folder: Path) -> bool:
    """Whether a folder is one of these, without a tokenizer.json of its own."""
    return not (folder / "tokenizer.json").is_file() and all((folder / name).is_file() for name in FILES[:2])


def read(folder: Path) -> tuple[dict[str, Any], Numbers]:
    """The mapping of the source's pieces and the numbers of the shared vocabulary. Errors: TokenizerError naming the file."""
    if (folder / "target_vocab.json").is_file():
        raise TokenizerError(f"{folder / 'target_vocab.json'}: a vocabulary for the target alone; one for both languages was expected")
    where = folder / "vocab.json"
    ids = native.read_json(where, native.LARGEST >> 2)
    if not isinstance(ids, dict) or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in ids.values()):
        raise TokenizerError(f"{where}: a mapping from pieces to ids was expected")
    most = max(ids.values(), default=0)
    if len(set(ids.values())) != len(ids) or most > 2 * len(ids):
        raise TokenizerError(f"{where}: {len(ids)} pieces have ids up to {most}; each an id of its own was expected")
    lacking = next((piece for piece in NAMES.values() if piece not in ids), None)
    if lacking is not None:
        raise TokenizerError(f"{where}: no piece {lacking!r}; {', '.join(NAMES.values())} were expected")
    pieces = sentencepiece.read(folder / "source.spm")
    files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
    named = {name: ids[piece] for name, piece in NAMES.items()}
    source = sentencepiece.unigram(replace(pieces, table=b"", joined=False), named=False)
    return source, Numbers(ids, named, sentencepiece.Spelling(pieces), files)
