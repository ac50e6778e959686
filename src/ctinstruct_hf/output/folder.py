"""The folder of one study: written beside its place and moved there when whole."""

from __future__ import annotations

import datetime
import itertools
import json
import re
import shutil
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from .._version import __version__
from ..errors import CTInstructError
from ..files import whole_folder, why_unwritable
from ..processing.volume import CTVolume
from .dicom_seg import check_dicom_seg, save_dicom_seg, series_uid
from .measure import measure
from .nifti import save_label_map, save_mask
from .report import write_page
from .results import Origin, Results

OUTPUT_TYPES = ("nifti", "dicom-seg")
# of findings.json, described by findings.schema.json beside this file; a new key raises the second number
SCHEMA_VERSION = "1.0"
# letters of a file's name, endings not counted
_NAME_LENGTH = 80


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


def check_output(volume: CTVolume, output_types: Iterable[str]) -> None:
    """Raises CTInstructError for an output type that is unknown or that this scan cannot have."""
    unknown = sorted(set(output_types) - set(OUTPUT_TYPES))
    if unknown:
        raise CTInstructError(f"output type {', '.join(unknown)} is unknown: use {', '.join(OUTPUT_TYPES)}.")
    if "dicom-seg" in output_types:
        check_dicom_seg(volume)


def save_results(
    results: Results,
    volume: CTVolume,
    origin: Origin,
    folder: Path,
    *,
    output_types: tuple[str, ...] = ("nifti",),
    multi_label: bool = False,
    asked: dict[str, Any] | None = None,
    keep_series_uid: bool = False,
) -> Path:
    """Write the folder of one scan's results.

    An output type that cannot be written does not keep the others from being written: it is listed under `failures` of
    `findings.json` and in `results.failures`.

    Args:
        results: what came out; their `notes` and `failures` are set.
        volume: the scan.
        origin: what made the results.
        folder: where; existing files of the same names are replaced.
        output_types: nifti, dicom-seg or both.
        multi_label: one NIfTI with all structures and a label table instead of one file each; a structure that overlaps
            an earlier one has a file of its own.
        asked: the request as settings, kept in `findings.json` beside the answers.
        keep_series_uid: keep the SeriesInstanceUID of a DICOM scan in `findings.json`, by which it can be found again.

    Returns:
        The folder.

    Raises:
        CTInstructError: where the folder cannot be written, or DICOM SEG is wanted for a scan that is no DICOM.
    """
    check_output(volume, output_types)
    results.notes, results.failures = [], {}
    with whole_folder(folder) as draft:
        segmentation = {name: measure(volume, mask) for name, mask in results.masks.items()}
        for output_type in OUTPUT_TYPES:
            if not results.masks or output_type not in output_types:
                continue
            write, place = _WRITERS[output_type]
            try:
                files, notes = write(volume, results.masks, draft / place, multi_label)
            except Exception as error:
                if why_unwritable(error):
                    raise
                results.failures[output_type] = _sentence(error, volume, output_type)
                shutil.rmtree(draft / place) if (draft / place).is_dir() else (draft / place).unlink(missing_ok=True)
                continue
            results.notes += notes
            for name, file in files.items():
                segmentation[name]["file"] = segmentation[name]["file"] or f"{place}{file}"
        results.notes += _cut_off_note(segmentation) + [
            f"No {output_type} was written: {why}" for output_type, why in results.failures.items()
        ]
        findings: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "package_version": __version__,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "source": volume.source.name,
            **({"series_uid": series_uid(volume)} if keep_series_uid else {}),
            "model": origin.model,
            "model_fingerprint": origin.fingerprint,
            "model_commit": origin.commit,
            "research_use_only": True,
            "asked": asked,
            "report": results.report,
            "answers": [{"question": question, "answer": answer} for question, answer in results.answers],
            "diagnosis": {name: round(value, 4) for name, value in results.diagnosis.items()},
            "segmentation": segmentation,
            "failures": [{"output_type": name, "error": why} for name, why in results.failures.items()],
            "warnings": [*origin.scan_warnings, *results.notes, *origin.model_warnings],
        }
        (draft / "findings.json").write_text(
            json.dumps(findings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        notice = "Research use only. Not a diagnosis.\n"
        text = findings["report"] if findings["report"] is not None else "No report was asked for."
        lines = [notice, *(f"Note: {note}\n" for note in findings["warnings"]), text, ""]
        (draft / "report.txt").write_text("\n".join(lines), encoding="utf-8")
        write_page(results, volume, origin, findings, draft / "report.html")
    return folder


def _write_nifti(
    volume: CTVolume, masks: dict[str, np.ndarray], folder: Path, multi_label: bool
) -> tuple[dict[str, str], list[str]]:
    """Files by structure, as they go on from the name of what was written; and what must be said about them."""
    folder.mkdir()
    notes: list[str] = []
    alone = list(masks)
    if multi_label:
        alone = save_label_map(volume, masks, folder / "labels.nii.gz")
        notes = [
            f"{name} overlaps structures of the label map: it has a file of its own, and is not in the map."
            for name in alone
        ]
    stems = file_names(masks, taken=["labels"])
    for name in alone:
        save_mask(volume, masks[name], folder / f"{stems[name]}.nii.gz")
    return {name: f"/{stems[name] if name in alone else 'labels'}.nii.gz" for name in masks}, notes


def _write_dicom_seg(
    volume: CTVolume, masks: dict[str, np.ndarray], path: Path, multi_label: bool
) -> tuple[dict[str, str], list[str]]:
    return dict.fromkeys(masks, ""), save_dicom_seg(volume, masks, path)


_WRITERS = {"nifti": (_write_nifti, "masks"), "dicom-seg": (_write_dicom_seg, "masks.dcm")}


def _sentence(error: Exception, volume: CTVolume, output_type: str) -> str:
    """Why an output type was not written; what a library says may quote the scan, so only its type is passed on."""
    if isinstance(error, CTInstructError):
        return str(error)
    return f"{volume.source.name or 'The scan'} cannot be written as {output_type} ({type(error).__name__})."


def _cut_off_note(segmentation: dict[str, dict[str, Any]]) -> list[str]:
    """The structures that the scan does not hold whole, in one sentence."""
    cut = [f"{name} ({', '.join(numbers['cut_off'])})" for name, numbers in segmentation.items() if numbers["cut_off"]]
    if not cut:
        return []
    return [f"Cut off by the edge of the scan: {', '.join(cut)}. The volume is that of the part inside."]


__all__ = ["OUTPUT_TYPES", "check_output", "file_name", "file_names", "measure", "save_results"]
