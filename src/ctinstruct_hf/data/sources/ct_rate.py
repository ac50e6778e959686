"""CT-RATE and its questions: reports, 18 labels, HU and spacing from the metadata, which the NIfTI headers lack."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from ...modeling.configuration_ctinstruct import CT_RATE_DISEASES
from ..cases import Case, ImageRef, Label, Question
from .common import Problem, need, read_json, read_table

# split -> names in the files of metadata, reports, labels, questions
_NAMES = {
    "train": ("train_metadata", "train_reports", "train_predicted_labels", "train_vqa"),
    "validation": ("validation_metadata", "validation_reports", "valid_predicted_labels", "valid_vqa"),
}
_TAGS = {
    "<report_generation>": "report",
    "<multiple_choice>": "multiple_choice",
    "<long_answer>": "long",
    "<short_answer>": "short",
}
_META = {"PatientSex": "sex", "PatientAge": "age", "Manufacturer": "scanner", "ZSpacing": "slice_thickness"}


def cases(folder: Path) -> Iterator[Case | Problem]:
    """Volumes of both splits; the official validation split is `validation`."""
    base = folder / "dataset" if (folder / "dataset").is_dir() else folder
    found = [split for split, names in _NAMES.items() if (base / "metadata" / f"{names[0]}.csv").exists()]
    if not found:
        need(base / "metadata" / "train_metadata.csv")
    for split in found:
        metadata, reports, labels, questions = _NAMES[split]
        texts = {
            row["VolumeName"]: row
            for row in read_table(
                base / "radiology_text_reports" / f"{reports}.csv", ("VolumeName", "Findings_EN", "Impressions_EN")
            )
        }
        columns = [name.capitalize() for name in CT_RATE_DISEASES]
        truth = {
            row["VolumeName"]: row
            for row in read_table(base / "multi_abnormality_labels" / f"{labels}.csv", ("VolumeName", *columns))
        }
        asked = _questions(base / "vqa" / f"{questions}.json")
        rows = read_table(
            base / "metadata" / f"{metadata}.csv",
            ("VolumeName", "RescaleSlope", "RescaleIntercept", "XYSpacing", "ZSpacing"),
        )
        for row in rows:
            name = row["VolumeName"]
            identifier = name.removesuffix(".nii.gz")
            patient = "_".join(identifier.split("_")[:2])
            scan = identifier.rpartition("_")[0]
            path = base / identifier.split("_")[0] / patient / scan / name
            try:
                across = json.loads(row["XYSpacing"])
                image = ImageRef(
                    str(path),
                    float(row["RescaleSlope"]),
                    float(row["RescaleIntercept"]),
                    [float(row["ZSpacing"]), float(across[0]), float(across[1])],
                )
            except (ValueError, IndexError, TypeError) as error:
                yield Problem(identifier, f"{metadata}.csv has no usable slope, intercept or spacing for it: {error}")
                continue
            label_row = truth.get(name)
            yield Case(
                id=identifier,
                images=[image],
                split=split,
                source="ct_rate",
                patient=patient,
                texts=_texts(texts.get(name, {})),
                labels=[
                    Label(disease, int(float(label_row[column])))
                    for disease, column in zip(CT_RATE_DISEASES, columns, strict=True)
                ]
                if label_row
                else [],
                questions=asked.get(name, []),
                meta={ours: row[theirs] for theirs, ours in _META.items() if row.get(theirs)},
            )


def _texts(row: dict[str, str]) -> dict[str, str]:
    parts = {"technique": "Technique_EN", "findings": "Findings_EN", "impression": "Impressions_EN"}
    texts = {name: row.get(column, "").strip() for name, column in parts.items()}
    texts = {name: text for name, text in texts.items() if text and text.lower() != "not given."}
    sections = [f"{name.capitalize()}: {texts[name]}" for name in ("findings", "impression") if name in texts]
    return {**texts, **({"report": " ".join(sections)} if sections else {})}


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
            kind = next((kind for tag, kind in _TAGS.items() if tag in text), "short")
            text = re.sub("|".join(_TAGS), "", text).strip()
            asked.setdefault(entry["image"], []).append(
                Question(text, answer["value"].strip(), kind, follows=number > 0)
            )
    return asked


SOURCES = {"ct_rate": cases}
