"""Special tokens of free answers: which name each stands for, and how good what came is."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest

from ctinstruct_hf import CTInstructError
from ctinstruct_hf.evaluation.emission import as_asked, tokens_of_names
from ctinstruct_hf.evaluation.predictions import Predictions, Record, parse_record
from ctinstruct_hf.evaluation.scoring import score_predictions
from ctinstruct_hf.evaluation.tables import task_table

KNOWN = ["left lung", "right lung", "lung", "liver", "spleen"]


@pytest.mark.parametrize(
    ("answer", "asked", "tokens", "right"),
    [
        ("Sure, it is <SEG>.", ["liver"], [0], True),
        ("Sure, Liver <SEG>.", ["liver"], [0], True),
        ("Sure, spleen <SEG>, liver <SEG>.", ["liver", "spleen"], [1, 0], True),
        ("Sure, left lung <SEG>.", ["lung"], [None], False),
        ("Sure, left_lung <SEG>, right lung <SEG>.", ["left lung", "right lung"], [0, 1], True),
        ("Sure, spleen <SEG>.", ["liver"], [None], False),
        ("Sure, liver <SEG>.", ["liver", "spleen"], [0, None], False),
        ("Sure, liver <SEG>, spleen <SEG>.", ["liver"], [0], False),
        ("Here: <SEG> <SEG>", ["liver", "spleen"], [0, 1], True),
        ("<SEG>", ["liver", "spleen"], [None, None], False),
        ("No.", ["liver"], [None], False),
        ("liver <SEG> and liver <SEG>", ["liver", "liver"], [0, 1], True),
    ],
)
def test_a_token_stands_for_the_name_before_it_or_for_the_only_name(
    answer: str, asked: list[str], tokens: list[int | None], right: bool
) -> None:
    found = tokens_of_names(answer, "<SEG>", asked, KNOWN)
    assert found == tokens
    assert as_asked(answer, "<SEG>", found) == right


def test_dice_and_auc_are_over_what_was_emitted(tmp_path: Path) -> None:
    whole = np.zeros((6, 6, 6), np.uint8)
    whole[1:5] = 1
    half = whole.copy()
    half[3:] = 0
    for name, mask in (("whole", whole), ("half", half)):
        nibabel.save(nibabel.Nifti1Image(mask, np.eye(4)), tmp_path / f"{name}.nii.gz")

    def liver(**free: str) -> list[dict[str, object]]:
        return [{"name": "liver", "prediction": "whole.nii.gz", "reference": "whole.nii.gz", **free}]

    records = [
        Record("same", "segmentation", masks=liver(free="whole.nii.gz"), free={"as_asked": True}),
        Record("half", "segmentation", masks=liver(free="half.nii.gz"), free={"as_asked": False}),
        Record("none", "segmentation", masks=liver(), free={"as_asked": False}),
        Record("never asked", "segmentation", masks=liver()),
    ]
    for number, (probability, value) in enumerate(((0.9, 1), (0.2, 0), (0.6, 0), (0.8, 1))):
        free = {"as_asked": number < 3, **({"probabilities": {"x": 1 - probability}} if number < 3 else {})}
        records.append(
            Record(str(number), "diagnosis", probabilities={"x": probability}, labels={"x": value}, free=free)
        )
    scores = score_predictions(Predictions("Mine", records, tmp_path), 0.5, bootstraps=20)
    masks, diagnosis = scores.find("segmentation", ""), scores.find("diagnosis", "")
    assert masks is not None
    assert diagnosis is not None
    assert masks.metrics["emitted"].mean == pytest.approx(1 / 3)
    assert masks.per_sample["free_dice"] == {"same": 1.0, "half": pytest.approx(2 / 3)}
    assert masks.metrics["dice"].mean == 1.0
    assert diagnosis.metrics["emitted"].mean == 0.75
    assert diagnosis.metrics["auc"].mean == 1.0
    assert diagnosis.metrics["free_auc"].mean == 0.0
    assert task_table("segmentation", "", [scores]).header[-2:] == ["Emitted", "Free Dice"]


@pytest.mark.parametrize(
    ("free", "message"), [({"answer": "No."}, "as_asked"), ({"as_asked": True, "probabilities": {"x": 2}}, "0 and 1 for x")]
)  # fmt: skip
def test_a_bad_free_answer_is_refused(free: dict[str, object], message: str) -> None:
    record = {"id": "a", "task": "diagnosis", "probabilities": {"x": 0.5}, "labels": {"x": 1}, "free": free}
    with pytest.raises(CTInstructError, match=message):
        parse_record(record)
