"""Accuracy of multiple choice, by letter or by text. For `evaluate.load("<this folder>")`."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from ctinstruct_hf.evaluation.text import choice_accuracy


class ChoiceAccuracy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="CTInstruct, AAAI 2026",
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.Value("string"),
                    "options": datasets.Sequence(datasets.Value("string")),
                }
            ),
        )

    def _compute(self, predictions: list[str], references: list[str], options: list[list[str]]) -> dict[str, Any]:
        return choice_accuracy(predictions, references, options)
