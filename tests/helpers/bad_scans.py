"""Files that are no scan, each with what is to be said of it."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image
from scans import as_nifti, asymmetric, dicom_series


def bad_files(folder: Path) -> dict[str, tuple[Path, str]]:
    good = as_nifti(asymmetric((8, 16, 16)), "RAS")
    nib.save(good, folder / "good.nii.gz")
    raw = (folder / "good.nii.gz").read_bytes()
    (folder / "cut.nii.gz").write_bytes(raw[: len(raw) // 2])
    (folder / "noise.nii.gz").write_bytes(bytes(range(256)) * 20)
    (folder / "empty").mkdir()
    (folder / "nothing.nii").touch()
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4, 3), np.int16), np.eye(4)), folder / "four.nii.gz")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3)).astype(np.uint8)).save(folder / "colour.png")
    dicom_series(folder / "mr", asymmetric((3, 8, 8)), Modality="MR")
    (folder / "text.txt").write_text("hello")
    return {
        "missing": (folder / "nowhere.nii.gz", "does not exist"),
        "no DICOM": (folder / "empty", "no DICOM file"),
        "truncated": (folder / "cut.nii.gz", "cut short|no readable NIfTI"),
        "unreadable": (folder / "noise.nii.gz", "no NIfTI|no readable NIfTI"),
        "empty": (folder / "nothing.nii", "is empty"),
        "4D": (folder / "four.nii.gz", "4D"),
        "colour": (folder / "colour.png", "colour image"),
        "MR": (folder / "mr", "no CT image"),
        "no scan": (folder / "text.txt", "neither DICOM nor"),
    }
