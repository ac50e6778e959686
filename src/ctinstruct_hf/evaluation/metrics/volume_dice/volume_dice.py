"""Dice over all voxels, and the release's Dice along lines, means over masks given as nested lists. For `evaluate.load("<this folder>")`."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np

from ctinstruct_hf.evaluation.segmentation import released_dice, volume_dice

_MASK = datasets.Sequence(datasets.Sequence(datasets.Sequence(datasets.Value("int8"))))


class VolumeDice(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="CTInstruct, AAAI 2026",
            features=datasets.Features({"predictions": _MASK, "references": _MASK}),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, Any]:
        pairs = [(np.asarray(said), np.asarray(truth)) for said, truth in zip(predictions, references, strict=True)]
        dice = [float(volume_dice(*pair)) for pair in pairs]  # type: ignore[arg-type]
        return {
            "dice": float(np.nanmean(dice)) if not np.isnan(dice).all() else float("nan"),
            "released_dice": float(np.mean([released_dice(*pair) for pair in pairs])),
            "both_empty": int(np.isnan(dice).sum()),
        }
