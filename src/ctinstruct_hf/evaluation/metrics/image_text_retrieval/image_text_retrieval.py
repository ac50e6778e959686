"""IR@k and TR@k over a pool; predictions are image features, references text features. For `evaluate.load("<this folder>")`."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from ctinstruct_hf.evaluation.retrieval import recall_at_k


class ImageTextRetrieval(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="CTInstruct, AAAI 2026",
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float64")),
                    "references": datasets.Sequence(datasets.Value("float64")),
                }
            ),
        )

    def _compute(self, predictions: Any, references: Any, k: Any = (5, 10), pool: int | None = 200) -> dict[str, Any]:
        return recall_at_k(predictions, references, k, pool)
