"""Metrics are found by their files: one more file is one more metric, its columns in the tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from ctinstruct_hf.evaluation import metrics
from ctinstruct_hf.evaluation.predictions import SCORED_TASKS, Predictions, Record
from ctinstruct_hf.evaluation.scoring import score_predictions
from ctinstruct_hf.evaluation.tables import task_table

MINE = """
from ctinstruct_hf.evaluation.metric import Metric


def score(scores, records, settings):
    scores.per_sample["brevity"] = {record.id: 1 / len(record.prediction.split()) for record in records}


METRIC = Metric({"multiple_choice": (("Brevity", "brevity"),)}, score)
"""


def test_a_metric_is_added_by_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "brevity.py").write_text(MINE)
    monkeypatch.setattr(metrics, "__path__", [*metrics.__path__, str(tmp_path)])
    monkeypatch.setattr(metrics, "METRICS", metrics.find_metrics())
    records = [Record("a", "multiple_choice", prediction="(A) one", reference="(A) one", options=["one", "two"])]
    scores = score_predictions(Predictions("Mine", records), bootstraps=5)
    table = task_table("multiple_choice", "", [scores])
    assert table.header[-2:] == ["Accuracy", "Brevity"]
    assert [cell.split("±")[0] for cell in table.rows[0][-2:]] == ["100.00", "50.00"]


def test_every_task_has_a_metric_with_columns() -> None:
    for task in SCORED_TASKS:
        assert metrics.columns_of(task)
