"""CT-RATE and its questions: reports, 18 labels, volumes of either release.

The first release (`train/`, `valid/`) has stored values: HU and spacing come from the metadata, which the headers lack. The
second (`train_fixed/`, `valid_fixed/`) has both in its headers. Where a volume is there twice, the second is taken.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import nibabel as nib

from ...modeling.configuration_ctinstruct import CT_RATE_DISEASES
from ..cases import Case, ImageRef, Label, Question
from .common import Problem, need, read_json, read_table, report_of

# split -> folder and name in the files of metadata, reports, labels, questions
_NAMES = {
    "train": ("metadata/train_metadata", "radiology_text_reports/train_reports",
              "multi_abnormality_labels/train_predicted_labels", "vqa/train_vqa"),
    "validation": ("metadata/validation_metadata", "radiology_text_reports/validation_reports",
                   "multi_abnormality_labels/valid_predicted_labels", "vqa/valid_vqa"),
}  # fmt: skip
_TAGS = {
    "<report_generation>": "report",
    "<multiple_choice>": "multiple_choice",
    "<long_answer>": "long",
    "<short_answer>": "short",
}
_TYPES = {"report_generation": "report", "multiple_choice": "multiple_choice"} | dict.fromkeys(
    ("conversation", "free_response", "description"), "long"
)
_META = {"PatientSex": "sex", "PatientAge": "age", "Manufacturer": "scanner", "ZSpacing": "slice_thickness"}
Found = TypeVar("Found")


def scans(folder: Path) -> Iterator[Case | Problem]:
    """CT-RATE, the first reconstruction of each scan that is there, as in the paper (24,128 / 1,564)."""
    taken: dict[str, Case] = {}
    missing: dict[str, Case] = {}
    for found in volumes(folder):
        if isinstance(found, Problem):
            yield found
            continue
        scan = found.id.rpartition("_")[0]
        if not Path(found.images[0].path).exists():
            missing.setdefault(scan, found)
        elif scan not in taken:
            taken[scan] = found
            yield found
    yield from (case for scan, case in missing.items() if scan not in taken)


def volumes(folder: Path) -> Iterator[Case | Problem]:
    """CT-RATE, every reconstruction of every scan; the official validation split is `validation`."""
    base = folder / "dataset" if (folder / "dataset").is_dir() else folder
    splits = [split for split, names in _NAMES.items() if _beside(base, f"{names[0]}.csv").exists()]
    if not splits:
        need(base / "metadata" / "train_metadata.csv")
    for split in splits:
        metadata, reports, labels, questions = _NAMES[split]
        texts = _rows(_beside(base, f"{reports}.csv"), ("Findings_EN", "Impressions_EN"))
        columns = [name.capitalize() for name in CT_RATE_DISEASES]
        truth = _rows(_beside(base, f"{labels}.csv"), columns)
        asked = _questions(_beside(base, f"{questions}.json"))
        table = _beside(base, f"{metadata}.csv")
        for row in read_table(table, ("VolumeName", "RescaleSlope", "RescaleIntercept", "XYSpacing", "ZSpacing")):
            name = row["VolumeName"]
            identifier = name.removesuffix(".nii.gz")
            scan = identifier.rpartition("_")[0]
            try:
                image = _image(base, identifier, row)
            except (ValueError, IndexError, TypeError) as error:
                yield Problem(identifier, f"{table.name} has no usable slope, intercept or spacing for it: {error}")
                continue
            label_row = truth.get(name) or truth.get(scan)
            yield Case(
                id=identifier,
                images=[image],
                split=split,
                source="ct_rate",
                patient=_patient(identifier),
                texts=_texts(texts.get(name) or texts.get(scan) or {}),
                labels=[
                    Label(disease, int(float(label_row[column])))
                    for disease, column in zip(CT_RATE_DISEASES, columns, strict=True)
                ]
                if label_row
                else [],
                questions=asked.get(name) or asked.get(scan) or [],
                meta={ours: row[theirs] for theirs, ours in _META.items() if row.get(theirs)},
            )


def _beside(base: Path, name: str) -> Path:
    """A table in its folder beside the volumes, in the folder above, or in either without a folder of its own."""
    flat = name.rpartition("/")[2]
    places = [parent / known for known in (name, flat) for parent in (base, base.parent)]
    return next((path for path in places if path.exists()), places[0])


def _patient(identifier: str) -> str:
    return "_".join(identifier.split("_")[:2])


def _image(base: Path, identifier: str, row: dict[str, str]) -> ImageRef:
    split, patient, scan = identifier.split("_")[0], _patient(identifier), identifier.rpartition("_")[0]
    fixed, first = (base / name / patient / scan / f"{identifier}.nii.gz" for name in (f"{split}_fixed", split))
    if fixed.exists() or (not first.exists() and fixed.parents[2].is_dir()):
        return ImageRef(str(fixed))
    across = json.loads(row["XYSpacing"])
    spacing = [float(row["ZSpacing"]), float(across[0]), float(across[1])]
    slope, intercept = float(row["RescaleSlope"]), float(row["RescaleIntercept"])
    return ImageRef(str(first), *((1.0, 0.0) if _is_scaled(first) else (slope, intercept)), spacing)


def _is_scaled(path: Path) -> bool:
    """Whether a header says how stored values become HU."""
    try:
        stored: Any = nib.load(path)
        return (stored.dataobj.slope, stored.dataobj.inter) != (1.0, 0.0)
    except Exception:  # missing or broken: told when it is read
        return False


def _rows(path: Path, columns: Sequence[str]) -> dict[str, dict[str, str]]:
    return _with_scans({row["VolumeName"]: row for row in read_table(path, ("VolumeName", *columns))})


def _with_scans(by_volume: dict[str, Found]) -> dict[str, Found]:
    """Also by scan: what is known of one reconstruction holds for all."""
    scans: dict[str, Found] = {}
    for volume, value in by_volume.items():
        scans.setdefault(volume.rpartition("_")[0], value)
    return {**scans, **by_volume}


def _texts(row: dict[str, str]) -> dict[str, str]:
    parts = {"technique": "Technique_EN", "findings": "Findings_EN", "impression": "Impressions_EN"}
    texts = {name: row.get(column, "").strip() for name, column in parts.items()}
    texts = {name: text for name, text in texts.items() if text and text.lower() != "not given."}
    report = report_of(texts)
    return {**texts, **({"report": report} if report else {})}


def _questions(path: Path) -> dict[str, list[Question]]:
    """{volume: questions}, turns of one conversation after each other; nothing where the file was not downloaded."""
    asked: dict[str, list[Question]] = {}
    if not path.exists():
        return asked
    for entry in read_json(path):
        turns = entry["conversations"]
        for number in range(0, len(turns) - 1, 2):
            human, answer = turns[number], turns[number + 1]
            text = human["value"].replace("<image>", "").strip()
            kind = next(
                (kind for tag, kind in _TAGS.items() if tag in text), _TYPES.get(human.get("type", ""), "short")
            )
            text = re.sub("|".join(_TAGS), "", text).strip()
            asked.setdefault(entry["image"], []).append(
                Question(text, answer["value"].strip(), kind, follows=number > 0)
            )
    return _with_scans(asked)


SOURCES = {"ct_rate": scans, "ct_rate_all": volumes}
