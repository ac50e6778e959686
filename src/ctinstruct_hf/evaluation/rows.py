"""Rows to evaluate on, of one split: a prepared folder, a JSONL file, or made-up scans by seed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..data.prepared import load_rows, no_rows
from ..data.reading import PHANTOM_KINDS
from ..data.samples import SPLITS
from ..errors import CTInstructError


def split_of_data(data: str, kind: str) -> str:
    """The split that is evaluated by default: test, or validation of data without one, as CT-RATE."""
    there = splits_of(data, kind)
    return "test" if "test" in there or "validation" not in there else "validation"


def splits_of(data: str, kind: str) -> list[str]:
    """The splits that data have; of made-up scans, those that stand for them."""
    path = Path(data)
    if path.is_file():
        from ..data.samples import read_jsonl

        found = {sample.split for sample in read_jsonl(path, kind)}
        return [split for split in SPLITS if split in found]
    if path.is_dir():
        return [split for split in SPLITS if list((path / kind).glob(f"{split}-*.parquet"))]
    return ["validation", "test"]


def load_data(data: str, kind: str, split: str) -> list[dict[str, Any]]:
    """Rows of a prepared folder, of a JSONL file of instructions, or of made-up scans, `phantoms:trunk:900000-900040`.

    Raises:
        CTInstructError: where there is no such data, or no row of that split, naming the splits that there are.
    """
    if split not in SPLITS:
        raise CTInstructError(f"split is '{split}': use {', '.join(SPLITS)}.")
    made = re.fullmatch(rf"phantoms:({'|'.join(PHANTOM_KINDS)}):(\d+)-(\d+)", data)
    if made:
        from ..data.sources.made_up import phantom_rows

        seeds = range(int(made[2]), int(made[3]))
        if not len(seeds):
            raise CTInstructError(f"--data is '{data}': give first seed and last + 1.")
        # the last fifth stands for validation
        cut = len(seeds) - len(seeds) // 5
        chosen = seeds[cut:] if split == "validation" else seeds[:cut]
        return phantom_rows(made[1], chosen, split, samples=kind, workers=1 if len(seeds) < 64 else None)
    path = Path(data)
    if path.is_file():
        from ..data.samples import read_jsonl, to_row

        rows = [to_row(sample) for sample in read_jsonl(path, kind) if sample.split == split]
        if not rows and (there := splits_of(data, kind)):
            raise CTInstructError(no_rows(path, kind, split, there))
        return rows
    if not path.is_dir():
        raise CTInstructError(f"{data} does not exist: name a prepared folder, a JSONL file or phantoms:trunk:0-40.")
    return list(load_rows(path, kind, split))


__all__ = ["load_data", "split_of_data", "splits_of"]
