"""A new source or task is one new file: it is found, prepared, checked and scored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from datasets_on_disk import nifti

from ctinstruct_hf.data import sources, tasks
from ctinstruct_hf.data.prepare import prepare
from ctinstruct_hf.data.prepared import load_rows
from ctinstruct_hf.data.samples import from_row
from ctinstruct_hf.evaluation.metrics import columns_of, metrics_of

TASK = """
from ctinstruct_hf.data.task import Request, Task


def requests(case, rng, max_structures):
    if "technique" in case.texts:
        yield Request("How was this scan made?", case.texts["technique"])


TASK = Task(requests, scored_as="question", rank=7)
"""
SOURCE = '''
"""A clinic's own folder."""
from ctinstruct_hf.data.cases import Case, ImageRef


def cases(folder):
    """Scans with their technique."""
    for path in sorted(folder.glob("*.nii.gz")):
        yield Case(path.name, [ImageRef(str(path))], "train", "clinic", texts={"technique": "Native.", "report": "Normal."})


SOURCES = {"clinic": cases}
'''


def test_a_source_and_a_task_are_a_file_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package, name, text in ((sources, "clinic", SOURCE), (tasks, "technique", TASK)):
        folder = tmp_path / package.__name__
        folder.mkdir()
        (folder / f"{name}.py").write_text(text)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    found, known = tasks.find_tasks(), sources.find_sources()
    assert list(found) == [*tasks.TASKS, "technique"]
    assert set(known) == {*sources.SOURCES, "clinic"}
    monkeypatch.setitem(tasks.TASKS, "technique", found["technique"])
    monkeypatch.setitem(sources.SOURCES, "clinic", known["clinic"])
    nifti(tmp_path / "raw" / "a.nii.gz")
    prepare("clinic", tmp_path / "raw", tmp_path / "set", workers=1)
    rows = [from_row(row, "instructions") for row in load_rows(tmp_path / "set", "instructions", "train")]
    assert [row.task for row in rows] == ["report", "technique"]  # type: ignore[union-attr]
    assert rows[-1].answers == ["Native."]  # type: ignore[union-attr]
    assert metrics_of("technique") == metrics_of("question") != []
    assert columns_of("technique") == columns_of("question")


def test_every_task_is_scored_by_the_metrics_of_a_task() -> None:
    assert list(tasks.TASKS) == ["report", "caption", "segmentation", "diagnosis", "multiple_choice", "question"]
    for name, task in tasks.TASKS.items():
        assert metrics_of(task.scored_as), name
    assert np.all([tasks.scored_as(name) == name for name in tasks.TASKS])
    assert tasks.scored_as("retrieval") == "retrieval"
