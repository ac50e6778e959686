"""A metric: which tasks it scores, how, and the columns and rows that tables show of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .predictions import Record
from .scores import Settings, TaskScores

Columns = tuple[tuple[str, str], ...]  # (header, metric)


@dataclass(frozen=True)
class Metric:
    """A metric, or several that are computed together. A file of `metrics/` holds it as `METRIC`.

    Attributes:
        columns: {task of `predictions.SCORED_TASKS`: what tables show of it}; other tasks are not scored by it. `consistency` is
            scored on the records of all tasks of a data set.
        score: puts `metrics`, `per_sample`, `details` and `notes` of the records into the scores. Means and intervals of
            scores per sample are added afterwards.
        items: what tables show by item (disease, structure, finding), of the rows that
        rows: finds in `details`: {item: {metric: value}}.
        rank: columns and items of a lower rank come first.
    """

    columns: Mapping[str, Columns]
    score: Callable[[TaskScores, Sequence[Record], Settings], None]
    items: Columns = ()
    rows: Callable[[Mapping[str, Any]], Mapping[str, Mapping[str, Any]]] = field(default=lambda details: {})
    rank: int = 1


def module_of(
    description: str | None, features: Callable[[Any], dict[str, Any]], compute: Callable[..., dict[str, Any]]
) -> type | None:
    """The class that `evaluate.load` looks for in a metric's file; None where `evaluate` is not in use.

    Args:
        description: of the metric.
        features: the library `datasets` -> the columns of predictions and references.
        compute: those columns and further arguments, by name -> {metric: value}.
    """
    evaluate: Any = sys.modules.get("evaluate")
    if not hasattr(evaluate, "Metric"):
        return None
    import datasets

    def info(self: Any) -> Any:
        columns = datasets.Features(features(datasets))
        return evaluate.MetricInfo(description=description, citation="CTInstruct, AAAI 2026", features=columns)

    def computed(self: Any, **given: Any) -> dict[str, Any]:
        return compute(**given)

    return type("CTInstructMetric", (evaluate.Metric,), {"_info": info, "_compute": computed})


__all__ = ["Columns", "Metric", "module_of"]
