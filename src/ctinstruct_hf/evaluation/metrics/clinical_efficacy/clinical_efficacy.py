"""Precision, recall and F1 of CT-RATE's 18 findings in generated reports, read by rules. For `evaluate.load("<this folder>")`."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from ctinstruct_hf.evaluation.text import clinical_efficacy


class ClinicalEfficacy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="CTInstruct, AAAI 2026",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str], uncertain: bool = True) -> dict[str, Any]:
        return clinical_efficacy(predictions, references, uncertain)
