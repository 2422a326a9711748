"""Search by meaning in a folder of text files: passages as vectors, kept on disk, made again only where a file changed.

The index is one safetensors file, its table of pages in the metadata, so that both appear together or not at all.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from transept.checkpoints.safetensors import open_safetensors, write_safetensors
from transept.core.errors import InputError, TranseptError
from transept.core.shapes import Float, Tensor

SUFFIXES = frozenset(".txt .md .rst .adoc .org .tex .html .py .pyi .c .h .cc .cpp .hpp .rs .go .js .ts .java .sh .toml .yaml .yml".split())
LARGEST = 16 << 20
_PASSAGE = 600
_TITLE = 80
_FORMAT = "3"
# A file written within this time of being read may change again without its time changing.
_TICK = 2_000_000_000

Progress = Callable[[int, int], None]
Embed = Callable[[Sequence[str], Progress | None], Tensor]


@dataclass(frozen=True)
class Page:
    """A file as it was read: its size, its time and sha256, and its passages as (first character, end, line)."""

    size: int
    mtime: int
    read: int
    sha256: str
    passages: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Hit:
    """A file that answers, its score, and its best passage with the line where it begins."""

    path: str
    score: float
    line: int
    text: str


@dataclass
class Index:
    """The pages of a folder by their relative path, a vector for each passage [n d] in the same order, and why a file was skipped."""

    folder: Path
    pages: dict[str, Page]
    vectors: Float[Tensor, "n d"]
    skipped: dict[str, str] = field(default_factory=dict)
    embedded: int = 0

    @property
    def empty(self) -> list[str]:
        """The files without a word."""
        return [name for name, page in self.pages.items() if not page.passages]

    def find(self, query: str, vector: Float[Tensor, "d"], top: int = 5) -> list[Hit]:
        """The `top` files that answer best, best first; the query's vector is of length one, as the passages' are.

        A file's score is that of its best passage (cosine), half that of its passages' mean, and up to 0.2 for the query's own words in
        it (BM25, Robertson and Zaragoza 2009, eq. 3.15, as a share of the folder's best): a short page on the matter beats a long one
        that mentions it, and names that no model knows are found.
        """
        if top < 1:
            raise InputError(f"top is {top}; at least one file has to be asked for")
        full = {name: page for name, page in self.pages.items() if page.passages}
        parts = self.vectors.split([len(page.passages) for page in full.values()]) if full else ()
        named = _shares(query, [self._read(name) for name in full])
        found = []
        for (name, page), rows, share in zip(full.items(), parts, named, strict=True):
            own = rows @ vector
            score = float(own.max()) + 0.5 * float(F.normalize(rows.mean(0), dim=0) @ vector) + 0.2 * share
            found.append((score, name, page.passages[int(own.argmax())]))
        found.sort(key=lambda row: (-row[0], row[1]))
        return [Hit(name, score, line, self._read(name)[start:end].strip()) for score, name, (start, end, line) in found[:top]]

    def _read(self, name: str) -> str:
        try:
            return (self.folder / name).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""  # gone since it was indexed


def refresh(folder: str | Path, store: Path, embed: Embed, fits: Callable[[str], bool], progress: Progress | None = None) -> Index:
    """The index of a folder, brought up to date and written to the file `store`.

    `embed` makes vectors of length one [n d] of texts, `fits` says whether the model reads a text whole; `progress(done, total)` counts
    passages. A file is read again where its size or time changed, and embedded again where its sha256 did. Files that are not UTF-8, too
    large or not readable are skipped, with the reason. Raises InputError where the folder is none.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"{root} is no folder")
    old = _stored(root, store)
    rows = dict(zip(old.pages, old.vectors.split([len(p.passages) for p in old.pages.values()]), strict=True)) if old.pages else {}
    index = Index(root, {}, old.vectors)
    new: list[str] = []
    fresh: dict[str, int] = {}
    for name in _files(root):
        try:
            page, texts = _read(root / name, old.pages.get(name), fits)
        except (OSError, UnicodeDecodeError, InputError) as e:
            index.skipped[name] = f"not UTF-8 ({e.reason} at byte {e.start})" if isinstance(e, UnicodeDecodeError) else str(e)
            continue
        index.pages[name] = page
        if texts is not None:
            fresh[name] = len(texts)
            new += texts
    made = embed(new, progress) if new else old.vectors[:0]
    parts = dict(zip(fresh, made.split([*fresh.values()]), strict=True)) if new else {}
    chosen = [parts[name] if name in parts else rows[name] for name in index.pages if index.pages[name].passages]
    index.vectors, index.embedded = torch.cat(chosen) if chosen else made[:0], len(fresh)
    if index.pages != old.pages or not store.exists():
        _write(index, store)
    return index


def passages(text: str, fits: Callable[[str], bool] = lambda _: True, most: int = _PASSAGE) -> list[tuple[int, int, int]]:
    """The text in pieces (first character, end, line) of at most `most` characters that each fit, ended at blank lines where it can be."""
    spans: list[tuple[int, int]] = []
    start = end = 0
    for a, b in _lines(text, most):
        blank = not text[a:b].strip()
        if b - start > most or (blank and a - start > most // 2):
            spans.append((start, a))
            start = a
        end = b
    spans.append((start, end))
    out, line, counted = [], 1, 0
    for a, b in (piece for span in spans for piece in _fitting(text, *span, fits)):
        a += len(text[a:b]) - len(text[a:b].lstrip())
        line, counted = line + text.count("\n", counted, a), a
        if text[a:b].strip():
            out.append((a, b, line))
    return out


def title(text: str) -> str:
    """The first line with a word in it, without its markup."""
    found = re.search(r"\w[^\n]*", text)
    return found.group().strip(" \t\r*=#-_\"'`")[:_TITLE] if found else ""


def _shares(query: str, texts: Sequence[str]) -> list[float]:
    """BM25 of the query's words in each text, divided by the best."""
    k, b = 1.2, 0.75
    bags = [Counter(_words(text)) for text in texts]
    lengths = [bag.total() for bag in bags]
    mean = sum(lengths) / max(len(lengths), 1) or 1.0
    scores = [0.0] * len(bags)
    for word in set(_words(query)):
        having = sum(word in bag for bag in bags)
        rarity = math.log1p((len(bags) - having + 0.5) / (having + 0.5))
        for i, bag in enumerate(bags):
            scores[i] += rarity * bag[word] * (k + 1) / (bag[word] + k * (1 - b + b * lengths[i] / mean))
    best = max(scores, default=0.0)
    return [score / best if best else 0.0 for score in scores]


def _words(text: str) -> list[str]:
    """Words in small letters, without the s of a plural."""
    return [word[:-1] if word.endswith("s") and len(word) > 3 else word for word in re.findall(r"\w+", text.lower())]


def _lines(text: str, most: int) -> Iterator[tuple[int, int]]:
    """The lines of a text, a long one cut between words."""
    at = 0
    for line in text.splitlines(keepends=True):
        end = at + len(line)
        while end - at > most:
            space = text.rfind(" ", at + 1, at + most)
            cut = space + 1 if space > 0 else at + most
            yield at, cut
            at = cut
        yield at, end
        at = end


def _fitting(text: str, start: int, end: int, fits: Callable[[str], bool]) -> Iterator[tuple[int, int]]:
    if end - start <= 1 or fits(text[start:end]):
        yield start, end
        return
    middle = (start + end) // 2
    for a, b in ((start, middle), (middle, end)):
        yield from _fitting(text, a, b, fits)


def _files(root: Path) -> Iterator[str]:
    """The text files of a folder by name; hidden ones and links to folders are left out."""
    for here, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(here, name)
            if path.suffix.lower() in SUFFIXES and not name.startswith(".") and path.is_file():
                yield path.relative_to(root).as_posix()


def _read(path: Path, known: Page | None, fits: Callable[[str], bool]) -> tuple[Page, list[str] | None]:
    """A file's page, and the texts to embed; None where they are known."""
    stat, now = path.stat(), time.time_ns()
    if known and (known.size, known.mtime) == (stat.st_size, stat.st_mtime_ns) and known.mtime + _TICK < known.read:
        return known, None
    if stat.st_size > LARGEST:
        raise InputError(f"{stat.st_size:,} bytes, at most {LARGEST:,} are read")
    with path.open("rb") as file:
        raw = file.read(LARGEST)
    digest = hashlib.sha256(raw).hexdigest()
    if known and digest == known.sha256:
        return Page(stat.st_size, stat.st_mtime_ns, now, digest, known.passages), None
    text = raw.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    head = title(text)
    found = passages(text, lambda piece: fits(f"{head}\n{piece}"))
    page = Page(stat.st_size, stat.st_mtime_ns, now, digest, tuple(found))
    return page, [f"{head}\n{text[a:b].strip()}" for a, b, _ in found]


def _stored(root: Path, store: Path) -> Index:
    """The index as it was left; an empty one where there is none, or none that can be read."""
    try:
        file = open_safetensors(store)
        if file.metadata.get("format") != _FORMAT:
            raise InputError(f"{store} has another form")
        pages = {name: _page(entry) for name, entry in json.loads(file.metadata["pages"]).items()}
        vectors = file.read("vectors").clone()
        if vectors.ndim != 2 or len(vectors) != sum(len(page.passages) for page in pages.values()):
            raise InputError(f"{store} holds another number of vectors than of passages")
        return Index(root, pages, vectors)
    except (OSError, TranseptError, ValueError, TypeError, KeyError, AttributeError):
        return Index(root, {}, torch.empty(0, 0))


def _page(entry: dict[str, Any]) -> Page:
    spans = tuple((int(a), int(b), int(line)) for a, b, line in entry.pop("passages"))
    return Page(**entry, passages=spans)


def _write(index: Index, store: Path) -> None:
    store.parent.mkdir(parents=True, exist_ok=True)
    pages = json.dumps({name: asdict(page) for name, page in index.pages.items()})
    write_safetensors(store, {"vectors": index.vectors.contiguous()}, {"format": _FORMAT, "pages": pages})
