"""The folder of one study: written beside its place and moved there when whole."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import CTInstructError
from ..files import whole_folder
from .nifti import save_label_map, save_mask

if TYPE_CHECKING:
    from ..study import Study

OUTPUT_TYPES = ("nifti", "dicom-seg")


def file_name(name: str) -> str:
    """A structure's name as the name of a file."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or "mask"


def save_study(
    study: Study,
    folder: Path,
    *,
    output_types: tuple[str, ...] = ("nifti",),
    multi_label: bool = False,
    asked: dict[str, Any] | None = None,
) -> Path:
    """Write what a study was asked so far.

    Args:
        study: the study.
        folder: where; existing files of the same names are replaced.
        output_types: nifti, dicom-seg or both.
        multi_label: one NIfTI with all structures and a label table instead of one file each.
        asked: the request as settings, kept in `findings.json` beside the answers.

    Returns:
        The folder.

    Raises:
        CTInstructError: where the folder cannot be written, or DICOM SEG is wanted for a scan that is no DICOM.
    """
    from .report import write_page

    unknown = set(output_types) - set(OUTPUT_TYPES)
    if unknown:
        raise CTInstructError(f"output type {', '.join(sorted(unknown))} is unknown: use {', '.join(OUTPUT_TYPES)}.")
    results, volume = study.results, study.volume
    with whole_folder(folder) as draft:
        segmentation = {name: measure(volume, mask) for name, mask in results.masks.items()}
        if results.masks and "nifti" in output_types:
            (draft / "masks").mkdir()
            if multi_label:
                save_label_map(volume, results.masks, draft / "masks" / "labels.nii.gz")
            for name, mask in results.masks.items():
                file = "masks/labels.nii.gz" if multi_label else f"masks/{file_name(name)}.nii.gz"
                if not multi_label:
                    save_mask(volume, mask, draft / file)
                segmentation[name]["file"] = file
        if results.masks and "dicom-seg" in output_types:
            from .dicom_seg import save_dicom_seg

            save_dicom_seg(volume, results.masks, draft / "masks.dcm")
            for name in results.masks:
                segmentation[name].setdefault("file", "masks.dcm")
        findings = {
            "source": volume.source.name,
            "model": model_name(study),
            "research_use_only": True,
            "asked": asked,
            "report": results.report,
            "answers": [{"question": question, "answer": answer} for question, answer in results.answers],
            "diagnosis": {name: round(value, 4) for name, value in results.diagnosis.items()},
            "segmentation": segmentation,
            "warnings": study.warnings,
        }
        (draft / "findings.json").write_text(
            json.dumps(findings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        notice = "Research use only. Not a diagnosis.\n"
        text = results.report if results.report is not None else "No report was asked for."
        lines = [notice, *(f"Note: {note}\n" for note in study.warnings), text, ""]
        (draft / "report.txt").write_text("\n".join(lines), encoding="utf-8")
        write_page(study, findings, draft / "report.html")
    return folder


def measure(volume: Any, mask: np.ndarray) -> dict[str, Any]:
    """Voxels on the source's grid, their volume in ml, and the mean HU inside."""
    stored = np.asarray(volume.to_source(mask).dataobj)
    voxels = int((stored > 0).sum())
    per_voxel = abs(float(np.linalg.det(volume.source.affine[:3, :3])))
    inside = volume.hu[mask]
    return {
        "file": None,
        "volume_ml": round(voxels * per_voxel / 1000, 3),
        "mean_hu": round(float(inside.mean()), 1) if inside.size else None,
        "voxels": voxels,
    }


def model_name(study: Study) -> str:
    """The model's name without the path of this machine, and whether it is trained."""
    name = Path(str(study.model.config.name_or_path or "model")).name
    return name if study.model.config.trained else f"{name} (untrained)"
