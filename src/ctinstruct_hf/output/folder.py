"""The folder of one study: written beside its place and moved there when whole."""

from __future__ import annotations

import datetime
import json
import shutil
from pathlib import Path
from typing import Any

from .._version import __version__
from ..errors import CTInstructError
from ..files import whole_folder, why_unwritable
from ..processing.volume import CTVolume
from .dicom_source import study_and_series
from .dicom_sr import findings_of
from .measure import measure
from .report import write_page
from .results import Origin, Results
from .types import NOTICE, OUTPUT_TYPES, WITHOUT_MASKS
from .writers import WRITERS as _WRITERS
from .writers import Job, check_output, file_name, file_names

# of findings.json, described by findings.schema.json beside this file; a new key raises the second number
SCHEMA_VERSION = "1.2"


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
        output_types: of `OUTPUT_TYPES`.
        multi_label: one NIfTI with all structures and a label table instead of one file each; a structure that overlaps
            an earlier one has a file of its own.
        asked: the request as settings, kept in `findings.json` beside the answers.
        keep_series_uid: keep the SeriesInstanceUID of a DICOM scan in `findings.json`, by which it can be found again.

    Returns:
        The folder.

    Raises:
        CTInstructError: where the folder cannot be written, or a scan cannot have an output type.
    """
    output_types = check_output(volume, output_types)
    job = Job(results, volume, origin, asked)
    results.notes, results.failures = [], {}
    with whole_folder(folder) as draft:
        segmentation = {
            name: {**measure(volume, mask), "known": name not in results.unknown}
            for name, mask in results.masks.items()
        }
        job.measurements = findings_of(results, segmentation)
        for output_type in output_types:
            write, place = _WRITERS[output_type]
            if not results.masks and output_type not in WITHOUT_MASKS:
                continue
            try:
                files, notes = write(job, results.masks, draft / place, multi_label)
            except Exception as error:
                if why_unwritable(error):
                    raise
                results.failures[output_type] = _sentence(error, volume, output_type)
                shutil.rmtree(draft / place) if (draft / place).is_dir() else (draft / place).unlink(missing_ok=True)
                continue
            results.notes += [note for note in notes if note not in results.notes]
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
            **({"series_uid": study_and_series(volume)[1]} if keep_series_uid else {}),
            "model": origin.model,
            "model_fingerprint": origin.fingerprint,
            "model_commit": origin.commit,
            "research_use_only": True,
            "asked": asked,
            "report": results.report,
            "answers": [{"question": question, "answer": answer} for question, answer in results.answers],
            "diagnosis": {name: round(value, 4) for name, value in results.diagnosis.items()},
            "segmentation": segmentation,
            "findings": _with_files(results.findings, segmentation),
            "fitness": results.fitness,
            "failures": [{"output_type": name, "error": why} for name, why in results.failures.items()],
            "warnings": [*origin.scan_warnings, *results.notes, *origin.model_warnings],
        }
        (draft / "findings.json").write_text(
            json.dumps(findings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        text = findings["report"] if findings["report"] is not None else "No report was asked for."
        lines = [f"{NOTICE}\n", *(f"Note: {note}\n" for note in findings["warnings"]), text, ""]
        (draft / "report.txt").write_text("\n".join(lines), encoding="utf-8")
        write_page(results, volume, origin, findings, draft / "report.html")
    return folder


def _with_files(rows: dict[str, dict[str, Any]], segmentation: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The table of findings, whose masks are the files of the segmentation."""
    named = {name: (segmentation.get(name) or {"file": None})["file"] for name in rows}
    return {
        name: {**row, "mask": None if row["mask"] is None else {**row["mask"], "file": named[name]}}
        for name, row in rows.items()
    }


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
