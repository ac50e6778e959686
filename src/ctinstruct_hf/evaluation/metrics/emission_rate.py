"""How often free answers have the special tokens asked for, and the Dice and AUC of these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ctinstruct_hf.evaluation.diagnosis import multilabel_scores, table_of
from ctinstruct_hf.evaluation.metric import Metric, module_of
from ctinstruct_hf.evaluation.metrics.volume_dice import masks_of
from ctinstruct_hf.evaluation.predictions import Record
from ctinstruct_hf.evaluation.scores import Settings, TaskScores
from ctinstruct_hf.evaluation.segmentation import read_mask_pair, volume_dice
from ctinstruct_hf.evaluation.significance import bootstrap_auc, deviation


def score(scores: TaskScores, records: Sequence[Record], settings: Settings) -> None:
    """Of records that have a free answer; Dice and AUC are over the tokens that it has."""
    free = [record for record in records if record.free]
    if not free:
        return
    scores.per_sample["emitted"] = {record.id: float(record.free["as_asked"]) for record in free}
    if scores.task == "segmentation":
        _score_masks(scores, free, settings)
    else:
        _score_probabilities(scores, free, settings)


def _score_masks(scores: TaskScores, records: Sequence[Record], settings: Settings) -> None:
    given = scores.per_sample.get("dice", {})
    dice: dict[str, float] = {}
    for key, mask in masks_of(records, replace(settings, progress=lambda step: None)):
        if "free" not in mask:
            continue
        if mask["free"] == mask["prediction"]:  # the free answer equals the data's, word by word
            if key in given:
                dice[key] = given[key]
            continue
        prediction, truth, _ = read_mask_pair({**mask, "prediction": mask["free"]}, settings.folder)
        if truth.any():
            dice[key] = float(volume_dice(prediction, truth))  # type: ignore[arg-type]  # of one mask: a number
    if dice:
        scores.per_sample["free_dice"] = dice


def _score_probabilities(scores: TaskScores, records: Sequence[Record], settings: Settings) -> None:
    emitted = [record for record in records if record.free.get("probabilities")]
    if not emitted:
        return
    names, probabilities, labels = table_of(
        [record.free["probabilities"] for record in emitted],
        [{name: record.labels.get(name, -1) for name in record.free["probabilities"]} for record in emitted],
    )
    areas = [row["auc"] for row in multilabel_scores(probabilities, labels, names=names)["per_disease"].values()]
    _, mean = bootstrap_auc(probabilities, labels, settings.bootstraps)
    scores.metrics["free_auc"] = replace(mean, sd=deviation([area for area in areas if not np.isnan(area)]))


def compute(predictions: Sequence[bool]) -> dict[str, Any]:
    """The share of answers that came as asked."""
    return {"emitted": float(np.mean(predictions))}


METRIC = Metric(
    {
        "segmentation": (("Emitted", "emitted"), ("Free Dice", "free_dice")),
        "diagnosis": (("Emitted", "emitted"), ("Free AUC", "free_auc")),
    },
    score,
    rank=2,
)
MODULE = module_of(__doc__, lambda datasets: {"predictions": datasets.Value("bool")}, compute)
