"""Rows of a split to evaluate on: of a prepared folder, a JSONL file, or a data set that is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..data.prepare import is_made, open_rows
from ..data.prepared import no_rows
from ..data.samples import SPLITS
from ..data.sources import MADE
from ..errors import CTInstructError


def split_of_data(data: str, row_type: str) -> str:
    """The split that is evaluated by default: test, or validation of data without one, as CT-RATE."""
    there = splits_of(data, row_type)
    return "test" if "test" in there or "validation" not in there else "validation"


def splits_of(data: str, row_type: str) -> list[str]:
    """The splits that data have; a made set is cut into validation and test."""
    path = Path(data)
    if path.is_file():
        from ..data.samples import read_jsonl

        found = {sample.split for sample in read_jsonl(path, row_type)}
        return [split for split in SPLITS if split in found]
    if path.is_dir():
        return [split for split in SPLITS if list((path / row_type).glob(f"{split}-*.parquet"))]
    return ["validation", "test"]


def load_data(data: str, row_type: str, split: str) -> list[dict[str, Any]]:
    """Rows of a prepared folder, of a JSONL file of instructions, or of a made set, see `data.prepare.open_rows`.

    Raises:
        CTInstructError: where there is no such data, or no row of that split, naming the splits that there are.
    """
    if split not in SPLITS:
        raise CTInstructError(f"split is '{split}': use {', '.join(SPLITS)}.")
    if is_made(data):
        rows = list(open_rows(data, row_type, split))
        patients = list(dict.fromkeys(row["patient"] for row in rows))
        cut = len(patients) - len(patients) // 5  # a made set has no splits: its last fifth is taken as validation
        chosen = set(patients[cut:] if split == "validation" else patients[:cut])
        return [row for row in rows if row["patient"] in chosen]
    path = Path(data)
    if path.is_file():
        from ..data.samples import read_jsonl, to_row

        rows = [to_row(sample) for sample in read_jsonl(path, row_type) if sample.split == split]
        if not rows and (there := splits_of(data, row_type)):
            raise CTInstructError(no_rows(path, row_type, split, there))
        return rows
    if not path.is_dir():
        examples = ", ".join(made.example for made in MADE.values())
        raise CTInstructError(
            f"{data} does not exist: name a prepared folder, a JSONL file or scans to make, as {examples}."
        )
    return list(open_rows(path, row_type, split))


__all__ = ["load_data", "split_of_data", "splits_of"]
