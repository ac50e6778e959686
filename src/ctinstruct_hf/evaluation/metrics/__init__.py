"""The metrics, a file each, and each a module of `evaluate`: `evaluate.load(metric_path("report_text"))`."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

from ...data.tasks import scored_as
from ...errors import CTInstructError
from ..metric import Columns, Metric


def find_metrics() -> dict[str, Metric]:
    """{name: metric} of all files here, those of a lower rank first."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    found = {name: importlib.import_module(f"{__name__}.{name}").METRIC for name in names}
    return dict(sorted(found.items(), key=lambda named: named[1].rank))


METRICS = find_metrics()


def metrics_of(task: str) -> list[Metric]:
    """The metrics that score a task."""
    return [metric for metric in METRICS.values() if scored_as(task) in metric.columns]


def columns_of(task: str) -> Columns:
    """(header, metric) of everything that tables show of a task."""
    return tuple(column for metric in metrics_of(task) for column in metric.columns[scored_as(task)])


def metric_path(name: str) -> str:
    """The file of a metric, for `evaluate.load`.

    Raises:
        CTInstructError: for a name that is not in `METRICS`.
    """
    if name not in METRICS:
        raise CTInstructError(f"metric '{name}' is not known: use {', '.join(sorted(METRICS))}.")
    return str(Path(__file__).with_name(f"{name}.py"))


__all__ = ["METRICS", "columns_of", "find_metrics", "metric_path", "metrics_of"]
