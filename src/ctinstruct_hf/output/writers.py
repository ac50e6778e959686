"""How results are written as each output type, and which scans can have it."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CTInstructError
from ..processing.volume import CTVolume
from .dicom_seg import check_dicom_seg, save_dicom_seg
from .dicom_sr import check_dicom_sr, save_dicom_sr
from .fhir import check_fhir, save_fhir
from .nifti import save_label_map, save_mask
from .nrrd import save_nrrd
from .results import Origin, Results
from .rtstruct import check_rtstruct, save_rtstruct
from .types import OUTPUT_TYPES, output_type

# letters of a file's name, endings not counted
_NAME_LENGTH = 80


@dataclass
class Job:
    """What the writers are given.

    Attributes:
        asked: the request as settings.
        measurements: {name: numbers} of masks and findings, see `dicom_sr.save_dicom_sr`.
    """

    results: Results
    volume: CTVolume
    origin: Origin
    asked: dict[str, Any] | None = None
    measurements: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def seed(self) -> str | None:
        """What UIDs are derived from: the request and the model; None where the request is not known."""
        if self.asked is None:
            return None
        # the scan is named by the UIDs of its files: a copy of it is the same scan
        asked = {key: value for key, value in self.asked.items() if key != "scan_fingerprint"}
        text = json.dumps([asked, self.origin.model, self.origin.fingerprint], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


# writes masks as a type at a path; returns the files by structure, as they go on from the path, and what must be noted
Write = Callable[[Job, dict[str, np.ndarray], Path, bool], tuple[dict[str, str], list[str]]]


def file_name(name: str) -> str:
    """A structure's name as the name of a file: letters and digits of any script in lower case, joined by underscores."""
    words = re.sub(r"[\W_]+", "_", unicodedata.normalize("NFKC", name).casefold()).strip("_")
    while len(words.encode()) > _NAME_LENGTH:
        words = words[:-1]
    return words or "mask"


def file_names(names: Iterable[str], taken: Iterable[str] = ()) -> dict[str, str]:
    """A file name for each structure, all different and none of `taken`: what would be the same name gets a number."""
    found: dict[str, str] = {}
    used = set(taken)
    for name in names:
        numbered = (f"{file_name(name)}_{number}" for number in itertools.count(2))
        found[name] = next(one for one in itertools.chain([file_name(name)], numbered) if one not in used)
        used.add(found[name])
    return found


def check_output(volume: CTVolume, output_types: Iterable[str]) -> tuple[str, ...]:
    """The output types by their names, in the order of writing.

    Raises:
        CTInstructError: for one that is unknown or that this scan cannot have.
    """
    wanted = {output_type(name) for name in output_types}
    if "dicom-sr" in wanted:  # which refers to the segments
        wanted.add("dicom-seg")
    unknown = sorted(wanted - set(OUTPUT_TYPES))
    if unknown:
        raise CTInstructError(f"output type {', '.join(unknown)} is unknown: use {', '.join(OUTPUT_TYPES)}.")
    found = tuple(name for name in OUTPUT_TYPES if name in wanted)
    for name in found:
        _CHECKS.get(name, lambda volume: None)(volume)
    return found


def _write_nifti(
    job: Job, masks: dict[str, np.ndarray], folder: Path, multi_label: bool
) -> tuple[dict[str, str], list[str]]:
    folder.mkdir()
    notes: list[str] = []
    alone = list(masks)
    if multi_label:
        alone = save_label_map(job.volume, masks, folder / "labels.nii.gz")
        notes = [
            f"{name} overlaps structures of the label map: it has a file of its own, and is not in the map."
            for name in alone
        ]
    stems = file_names(masks, taken=["labels"])
    for name in alone:
        save_mask(job.volume, masks[name], folder / f"{stems[name]}.nii.gz")
    return {name: f"/{stems[name] if name in alone else 'labels'}.nii.gz" for name in masks}, notes


def _write_nrrd(
    job: Job, masks: dict[str, np.ndarray], path: Path, multi_label: bool
) -> tuple[dict[str, str], list[str]]:
    save_nrrd(job.volume, masks, path)
    return dict.fromkeys(masks, ""), []


def _write_dicom_seg(
    job: Job, masks: dict[str, np.ndarray], path: Path, multi_label: bool
) -> tuple[dict[str, str], list[str]]:
    notes = save_dicom_seg(job.volume, masks, path, seed=job.seed, origin=job.origin)
    return dict.fromkeys(masks, ""), notes


def _write_dicom_label_map(
    job: Job, masks: dict[str, np.ndarray], path: Path, multi_label: bool
) -> tuple[dict[str, str], list[str]]:
    notes = save_dicom_seg(job.volume, masks, path, label_map=True, seed=job.seed, origin=job.origin)
    return dict.fromkeys(masks, ""), notes


def _write_rtstruct(
    job: Job, masks: dict[str, np.ndarray], path: Path, multi_label: bool
) -> tuple[dict[str, str], list[str]]:
    return dict.fromkeys(masks, ""), save_rtstruct(job.volume, masks, path, seed=job.seed)


def _write_dicom_sr(
    job: Job, masks: dict[str, np.ndarray], folder: Path, multi_label: bool
) -> tuple[dict[str, str], list[str]]:
    segmentation = folder.parent / WRITERS["dicom-seg"][1]
    notes = save_dicom_sr(
        job.volume,
        job.results,
        job.origin,
        job.measurements,
        folder,
        segmentation=segmentation if segmentation.is_file() else None,
        seed=job.seed,
    )
    return {}, notes


def _write_fhir(
    job: Job, masks: dict[str, np.ndarray], path: Path, multi_label: bool
) -> tuple[dict[str, str], list[str]]:
    save_fhir(job.volume, job.results, job.origin, job.measurements, path, seed=job.seed)
    return {}, []


WRITERS: dict[str, tuple[Write, str]] = {
    "nifti": (_write_nifti, "masks"),
    "nrrd": (_write_nrrd, "masks.seg.nrrd"),
    "dicom-seg": (_write_dicom_seg, "masks.dcm"),
    "dicom-seg-labelmap": (_write_dicom_label_map, "masks_labelmap.dcm"),
    "rtstruct": (_write_rtstruct, "rtstruct.dcm"),
    "dicom-sr": (_write_dicom_sr, "dicom_sr"),
    "fhir": (_write_fhir, "fhir.json"),
}
# raises CTInstructError for a scan that cannot have the type
_CHECKS: dict[str, Callable[[CTVolume], None]] = {
    "dicom-seg": check_dicom_seg,
    "dicom-seg-labelmap": check_dicom_seg,
    "rtstruct": check_rtstruct,
    "dicom-sr": check_dicom_sr,
    "fhir": check_fhir,
}

__all__ = ["WRITERS", "Job", "check_output", "file_name", "file_names"]
