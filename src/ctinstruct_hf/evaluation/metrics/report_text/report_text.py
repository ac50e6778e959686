"""BLEU-1, ROUGE-1 and METEOR, means over samples. For `evaluate.load("<this folder>")`."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from ctinstruct_hf.evaluation.text import TEXT_METRICS, score_texts


class ReportText(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="CTInstruct, AAAI 2026",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str], metrics: Any = TEXT_METRICS) -> dict[str, Any]:
        return score_texts(predictions, references, metrics).mean()
