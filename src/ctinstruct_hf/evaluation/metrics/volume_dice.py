"""Dice over all voxels, and the release's Dice along lines, means over masks given as nested lists."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ctinstruct_hf.evaluation.metric import Metric, module_of
from ctinstruct_hf.evaluation.predictions import Record
from ctinstruct_hf.evaluation.scores import Settings, TaskScores
from ctinstruct_hf.evaluation.segmentation import read_mask_pair, released_dice, surface_scores, volume_dice
from ctinstruct_hf.evaluation.significance import deviation


def score(scores: TaskScores, records: Sequence[Record], settings: Settings) -> None:
    """Dice by the rule of `volume_dice`: empty in both is no score, empty in one is 0; absent structures apart."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    per_structure: dict[str, list[float]] = defaultdict(list)
    for key, mask in masks_of(records, settings):
        if "dice" in mask:  # computed elsewhere, by an unknown rule
            found["dice_as_given"][key] = float(mask["dice"])
            continue
        prediction, truth, spacing = read_mask_pair(mask, settings.folder)
        if not truth.any():
            found["absent_left_empty"][key] = float(not prediction.any())
            continue
        found["dice"][key] = float(volume_dice(prediction, truth))  # type: ignore[arg-type]  # of one mask: a number
        found["released_dice"][key] = released_dice(prediction, truth)
        per_structure[str(mask["name"])].append(found["dice"][key])
        if settings.surface:
            nsd, hd95 = surface_scores(prediction, truth, spacing, settings.tolerance)
            found["nsd"][key], found["hd95"][key] = nsd, hd95
    infinite = [key for key, value in found["hd95"].items() if not np.isfinite(value)]
    if infinite:
        found["hd95"] = {key: value for key, value in found["hd95"].items() if np.isfinite(value)}
        scores.notes.append(f"{len(infinite)} structures were missed: they have no HD95; their NSD and Dice are 0")
    if found["dice_as_given"]:
        given = len(found["dice_as_given"])
        scores.notes.append(f"{given} masks come with a Dice computed elsewhere: see how before comparing")
    scores.per_sample |= {metric: values for metric, values in found.items() if values}
    scores.details["per_structure"] = {
        name: {"dice": float(np.mean(values)), "sd": deviation(values), "count": len(values)}
        for name, values in sorted(per_structure.items())
    }
    scores.details["_per_structure"] = dict(per_structure)


def masks_of(records: Sequence[Record], settings: Settings) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every mask, under the record's id, numbered where it has several."""
    for number, record in enumerate(records, start=1):
        settings.progress(f"masks {number}/{len(records)}")
        for index, mask in enumerate(record.masks):
            yield record.id if len(record.masks) == 1 else f"{record.id}#{index}", mask


def compute(predictions: Any, references: Any) -> dict[str, Any]:
    """Means over pairs of masks."""
    pairs = [(np.asarray(mask), np.asarray(truth)) for mask, truth in zip(predictions, references, strict=True)]
    dice = [float(volume_dice(*pair)) for pair in pairs]  # type: ignore[arg-type]  # of one mask: a number
    return {
        "dice": float(np.nanmean(dice)) if not np.isnan(dice).all() else float("nan"),
        "released_dice": float(np.mean([released_dice(*pair) for pair in pairs])),
        "both_empty": int(np.isnan(dice).sum()),
    }


METRIC = Metric(
    {
        "segmentation": (
            ("Dice", "dice"),
            ("Released Dice", "released_dice"),
            ("NSD", "nsd"),
            ("Absent left empty", "absent_left_empty"),
            ("Dice as given", "dice_as_given"),
        )
    },
    score,
    items=(("Dice", "dice"),),
    rows=lambda details: details.get("per_structure", {}),
    rank=0,
)
MODULE = module_of(
    __doc__,
    lambda datasets: {
        name: datasets.Sequence(datasets.Sequence(datasets.Sequence(datasets.Value("int8"))))
        for name in ("predictions", "references")
    },
    compute,
)
