"""Accuracy of multiple choice, by letter or by text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ctinstruct_hf.evaluation.choices import choice_accuracy
from ctinstruct_hf.evaluation.metric import Metric, module_of
from ctinstruct_hf.evaluation.predictions import Record
from ctinstruct_hf.evaluation.scores import Settings, TaskScores


def score(scores: TaskScores, records: Sequence[Record], settings: Settings) -> None:
    """Right or wrong; what names no option is wrong."""
    found = compute(
        [record.prediction for record in records],
        [record.reference for record in records],
        [record.options for record in records],
    )
    scores.per_sample["accuracy"] = {
        record.id: float(right) for record, right in zip(records, found["correct"], strict=True)
    }
    if found["unreadable"]:
        names = ", ".join(records[index].id for index in found["unreadable"][:5])
        scores.notes.append(f"{len(found['unreadable'])} answers name no option and count as wrong: {names} …")


def compute(predictions: list[str], references: list[str], options: list[list[str]]) -> dict[str, Any]:
    """See `choice_accuracy`."""
    return choice_accuracy(predictions, references, options)


METRIC = Metric({"multiple_choice": (("Accuracy", "accuracy"),)}, score, rank=0)
MODULE = module_of(
    __doc__,
    lambda datasets: {
        "predictions": datasets.Value("string"),
        "references": datasets.Value("string"),
        "options": datasets.Sequence(datasets.Value("string")),
    },
    compute,
)
