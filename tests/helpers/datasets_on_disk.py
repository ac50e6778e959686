"""Writes small folders in the layouts of public data sets."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

SHAPE = (12, 10, 4)  # of the files: i, j, k


def nifti(path: Path, labels: tuple[int, ...] = (), stored: int = -500) -> None:
    """A scan, or a label file with each label in a layer of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    voxels = np.full(SHAPE, 0 if labels else stored, np.uint8 if labels else np.int16)
    for place, label in enumerate(labels):
        voxels[2 * place : 2 * place + 2] = label
    nib.save(nib.Nifti1Image(voxels, np.diag([1.0, 1.0, 2.0, 1.0])), path)


def table(path: Path, rows: list[dict[str, Any]], delimiter: str = ",") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def nnunet(raw: Path, cases: int) -> None:
    """Scans with one of two labels in turn."""
    raw.mkdir()
    (raw / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "one": 1, "two": 2}}))
    for number in range(cases):
        nifti(raw / "imagesTr" / f"c{number:02d}_0000.nii.gz")
        nifti(raw / "labelsTr" / f"c{number:02d}.nii.gz", (1 + number % 2,))


def totalsegmentator(raw: Path) -> None:
    for case in ("s0001", "s0002"):
        nifti(raw / case / "ct.nii.gz")
        nifti(raw / case / "segmentations" / "liver.nii.gz", (1,))
        nifti(raw / case / "segmentations" / "kidney_left.nii.gz", (0, 1) if case == "s0001" else (0,))
    (raw / "s0003").mkdir()
    table(raw / "meta.csv", [
        {"image_id": f"s000{number}", "age": 50, "gender": "m", "split": split}
        for number, split in ((1, "train"), (2, "val"), (3, "test"))
    ], ";")  # fmt: skip
