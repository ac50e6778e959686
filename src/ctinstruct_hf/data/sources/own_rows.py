"""Rows of one's own, from whatever holds them: CSV, TSV, JSONL, Parquet, a saved set of `datasets`."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import CTInstructError, first_line
from .common import read_json, split_in_name

TABLES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
Row = dict[str, Any]


def is_saved_set(folder: Path) -> bool:
    """Whether a folder was written by `save_to_disk` of `datasets`, or holds Parquet files."""
    known = ("dataset_dict.json", "dataset_info.json", "state.json")
    return any((folder / name).is_file() for name in known) or next(folder.rglob("*.parquet"), None) is not None


def read_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """(where it stands, row) of each row. A set's split is put into rows that name none.

    Raises:
        CTInstructError: for a file of another kind, and for a line that is broken, with its number.
    """
    try:
        yield from _rows_of(path)
    except (UnicodeDecodeError, csv.Error) as error:
        raise CTInstructError(f"{path.name} cannot be read as a table in UTF-8: {first_line(error)}.") from error


def _rows_of(path: Path) -> Iterator[tuple[str, Row]]:
    ending = path.suffix.lower()
    if path.is_dir():
        yield from _of_folder(path)
    elif ending in (".csv", ".tsv"):
        yield from _of_text(path)
    elif ending == ".jsonl":
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{path.name}, line {number}", _parsed(line, f"{path.name}, line {number}")
    elif ending == ".json":
        rows = read_json(path)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise CTInstructError(f"{path.name} is no list of rows.")
        yield from ((f"{path.name}, row {number}", row) for number, row in enumerate(rows, start=1))
    elif ending == ".parquet":
        yield from _of_parquet(path)
    else:
        raise CTInstructError(f"{path.name} is no {', '.join(TABLES)} file, and no folder.")


def _of_text(path: Path) -> Iterator[tuple[str, Row]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        head = file.readline()
        file.seek(0)
        reader = csv.DictReader(file, delimiter=max(",;\t", key=head.count))
        names = [name or "" for name in reader.fieldnames or ()]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise CTInstructError(f"{path.name} has several columns '{twice[0]}': give each its name.")
        for row in reader:
            where = f"{path.name}, line {reader.line_num}"
            if row.get(None):  # type: ignore[call-overload]  # what csv does with cells beyond the header
                raise CTInstructError(f"{where} has more cells than the header: put texts with commas in quotes.")
            yield where, {name: value or "" for name, value in row.items() if name}


def _parsed(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise CTInstructError(f"{where} is no JSON: {error}") from error
    if not isinstance(row, dict):
        raise CTInstructError(f"{where} is no object with names and values.")
    return row


def _of_parquet(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=100)
        number = 0
        for batch in batches:
            for row in batch.to_pylist():
                number += 1
                yield f"{path.name}, row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise CTInstructError(f"{path.name} cannot be read as Parquet: {first_line(error)}.") from error


def _of_folder(folder: Path) -> Iterator[tuple[str, Row]]:
    files = sorted(folder.rglob("*.parquet"))
    if files:
        for path in files:
            split = split_in_name(path.relative_to(folder).as_posix())
            yield from ((where, {"split": split, **row}) for where, row in _of_parquet(path))
        return
    from datasets import Dataset, DatasetDict, load_from_disk

    try:
        loaded = load_from_disk(str(folder))
    except Exception as error:  # datasets raises many kinds
        raise CTInstructError(f"{folder} is no readable set of datasets: {first_line(error)}.") from error
    parts: dict[str, Dataset] = dict(loaded) if isinstance(loaded, DatasetDict) else {"": loaded}
    for split, rows in parts.items():
        number = 0
        given = {"split": split_in_name(split)} if split else {}
        for batch in rows.with_format("arrow").iter(100):  # as stored: pictures and scans are not decoded
            for row in batch.to_pylist():
                number += 1
                yield f"{folder.name}/{split}, row {number}".replace("/,", ","), {**given, **row}
