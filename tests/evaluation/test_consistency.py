"""Contradictions within what one system says about a finding of a scan, whoever the system is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from wordnets import needs_wordnet

from ctinstruct_hf.evaluation.predictions import Predictions, Record
from ctinstruct_hf.evaluation.scoring import score_predictions
from ctinstruct_hf.evaluation.tables import all_tables


def contradictions(records: list[Record], folder: Path = Path(), thresholds: Any = 0.5) -> dict[str, dict[str, float]]:
    scores = score_predictions(Predictions("Mine", records, folder), thresholds, bootstraps=5, workers=1)
    found = scores.find("consistency", "")
    return {} if found is None else found.per_sample


def diagnosis(scan: str, split: str = "test", **probabilities: float) -> Record:
    names = {name.replace("_", " "): value for name, value in probabilities.items()}
    labels = {name: int(value >= 0.5) for name, value in names.items()}
    return Record(f"{scan}/diagnosis-0", "diagnosis", split=split, probabilities=names, labels=labels)


@needs_wordnet
def test_a_report_contradicts_a_probability(tmp_path: Path) -> None:
    report = Record("a/report-0", "report", prediction="There is emphysema. No pleural effusion.", reference="x")
    other = Record("b/report-0", "report", prediction="Emphysema.", reference="x")
    asked = diagnosis("a", emphysema=0.9, pleural_effusion=0.7, cardiomegaly=0.8)
    found = contradictions([report, asked, other])
    assert found["contradictory"] == {"a: emphysema": 0.0, "a: pleural effusion": 1.0}  # scan b has one source only
    assert found["report / probability"] == found["contradictory"]
    # with thresholds of the diagnosis
    assert contradictions([report, asked, other], thresholds=0.8)["contradictory"]["a: pleural effusion"] == 0.0


@pytest.mark.parametrize(
    ("question", "heard"),
    [
        ("Is there a pleural effusion?", True),
        ("Is any sign of pleural effusion present?", True),
        ("Does this scan show Pleural_Effusion?", True),
        ("Do you see a pleural effusion on the right?", False),
        ("Is the pleural effusion large?", False),
        ("Is there emphysema or pleural effusion?", False),
        ("How many nodules are there?", False),
    ],
)
def test_only_a_question_for_presence_alone_is_a_source(question: str, heard: bool) -> None:
    asked = Record("a/question-1", "question", question=question, prediction="No.", reference="No.")
    found = contradictions([diagnosis("a", pleural_effusion=0.9), asked])
    assert found.get("probability / question", {}) == ({"a: pleural effusion": 1.0} if heard else {})


def test_masks_of_findings_are_a_source_and_scans_are_told_apart_by_their_field(tmp_path: Path) -> None:
    for name, value in (("empty", 0), ("full", 1)):
        nibabel.save(nibabel.Nifti1Image(np.full((2, 2, 2), value, np.uint8), np.eye(4)), tmp_path / f"{name}.nii.gz")

    def mask(record: str, name: str, file: str, scan: str) -> Record:
        masks = [{"name": name, "prediction": f"{file}.nii.gz", "reference": {"path": ""}}]
        return Record(record, "segmentation", masks=masks, scan=scan)

    probabilities = {"emphysema": 0.9, "lung nodule": 0.1}
    records = [
        mask("1", "Emphysema", "empty", "s"), mask("2", "lung nodule", "empty", "s"), mask("3", "liver", "empty", "s"),
        mask("4", "emphysema", "full", "t"),
        *(Record(name, "diagnosis", probabilities=probabilities, labels=dict.fromkeys(probabilities, 1), scan=name)
          for name in "st"),
    ]  # fmt: skip
    found = contradictions(records, tmp_path)
    assert found["contradictory"] == {"s: emphysema": 1.0, "s: lung nodule": 0.0, "t: emphysema": 0.0}
    assert set(found) == {"contradictory", "probability / mask"}
    systems = [score_predictions(Predictions(name, records, tmp_path), 0.5, bootstraps=5) for name in ("A", "B")]
    table = next(one for one in all_tables(systems) if one.title.startswith("Consistency: "))
    assert [row[0] for row in table.rows] == ["A", "B"]
    assert table.header[3:] == ["Contradictory", "Probability / mask"]
    assert table.rows[0][3].startswith("33.33±")


def test_a_system_with_one_source_has_no_such_score() -> None:
    assert contradictions([diagnosis("a", emphysema=0.9)]) == {}
