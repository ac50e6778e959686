"""`ctinstruct data import`: data of one's own as a prepared data set."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import CTInstructError
from .prepare import prepare_cases
from .prepared import import_jsonl
from .samples import KINDS
from .sources.own import cases


def import_own(
    path: Path,
    target: Path,
    kind: str = "instructions",
    root: Path | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> dict[str, Any]:
    """A table, conversations or a folder of scans as a prepared data set; JSONL of samples is taken as it is.

    Args:
        path: see `sources.own.cases`, or JSONL as `ctinstruct data export` writes it.
        target: the folder to write.
        kind: of such JSONL: instructions or alignment.
        root: the folder that the files lie in which the rows name; the file's own by default.
        progress: called with a sentence on progress.

    Returns:
        {rows: {kind: {split: number}}, problems: number, notes: sentences on what is not used}.

    Raises:
        CTInstructError: naming the file and what it lacks.
    """
    if not path.exists():
        raise CTInstructError(f"{path} does not exist.")
    if path.is_dir() and (path / "dataset.json").is_file() and any((path / name).is_dir() for name in KINDS):
        raise CTInstructError(f"{path} is a prepared data set already: use it as it is.")
    if _holds_samples(path):
        import_jsonl(path, target, kind, root)
        rows = json.loads((target / "dataset.json").read_text(encoding="utf-8"))["rows"]
        return {"rows": rows, "problems": 0, "notes": []}
    notes: list[str] = []
    found = cases(path, root, target / "files", notes.append)
    summary = prepare_cases(path.name, found, target, progress=lambda done, total: progress(f"{done}/{total} cases"))
    return {**summary, "notes": notes}


def _holds_samples(path: Path) -> bool:
    """Whether a file is JSONL of `samples.KINDS`, which name their source in every row."""
    if path.suffix.lower() in (".csv", ".tsv", ".parquet", ".json") or not path.is_file():
        return False
    with path.open(encoding="utf-8", errors="replace") as lines:
        first = next((line for line in lines if line.strip()), "")
    try:
        row = json.loads(first)
    except ValueError:  # told with its line
        return True
    return not isinstance(row, dict) or ({"id", "source"} <= set(row) and bool({"messages", "image"} & set(row)))


__all__ = ["import_own"]
