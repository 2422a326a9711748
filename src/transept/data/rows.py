"""Rows of text files (txt, jsonl, csv, tsv, parquet), each checked; what is wrong is set aside with its file, row and reason."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transept.core.errors import ConfigError, InputError, SourceError, nearest

LONGEST = 1 << 20
"""Bytes of one line; a longer one is set aside unread."""

Row = dict[str, Any]
Check = Callable[[Row], str]
"""What is wrong with a row, in words; "" where nothing is."""


@dataclass
class Quarantine:
    """Rows that were set aside: "file:row: reason" each, counted, and written to `path` where one is given."""

    path: Path | None = None
    most: float = 0.05
    """The share of bad rows above which reading ends with an error."""
    reasons: list[str] = field(default_factory=list)

    def add(self, file: Path, row: int, reason: str) -> None:
        """Sets one row aside."""
        self.reasons.append(f"{file}:{row}: {reason}")

    def close(self, file: Path, rows: int) -> None:
        """Writes the list. Errors: InputError where more than the allowed share was bad."""
        if self.path is not None and self.reasons:
            self.path.write_text("".join(f"{line}\n" for line in self.reasons), encoding="utf-8")
        bad = len(self.reasons)
        if rows and bad > self.most * rows:
            raise InputError(f"{bad} of {rows} rows of {file} are bad, more than {self.most:.0%}; the first: {self.reasons[0]}")


class Table:
    """The good rows of one file, by number.

    `columns` are the names that each row must have, with their types; `check` may refuse a row for a reason of its own. Rows of txt and
    jsonl files are read from the disk as they are asked for; csv and parquet are held in memory.

    Errors: SourceError for a file that is not there or of an unknown kind, InputError for one that is empty or mostly bad, ConfigError for
    a column that no row has.
    """

    def __init__(self, path: str | Path, columns: Mapping[str, type], quarantine: Quarantine | None = None, check: Check | None = None):
        self.path, self.columns, self.check = Path(path), dict(columns), check
        self.quarantine = quarantine or Quarantine()
        if not self.path.is_file():
            raise SourceError(f"there is no file {self.path}")
        kinds = {".txt": self._lines, ".jsonl": self._lines, ".csv": self._cells, ".tsv": self._cells, ".parquet": self._parquet}
        if self.path.suffix not in kinds:
            ending = self.path.suffix
            raise SourceError(f"{self.path} ends in {ending!r}, expected one of {', '.join(kinds)}{nearest(ending, kinds)}")
        self.places: list[tuple[int, int]] = []
        self.held: list[Row] = []
        self._file: int | None = None
        rows = 0
        for number, place, row, reason in kinds[self.path.suffix]():
            rows += 1
            reason = reason or self._wrong(row)
            if reason:
                self.quarantine.add(self.path, number, reason)
            elif place is not None:
                self.places.append(place)
            else:
                self.held.append(row)
        if not rows:
            raise InputError(f"{self.path} is empty; expected at least one row")
        if not len(self):
            raise InputError(f"no row of {self.path} is good; the first: {self.quarantine.reasons[0]}")
        self.quarantine.close(self.path, rows)

    def __len__(self) -> int:
        return len(self.places) + len(self.held)

    def __getitem__(self, index: int) -> Row:
        if self.held:
            return self.held[index]
        begin, length = self.places[index]
        if self._file is None:
            self._file = os.open(self.path, os.O_RDONLY)
        # pread has no position that threads could fight over.
        data = os.pread(self._file, length, begin)
        return {next(iter(self.columns)): data.decode()} if self.path.suffix == ".txt" else json.loads(data)

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            os.close(self._file)  # type: ignore[arg-type]

    def _wrong(self, row: Row) -> str:
        for name, kind in self.columns.items():
            if name not in row:
                return f"the column {name!r} is missing{nearest(name, row)}"
            value = row[name]
            if kind is float and type(value) is int:
                continue
            if type(value) is not kind:
                return f"the column {name!r} holds {type(value).__name__}, expected {kind.__name__}"
            if kind is str and not value.strip():
                return f"the column {name!r} is empty"
            if kind is float and not abs(value) < float("inf"):
                return f"the column {name!r} is {value}, expected a finite number"
        return self.check(row) if self.check is not None else ""

    def _lines(self) -> Iterator[tuple[int, tuple[int, int] | None, Row, str]]:
        """(row number, its bytes' place, the row, what is wrong) of a file with one row a line; blank lines at the end are none."""
        begin = 0
        with open(self.path, "rb") as file:
            if file.read(3) == b"\xef\xbb\xbf":
                begin = 3
            file.seek(begin)
            number = 0
            while True:
                line = file.readline(LONGEST + 1)
                if not line:
                    return
                number += 1
                length = len(line)
                long = length > LONGEST
                while long and not line.endswith(b"\n"):
                    line = file.readline(LONGEST)
                    length += len(line)
                    if not line:
                        break
                body = b"" if long else line.rstrip(b"\r\n")
                place = (begin, len(body))
                begin += length
                yield number, place, *((({}, f"the line has {length} bytes, expected at most {LONGEST}")) if long else self._parsed(body))

    def _parsed(self, body: bytes) -> tuple[Row, str]:
        try:
            text = body.decode()
        except UnicodeDecodeError as e:
            return {}, f"byte {e.start} is not UTF-8"
        if not text.strip():
            return {}, "the row is empty"
        if self.path.suffix == ".txt":
            return {next(iter(self.columns)): text}, ""
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as e:
            return {}, f"not JSON: {str(e)[:80]}"
        return (row, "") if isinstance(row, dict) else ({}, f"a JSON {type(row).__name__}, expected an object")

    def _cells(self) -> Iterator[tuple[int, None, Row, str]]:
        data = self.path.read_bytes().removeprefix(b"\xef\xbb\xbf")
        text = io.StringIO(data.decode("utf-8", errors="surrogateescape"), newline="")
        csv.field_size_limit(LONGEST)
        reader = csv.reader(text, delimiter="\t" if self.path.suffix == ".tsv" else ",")
        names = next(reader, None)
        if names is None:
            return
        for name in self.columns:
            if name not in names:
                raise ConfigError(f"{self.path} has no column {name!r}{nearest(name, names)}; it has {', '.join(names)}")
        number = 1
        while True:
            number += 1
            try:
                cells = next(reader, None)
            except csv.Error as e:
                yield number, None, {}, str(e)
                continue
            if cells is None:
                return
            if cells:
                yield number, None, *self._row(names, cells)

    def _row(self, names: list[str], cells: list[str]) -> tuple[Row, str]:
        if len(cells) != len(names):
            return {}, f"{len(cells)} cells, expected {len(names)}"
        row: Row = dict(zip(names, cells, strict=True))
        for name, kind in self.columns.items():
            if any("\udc80" <= c <= "\udcff" for c in row[name]):
                return {}, f"the column {name!r} is not UTF-8"
            try:
                row[name] = kind(row[name])
            except ValueError:
                return {}, f"the column {name!r} holds {row[name][:40]!r}, expected {kind.__name__}"
        return row, ""

    def _parquet(self) -> Iterator[tuple[int, None, Row, str]]:
        try:
            from pyarrow import parquet
        except ImportError as e:
            raise SourceError(f"{self.path} needs the package pyarrow; pip install 'transept[data]'") from e
        file = parquet.ParquetFile(self.path)
        for name in self.columns:
            if name not in file.schema_arrow.names:
                raise ConfigError(f"{self.path} has no column {name!r}{nearest(name, file.schema_arrow.names)}")
        number = 0
        for batch in file.iter_batches(columns=list(self.columns)):
            for row in batch.to_pylist():
                number += 1
                yield number, None, row, ""
