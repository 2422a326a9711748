"""Search in a folder: real questions on real documentation, and what the index does when files come, change, go or cannot be read."""

from __future__ import annotations

import ast
import json
import math
import os
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
import torch.nn.functional as F

import transept
from tests.counts import FULL
from transept.checkpoints import pull
from transept.cli.main import main
from transept.cli.tasks import index_of, vectors
from transept.core.errors import InputError, SourceError
from transept.core.shapes import Tensor
from transept.inference.search import passages, refresh

REPOSITORY = Path(__file__).parents[2]


class Letters:
    """Vectors that count the letters of a text, and how many texts they were asked for."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, texts: Sequence[str], progress: Callable[[int, int], None] | None = None) -> Tensor:
        self.asked += len(texts)
        counts = torch.tensor([[float(text.lower().count(chr(c))) for c in range(97, 123)] for text in texts])
        return F.normalize(counts, dim=-1)


def query(letters: str) -> Tensor:
    return Letters()([letters])[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "pages"
    (root / "deep").mkdir(parents=True)
    for name, text in {"zebra.txt": "zzz zebra zzz", "deep/quilt.md": "# Quilt\n\nqqq qqq", "apple.rst": "aaa aaa"}.items():
        (root / name).write_text(text)
        os.utime(root / name, (1e9, 1e9))
    return root


def test_only_what_changed_is_embedded_again(folder: Path, tmp_path: Path) -> None:
    store, embed = tmp_path / "index.safetensors", Letters()
    assert refresh(folder, store, embed, lambda _: True).embedded == 3 and embed.asked == 3
    assert refresh(folder, store, embed, lambda _: True).embedded == 0 and embed.asked == 3
    os.utime(folder / "apple.rst", (1.1e9, 1.1e9))  # touched: read again, the same sha256, not embedded
    assert refresh(folder, store, embed, lambda _: True).embedded == 0 and embed.asked == 3
    (folder / "apple.rst").write_text("xxx xxx")
    (folder / "zebra.txt").unlink()
    index = refresh(folder, store, embed, lambda _: True)
    assert index.embedded == 1 and embed.asked == 4 and [*index.pages] == ["apple.rst", "deep/quilt.md"]
    assert index.find("x", query("x"), 1)[0].path == "apple.rst" and index.find("q", query("q"), 1)[0].path == "deep/quilt.md"
    kept, new = (refresh(folder, path, Letters(), lambda _: True) for path in (store, tmp_path / "new"))
    assert torch.equal(kept.vectors, new.vectors)


def test_a_file_changed_within_the_clock_is_seen(folder: Path, tmp_path: Path) -> None:
    """The same size and the same time, as where a file is written twice within one tick of its clock."""
    page = folder / "apple.rst"
    page.write_text("aaa aaa")
    before = page.stat().st_mtime_ns
    refresh(folder, tmp_path / "index", Letters(), lambda _: True)
    page.write_text("xxx xxx")
    os.utime(page, ns=(before, before))
    assert refresh(folder, tmp_path / "index", Letters(), lambda _: True).embedded == 1


def test_files_that_are_no_text_are_reported_and_empty_ones_counted(folder: Path, tmp_path: Path) -> None:
    (folder / "latin.txt").write_bytes(b"caf\xe9 au lait")
    (folder / "empty.txt").write_bytes(b"")
    (folder / "blank.md").write_text(" \n\n\t\n")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    (folder / ".hidden.txt").write_text("hidden")
    index = refresh(folder, tmp_path / "index", Letters(), lambda _: True)
    assert [*index.skipped] == ["latin.txt"] and "UTF-8" in index.skipped["latin.txt"] and "byte 3" in index.skipped["latin.txt"]
    assert sorted(index.empty) == ["blank.md", "empty.txt"] and len(index.pages) == 5
    assert {hit.path for hit in index.find("zebra", query("z"), 9)} == {"zebra.txt", "deep/quilt.md", "apple.rst"}


@pytest.mark.parametrize("damage", [b"", b"\xff" * 64, b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_damaged_index_is_made_again(folder: Path, tmp_path: Path, damage: bytes) -> None:
    store = tmp_path / "index.safetensors"
    first = refresh(folder, store, Letters(), lambda _: True)
    store.write_bytes(damage)
    again = refresh(folder, store, Letters(), lambda _: True)
    assert again.embedded == 3 and torch.equal(again.vectors, first.vectors)


def test_empty_folders_and_wrong_ones(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    index = refresh(tmp_path / "none", tmp_path / "index", Letters(), lambda _: True)
    assert index.pages == {} and index.find("a", query("a")) == []
    with pytest.raises(InputError, match="no folder"):
        refresh(tmp_path / "absent", tmp_path / "index", Letters(), lambda _: True)
    with pytest.raises(InputError, match="top is 0"):
        index.find("a", query("a"), 0)


@pytest.mark.parametrize("text", ["", "one", "a b\n\nc d\n" * 300, "x" * 5000, "word " * 2000, "é\n" * 700, "\n\n\n a \n\n\n"])
def test_passages_hold_every_word_once_and_are_bounded(text: str) -> None:
    found = passages(text, most=200)
    assert "".join("".join(text[a:b] for a, b, _ in found).split()) == "".join(text.split())
    assert all(b - a <= 200 and line == text.count("\n", 0, a) + 1 for a, b, line in found)
    assert all(len(text[a:b]) <= 50 for a, b, _ in passages(text, lambda piece: len(piece) <= 50, 200))


def language() -> dict[str, str]:
    """Python's topics as its `help` shows them, and this repository's own pages."""
    pages = {f"{name}.rst": text for name, text in topics.items()}
    return pages | {path.name: path.read_text(encoding="utf-8") for path in sorted((REPOSITORY / "docs").rglob("*.md"))}


def library() -> dict[str, str]:
    """What each standard module says of itself, from its source: its docstring, then those of its public functions and classes; the first
    1,500 characters of it but at full counts.
    """
    pages = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if path.name.startswith("_") or path.stem in ("this", "antigravity"):
            continue
        module = ast.parse(path.read_text(encoding="utf-8"))
        parts = [ast.get_docstring(module) or ""]
        for node in module.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                parts.append(f"{node.name}\n\n{ast.get_docstring(node) or ''}")
        if len(text := "\n\n".join(parts).strip()) >= 200:
            pages[f"{path.stem}.txt"] = text if FULL else text[:1500]
    return pages


# How many of each twenty find their page first, as measured: of whole pages, and of the beginnings that are read but at full counts.
SETS = {"search_queries.json": (language, 16, None), "search_queries_2.json": (library, 19, 18)}


@pytest.mark.parametrize("name", [name for name, (_, _, begun) in SETS.items() if FULL or begun])
def test_twenty_questions_find_their_page(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both sets were written down before a search was run over their pages."""
    try:
        home = pull.pull("minilm")
    except SourceError as e:
        pytest.skip(f"needs all-MiniLM-L6-v2: {e}")
    queries = json.loads((REPOSITORY / "tests/data" / name).read_text())["queries"]
    make, whole, begun = SETS[name]
    root = tmp_path / "pages"
    root.mkdir()
    for page, text in make().items():
        (root / page).write_text(text, encoding="utf-8")
        os.utime(root / page, (1e9, 1e9))
    monkeypatch.setenv("TRANSEPT_CACHE", str(tmp_path / "cache"))
    m = transept.load(home)
    index = index_of(m, root)
    asked = vectors(m, [text for text, _ in queries])
    places = {}
    for (text, page), vector in zip(queries, asked, strict=True):
        found = [hit.path for hit in index.find(text, vector, len(index.pages))]
        places[page] = found.index(page) + 1
    late = {page: place for page, place in places.items() if place > 1}
    with capsys.disabled():
        print(f"\n{name}: first for {len(places) - len(late)} of {len(places)} among {len(index.pages)} pages; later: {late}")
    least = whole if FULL else begun
    assert least is not None and len(places) == 20 and len(places) - len(late) >= least and max(places.values()) <= 12, late
    assert main(["search", str(root), queries[-2][0], "--model", str(home), "--json"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["hits"][0]["path"] == queries[-2][1] and record["embedded"] == 0
    assert math.isclose(sum(x * x for x in asked[0].tolist()), 1, abs_tol=1e-5)
