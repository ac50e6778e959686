"""AUC, accuracy, F1 and precision per disease and their means. For `evaluate.load("<this folder>")`."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from ctinstruct_hf.evaluation.diagnosis import multilabel_scores


class MultilabelDiagnosis(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="CTInstruct, AAAI 2026",
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float64")),
                    "references": datasets.Sequence(datasets.Value("int64")),
                }
            ),
        )

    def _compute(
        self, predictions: Any, references: Any, thresholds: Any = 0.5, names: list[str] | None = None
    ) -> dict[str, Any]:
        return multilabel_scores(predictions, references, thresholds, names)
