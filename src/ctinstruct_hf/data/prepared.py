"""Prepared data sets on disk: a folder of Parquet files by kind and split, read with `datasets`, whole or streamed.

dataset/
  dataset.json                  what was prepared, from where, how many
  problems.jsonl                cases that could not be used, and why
  alignment/train-00000.parquet
  instructions/train-00000.parquet
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import CTInstructError
from ..files import whole_file, write_whole
from .cases import SPLITS
from .names import in_known_words, spell
from .reading import path_named
from .samples import KINDS, features, from_row, read_jsonl, to_row

ROWS_A_FILE = 20_000


def write_rows(folder: Path, kind: str, rows: Sequence[dict[str, Any]]) -> None:
    """Rows of all splits as Parquet, each file whole or not there."""
    from datasets import Dataset

    target = folder / kind
    target.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        chosen = [row for row in rows if row["split"] == split]
        for number, first in enumerate(range(0, len(chosen), ROWS_A_FILE)):
            table = Dataset.from_list(chosen[first : first + ROWS_A_FILE], features=features(kind))
            with whole_file(target / f"{split}-{number:05d}.parquet") as temporary:
                table.to_parquet(temporary)


def files_of(folder: Path, kind: str, split: str) -> list[str]:
    """Raises CTInstructError where the data set has no such rows."""
    found = sorted(str(path) for path in (folder / kind).glob(f"{split}-*.parquet"))
    if not found:
        there = [one for one in SPLITS if list((folder / kind).glob(f"{one}-*.parquet"))]
        raise CTInstructError(no_rows(folder, kind, split, there))
    return found


def no_rows(path: Path, kind: str, split: str, there: Sequence[str]) -> str:
    """That a data set lacks a split, and which it has."""
    return f"{path} has no {kind} rows of split {split}: it has {', '.join(there) or 'no split at all'}."


def load_rows(folder: Path, kind: str, split: str, streaming: bool = False) -> Any:
    """A `datasets.Dataset` of rows, or an `IterableDataset` that is read as it goes."""
    from datasets import IterableDataset, load_dataset
    from datasets.utils import logging

    logging.set_verbosity_error()
    files = files_of(folder, kind, split)
    rows = load_dataset(
        "parquet", data_files={split: files}, split=split, streaming=streaming, features=features(kind),
        cache_dir=None if streaming else str(folder / ".arrow"),
    )  # fmt: skip
    assert streaming == isinstance(rows, IterableDataset)
    return rows


def iterate(folder: Path, kinds: Iterable[str] = tuple(KINDS)) -> Iterator[tuple[str, str, int, dict[str, Any]]]:
    """(kind, file, row number, row) of everything in a prepared data set, or in a JSONL file of instructions."""
    if folder.is_file():
        for number, sample in enumerate(read_jsonl(folder), start=1):
            yield "instructions", folder.name, number, to_row(sample)
        return
    if not any((folder / kind).is_dir() for kind in KINDS):
        raise CTInstructError(f"{folder} is no prepared data set: make it with ctinstruct data prepare.")
    import pyarrow.parquet

    for kind in kinds:
        for path in sorted((folder / kind).glob("*.parquet")):
            number = 0
            for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield kind, path.name, number, row


def export_jsonl(folder: Path, target: Path, kind: str = "instructions") -> int:
    """The rows of one kind as JSONL; how many."""
    from .samples import write_jsonl

    return write_jsonl((from_row(row, kind) for _, _, _, row in iterate(folder, [kind])), target)


def import_jsonl(path: Path, folder: Path, kind: str = "instructions", root: Path | None = None) -> int:
    """A JSONL file as a prepared data set; how many rows. Errors give file and line.

    Masks get the names of `names.yaml` where they are written as in other data sets ("Kidney_Left"), in the texts too.

    Args:
        path: the JSONL file.
        folder: where the data set is written.
        kind: of `KINDS`.
        root: the folder that the files it names lie in, relative to it or absolute; the JSONL file's own by default.

    Raises:
        CTInstructError: for a malformed sample, and for a file that lies outside of `root`, by its path or by a link.
    """
    if not path.is_file():
        raise CTInstructError(f"{path} does not exist.")
    rows = []
    for number, sample in enumerate(read_jsonl(path, kind), start=1):
        row = _in_known_words(to_row(sample))
        for one in named_files(row):
            one["path"] = path_named(one["path"], root or path.parent, f"{path.name}, sample {number}")
        rows.append(row)
    if not rows:
        raise CTInstructError(f"{path.name} has no sample.")
    write_rows(folder, kind, rows)
    describe(folder, {"source": path.name, "rows": {kind: dict(Counter(row["split"] for row in rows))}})
    return len(rows)


def _in_known_words(row: dict[str, Any]) -> dict[str, Any]:
    known = in_known_words(mask["name"] for mask in row["masks"])
    for mask in row["masks"]:
        mask["name"] = known.get(mask["name"], mask["name"])
    for part in [part for turn in row.get("messages", ()) for part in turn["content"]]:
        if part["type"] == "text":
            part["text"] = spell(part["text"], known)
    return row


def named_files(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of a row of either kind that name a file."""
    return [*(row["images"] if "images" in row else [row["image"]]), *row["masks"]]


def describe(folder: Path, summary: dict[str, Any]) -> None:
    """Write `dataset.json`, last of all: a folder without it is not finished."""
    write_whole(folder / "dataset.json", json.dumps(summary, indent=1))
