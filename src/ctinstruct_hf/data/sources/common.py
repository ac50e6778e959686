"""What the sources share: tables whose columns are checked, splits by patient, label files turned into masks."""

from __future__ import annotations

import csv
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import CTInstructError
from ..cases import MaskRef

csv.field_size_limit(2**24)  # reports and answers can be long


@dataclass
class Problem:
    """A case that cannot be used, and why; it is listed, not dropped in silence."""

    id: str
    reason: str


def need(path: Path) -> Path:
    """The path, which must exist. Raises CTInstructError."""
    if not path.exists():
        raise CTInstructError(f"{path} is missing: is this the folder of the data set?")
    return path


def read_table(path: Path, columns: Sequence[str], delimiter: str = ",") -> list[dict[str, str]]:
    """Rows of a CSV file that has at least these columns. Raises CTInstructError naming file and column."""
    with need(path).open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter)
        missing = [name for name in columns if name not in (reader.fieldnames or ())]
        if missing:
            raise CTInstructError(f"{path.name} has no column {', '.join(missing)}; it has {reader.fieldnames}.")
        return [{key: value or "" for key, value in row.items() if key is not None} for row in reader]


def read_json(path: Path) -> Any:
    """Raises CTInstructError naming the file."""
    try:
        return json.loads(need(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise CTInstructError(f"{path.name} is no readable JSON: {error}") from error


def split_of(patient: str, validation: float = 0.05, test: float = 0.1) -> str:
    """The split of a patient where a data set publishes none: the same for every file of the patient, on any machine."""
    place = zlib.crc32(patient.encode()) / 2**32
    return "test" if place < test else "validation" if place < test + validation else "train"


def split_in_name(name: str) -> str:
    """train, validation or test, as a file or folder name says it; train where it says nothing."""
    lowered = name.lower()
    if "test" in lowered or "tst" in lowered:
        return "test"
    return "validation" if "val" in lowered else "train"


def report_of(texts: Mapping[str, str]) -> str:
    """Findings and impression as one report, with their headings; "" where there is neither."""
    return " ".join(f"{name.capitalize()}: {texts[name]}" for name in ("findings", "impression") if name in texts)


def label_values(listed: Mapping[str, Any]) -> dict[str, list[int]]:
    """{structure: values} of {name: value or values}, or of {value: name} as MSD has it, without background."""
    found: dict[str, list[int]] = {}
    for key, given in listed.items():
        name, values = (given, key) if isinstance(given, str) else (key, given)
        ids = [int(one) for one in values] if isinstance(values, list) else [int(values)]
        if name.lower() not in ("background", "ignore"):
            found[name] = ids
    return found


def masks_of(path: Path, names: dict[str, list[int]]) -> list[MaskRef]:
    """One mask per structure of a label file; those that a case lacks are found when the file is read."""
    return [MaskRef(name, str(path), values) for name, values in names.items()]


def nifti_name(path: Path) -> str:
    """A NIfTI file's name without its suffixes."""
    return path.name.removesuffix(".gz").removesuffix(".nii")


def niftis(folder: Path, pattern: str = "*.nii*") -> Iterator[Path]:
    """NIfTI files of a folder in order."""
    yield from sorted(path for path in folder.glob(pattern) if path.name.endswith((".nii", ".nii.gz")))
