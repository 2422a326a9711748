"""`transept embed`, `fill`, `translate` and `search`: what trained models are asked for, from the command line."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch.nn.functional as F

from transept.cli.progress import loading
from transept.cli.tables import table
from transept.core.errors import InputError
from transept.core.shapes import Float, Tensor
from transept.door import Model, load
from transept.inference import search as searching


def embed(args: argparse.Namespace) -> int:
    """Prints a vector for each text, a line for each."""
    m, texts = _load(args.model), _texts(args.texts)
    with _notes() as notes, loading("embedding", "texts") as progress:
        vectors = m.embed(texts, truncate=args.truncate, progress=progress)
    if args.json:
        print(json.dumps({"model": args.model, "dim": vectors.shape[-1], "vectors": vectors.tolist(), "notes": notes}))
    else:
        for row in vectors.tolist():
            print(" ".join(f"{x:.6g}" for x in row))
    return 0


def fill(args: argparse.Namespace) -> int:
    """Prints the likeliest words for each mask."""
    masks = _load(args.model).fill_mask(args.text, top=args.top)
    if args.json:
        print(json.dumps({"model": args.model, "masks": [[asdict(word) for word in words] for words in masks]}))
    else:
        table(("mask", "word", "chance", "text"), [(i + 1, w.token, f"{w.score:.4f}", w.text) for i, ws in enumerate(masks) for w in ws])
    return 0


def translate(args: argparse.Namespace) -> int:
    """Prints the translation of each text, a line for each."""
    m, texts = _load(args.model), _texts(args.texts)
    with _notes() as notes, loading("translating", "texts") as progress:
        found = m.translate(texts, beams=args.beams, max_tokens=args.max_tokens, truncate=args.truncate, progress=progress)
    print(json.dumps({"model": args.model, "translations": found, "notes": notes}) if args.json else "\n".join(found))
    return 0


def search(args: argparse.Namespace) -> int:
    """Prints the files nearest to the query, from an index that is brought up to date first."""
    if args.top < 1:
        raise InputError(f"--top is {args.top}; at least one file has to be asked for")
    m = _load(args.model)
    with _notes() as notes:
        query = vectors(m, [args.query], truncate=args.truncate)[0]
    with loading("reading", "passages") as progress:
        index = index_of(m, args.folder, progress)
    for name, why in index.skipped.items():
        print(f"transept: {name} was skipped: {why}", file=sys.stderr)
    hits, empty = index.find(args.query, query, args.top), index.empty
    if args.json:
        counts = {"files": len(index.pages), "passages": len(index.vectors), "embedded": index.embedded, "empty": len(empty)}
        print(json.dumps({"query": args.query, "hits": [asdict(hit) for hit in hits], **counts, "skipped": index.skipped, "notes": notes}))
        return 0
    table(("score", "file", "passage"), [(f"{h.score:.3f}", f"{h.path}:{h.line}", " ".join(h.text.split())[:80]) for h in hits])
    counted = f"{len(index.pages)} files, {len(index.vectors)} passages, {index.embedded} read anew, {len(empty)} empty"
    print(f"{counted}, {len(index.skipped)} skipped", file=sys.stderr)
    return 0


def index_of(m: Model, folder: str | Path, progress: searching.Progress | None = None) -> searching.Index:
    """The index of a folder by this model's vectors, kept in the cache under the folder's path and the model's files."""
    from transept.checkpoints.load import find
    from transept.checkpoints.pull import cache_dir

    home = find(m.source)
    files = sorted(p for p in home.iterdir() if p.is_file()) if home.is_dir() else [home]
    stamps = [f"{p} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in files]
    key = hashlib.sha256("\0".join([str(Path(folder).resolve()), *stamps]).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    most = m.limit

    def fits(text: str) -> bool:
        return most is None or len(m.encode(text)) <= most

    store = cache_dir() / "search" / f"{key}.safetensors"
    return searching.refresh(folder, store, lambda texts, bar: vectors(m, texts, progress=bar), fits, progress)


def vectors(m: Model, texts: Sequence[str], *, truncate: bool = False, progress: searching.Progress | None = None) -> Float[Tensor, "n d"]:
    """Vectors of length one, whatever the model declares."""
    return F.normalize(m.embed(texts, truncate=truncate, progress=progress), dim=-1)


@contextmanager
def _notes() -> Iterator[list[str]]:
    """What was warned of, on the error stream in one sentence each."""
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield notes
    for warning in caught:
        notes.append(str(warning.message))
        print(f"transept: {warning.message}", file=sys.stderr)


def _load(name: str) -> Model:
    with loading(name) as progress:
        return load(name, progress=progress)


def _texts(given: Sequence[str]) -> list[str]:
    if given and list(given) != ["-"]:
        return list(given)
    try:
        texts = [line for line in sys.stdin.buffer.read().decode("utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as e:
        raise InputError(f"standard input is not UTF-8 ({e.reason} at byte {e.start})") from e
    if not texts:
        raise InputError("standard input holds no text; one is read from each line")
    return texts
