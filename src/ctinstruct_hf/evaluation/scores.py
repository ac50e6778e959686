"""Scores of a system per task and data set, and per sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .predictions import Record
from .significance import Interval


@dataclass
class TaskScores:
    """Scores of a task on a data set.

    Attributes:
        task, dataset, count, failed: what was scored; `failed` names samples with an error.
        metrics: {metric: interval}, in 0…1 (surface distances in mm).
        per_sample: {metric: {id: score}}, what paired tests compare. A diagnosis is compared by disease.
        details: by task: per disease, per structure, per finding, calibration, curves.
        groups: {metric: {"sex": {"female": interval, …}, …}}.
        notes: sentences on how numbers were computed.
    """

    task: str
    dataset: str
    count: int
    failed: list[str] = field(default_factory=list)
    metrics: dict[str, Interval] = field(default_factory=dict)
    per_sample: dict[str, dict[str, float]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def point(self, metric: str, value: float, sd: float = float("nan")) -> None:
        """A metric without an interval."""
        nan = float("nan")
        self.metrics[metric] = Interval(float(value), sd, nan, nan, self.count)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; curves and scores per sample stay out."""
        values = asdict(self)
        values.pop("per_sample")
        values["details"] = {name: value for name, value in self.details.items() if not name.startswith("_")}
        return values


@dataclass
class SystemScores:
    """All scores of a system."""

    system: str
    tasks: list[TaskScores]

    def find(self, task: str, dataset: str) -> TaskScores | None:
        return next((scores for scores in self.tasks if (scores.task, scores.dataset) == (task, dataset)), None)

    def to_dict(self) -> dict[str, Any]:
        tasks = [scores.to_dict() for scores in self.tasks]
        return {"system": self.system, "research_use_only": True, "tasks": tasks}


@dataclass
class Settings:
    """Settings of metrics, see `score_predictions`.

    Attributes:
        folder: file names in the records are relative to it.
        validation: records of the validation split that are not scored, of the same task and data set.
        limits: {disease: threshold} that the diagnosis of the same data set was scored with.
    """

    thresholds: str | float = "validation"
    pool: int | None = 200
    bootstraps: int = 1000
    surface: bool = False
    tolerance: float = 2.0
    tokenizer: str = "auto"
    workers: int | None = None
    folder: Path = Path(".")
    validation: Sequence[Record] = ()
    limits: Mapping[str, float] = field(default_factory=dict)
    progress: Callable[[str], None] = lambda step: None


__all__ = ["Settings", "SystemScores", "TaskScores"]
