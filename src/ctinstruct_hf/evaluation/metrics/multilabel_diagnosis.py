"""AUC, accuracy, F1 and precision per disease and their means, and how well probabilities are calibrated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ctinstruct_hf.evaluation.diagnosis import METRICS, best_thresholds, calibration, multilabel_scores, table_of
from ctinstruct_hf.evaluation.metric import Metric, module_of
from ctinstruct_hf.evaluation.predictions import Record
from ctinstruct_hf.evaluation.scores import Settings, TaskScores
from ctinstruct_hf.evaluation.significance import bootstrap_auc, deviation, group_rows


def score(scores: TaskScores, records: Sequence[Record], settings: Settings) -> None:
    """Standard deviations are over diseases, as in the paper's tables."""
    names, probabilities, labels = table_of(
        [record.probabilities for record in records], [record.labels for record in records]
    )
    limits, note = _thresholds(names, settings)
    scores.notes.append(note)
    found = multilabel_scores(probabilities, labels, limits, names)
    each, mean = bootstrap_auc(probabilities, labels, settings.bootstraps)
    per_disease = found["per_disease"]
    for name, interval in zip(names, each, strict=True):
        per_disease[name] |= {"auc_low": interval.low, "auc_high": interval.high}
    for metric in METRICS:
        values = {name: per_disease[name][metric] for name in names}
        scores.per_sample[metric] = values
        scores.point(metric, found[metric], deviation([value for value in values.values() if not np.isnan(value)]))
    scores.metrics["auc"] = replace(mean, sd=scores.metrics["auc"].sd)
    calibrated = calibration(probabilities, labels)
    scores.point("ece", calibrated["ece"])
    scores.details |= {
        "per_disease": per_disease,
        "calibration": calibrated,
        "thresholds_from": found["thresholds_from"],
        "_probabilities": probabilities,
        "_labels": labels,
        "_names": names,
    }
    if found["undefined_auc"]:
        scores.notes.append(f"no AUC for {', '.join(found['undefined_auc'])}: one class only; left out of the mean")
    groups = group_rows([record.meta for record in records])
    if groups:
        scores.groups["auc"] = {
            key: {
                name: bootstrap_auc(probabilities[rows], labels[rows], settings.bootstraps)[1]
                for name, rows in group.items()
            }
            for key, group in groups.items()
        }


def _thresholds(names: Sequence[str], settings: Settings) -> tuple[Any, str]:
    """Above which probability a disease counts as there, and where that comes from."""
    if settings.thresholds == "test_set":
        return "test_set", "thresholds: best F1 on the test set itself, as released; too high by construction"
    if settings.thresholds != "validation":
        return settings.thresholds, f"thresholds: {settings.thresholds}"
    if not settings.validation:
        return 0.5, "thresholds: 0.5, since there are no validation samples"
    known, probabilities, labels = table_of(
        [record.probabilities for record in settings.validation], [record.labels for record in settings.validation]
    )
    best = dict(zip(known, best_thresholds(probabilities, labels), strict=True))
    note = f"thresholds: best F1 on {len(settings.validation)} validation samples"
    return {name: float(best.get(name, 0.5)) for name in names}, note


def compute(predictions: Any, references: Any, thresholds: Any = 0.5, names: list[str] | None = None) -> dict[str, Any]:
    """See `multilabel_scores`."""
    return multilabel_scores(predictions, references, thresholds, names)


METRIC = Metric(
    {"diagnosis": (("AUC", "auc"), ("ACC", "accuracy"), ("F1", "f1"), ("Precision", "precision"), ("ECE", "ece"))},
    score,
    items=(("AUC", "auc"), ("F1", "f1"), ("Precision", "precision"), ("Threshold", "threshold")),
    rows=lambda details: details.get("per_disease", {}),
    rank=0,
)
MODULE = module_of(
    __doc__,
    lambda datasets: {
        "predictions": datasets.Sequence(datasets.Value("float64")),
        "references": datasets.Sequence(datasets.Value("int64")),
    },
    compute,
)
