"""Tables of text files with something wrong in them, and documents packed into rows."""

from __future__ import annotations

import csv
import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from transept.core.batch import Draw
from transept.core.errors import ConfigError, InputError, SourceError
from transept.data.packing import IGNORE, Packed, bins
from transept.data.rows import Quarantine, Table
from transept.data.source import Windows, find

COLUMNS = {"text": str, "label": int}
ROWS = [{"text": f"row {i}, \"quoted\"\nand é", "label": i % 3} for i in range(50)]


def written(path: Path) -> Path:
    """The same rows in the format of the suffix."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow to write a parquet file")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        with open(path, "w", newline="", encoding="utf-8-sig") as file:
            out = csv.DictWriter(file, ["text", "label"], delimiter="\t" if path.suffix == ".tsv" else ",")
            out.writeheader()
            out.writerows(ROWS)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet"])
def test_every_format_gives_the_rows_that_its_own_writer_wrote(kind: str, tmp_path: Path) -> None:
    table = Table(written(tmp_path / f"a.{kind}"), COLUMNS)
    assert [table[i] for i in range(len(table))] == ROWS
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(table.__getitem__, range(50))) == ROWS


def test_one_percent_of_broken_rows_is_set_aside_with_file_row_and_reason(tmp_path: Path) -> None:
    path, lines = tmp_path / "a.csv", ["text,label"]
    lines += [f"text {i},1" for i in range(200)]
    lines[7], lines[150] = "no label", "text,many"
    path.write_text("\n".join(lines))
    aside = Quarantine(tmp_path / "bad.txt")
    assert len(Table(path, COLUMNS, aside)) == 198
    assert (tmp_path / "bad.txt").read_text().splitlines() == [
        f"{path}:8: 1 cells, expected 2",
        f"{path}:151: the column 'label' holds 'many', expected int",
    ]
    with pytest.raises(InputError, match=r"2 of 200 rows of .*a\.csv are bad, more than 0%"):
        Table(path, COLUMNS, Quarantine(most=0.001))


def test_empty_one_line_mixed_encodings_wrong_column_and_unknown_kinds(tmp_path: Path) -> None:
    def file(name: str, data: bytes) -> Path:
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    for name in ("a.txt", "a.jsonl", "a.csv"):
        with pytest.raises(InputError, match="is empty"):
            Table(file(name, b""), {"text": str})
    assert Table(file("b.txt", b"one line without an end"), {"text": str})[0] == {"text": "one line without an end"}
    mixed = Quarantine(most=1.0)
    assert len(Table(file("c.txt", "café\n".encode() + "café\n".encode("latin-1")), {"text": str}, mixed)) == 1
    assert mixed.reasons == [f"{tmp_path / 'c.txt'}:2: byte 3 is not UTF-8"]
    with pytest.raises(ConfigError, match=r"no column 'text' \(nearest: 'texts'\)"):
        Table(file("d.csv", b"texts,label\na,1\n"), COLUMNS)
    with pytest.raises(InputError, match=r"no row of .* is good; .*d\.jsonl:1: the column 'text' is missing \(nearest: 'texts'\)"):
        Table(file("d.jsonl", b'{"texts": "a"}\n'), {"text": str})
    with pytest.raises(SourceError, match=r"ends in '\.jsnol'.*nearest: '\.jsonl'"):
        Table(file("e.jsnol", b"x"), COLUMNS)
    with pytest.raises(SourceError, match="no file"):
        Table(tmp_path / "missing.txt", COLUMNS)
    with pytest.raises(SourceError, match="set TRANSEPT_DATA"):
        find("there/is/no/such.file")


def test_packed_rows_hold_every_document_once_and_waste_little() -> None:
    rng = random.Random(0)
    texts = [[rng.randrange(1, 30) for _ in range(rng.randint(1, 20))] for _ in range(200)]
    rows = bins([len(t) for t in texts], 20)
    assert sorted(i for row in rows for i in row) == list(range(200))
    assert all(sum(len(texts[i]) for i in row) <= 20 for row in rows)
    assert len(rows) <= 1.2 * sum(map(len, texts)) / 20 + 1
    source = Packed(texts, 20)
    batch = source.collate([source[i] for i in range(len(source))], Draw(0, 0, 0))
    found = sorted(batch["ids"][r][batch["document"][r] == d].tolist() for r in range(len(source)) for d in range(len(source.rows[r])))
    assert found == sorted(texts)
    assert int((batch["labels"] != IGNORE).sum()) == sum(len(t) - 1 for t in texts)
    with pytest.raises(InputError, match="has 21 tokens, a row has room for 20"):
        Packed([list(range(21))], 20)


def test_windows_cover_a_text() -> None:
    ids = torch.arange(50)
    source = Windows(ids, 8, 8)
    assert [source[i]["ids"].tolist() for i in range(len(source))] == [list(range(i, i + 9)) for i in range(0, 41, 8)]
    assert len(Windows(ids, 49)) == 1 and len(Windows(ids, 8)) == 42
