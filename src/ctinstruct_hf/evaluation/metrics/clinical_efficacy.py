"""Precision, recall and F1 of CT-RATE's 18 findings in generated reports, read by rules."""

from __future__ import annotations

from collections.abc import Sequence

from ctinstruct_hf.evaluation.metric import Metric, module_of
from ctinstruct_hf.evaluation.predictions import Record
from ctinstruct_hf.evaluation.scores import Settings, TaskScores
from ctinstruct_hf.evaluation.text import clinical_efficacy

PARTS = ("precision", "recall", "f1")


def score(scores: TaskScores, records: Sequence[Record], settings: Settings) -> None:
    """Macro means over findings that occur."""
    found = clinical_efficacy([record.prediction for record in records], [record.reference for record in records])
    scores.details["clinical_efficacy"] = found
    for metric in PARTS:
        scores.point(f"clinical_{metric}", found[metric])


METRIC = Metric(
    {"report": tuple((f"Clinical {'F1' if part == 'f1' else part}", f"clinical_{part}") for part in PARTS)},
    score,
    items=(("Precision", "precision"), ("Recall", "recall"), ("F1", "f1")),
    rows=lambda details: details.get("clinical_efficacy", {}).get("per_finding", {}),
)
MODULE = module_of(
    __doc__,
    lambda datasets: {"predictions": datasets.Value("string"), "references": datasets.Value("string")},
    clinical_efficacy,
)
