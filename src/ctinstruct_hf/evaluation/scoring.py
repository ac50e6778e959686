"""Scores of predictions: every metric of section 4.1 per task and data set, and per sample.

Failed samples are counted and named; empty masks are scored by rule and counted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..errors import CTInstructError
from .metrics import metrics_of
from .predictions import Predictions, Record
from .scores import Settings, SystemScores, TaskScores
from .significance import bootstrap_mean, by_group
from .text import precision_recall_f1

THRESHOLDS = ("validation", "test_set")


def score_predictions(
    predictions: Predictions,
    thresholds: str | float = "validation",
    *,
    pool: int | None = 200,
    bootstraps: int = 1000,
    surface: bool = False,
    tolerance: float = 2.0,
    tokenizer: str = "auto",
    workers: int | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> SystemScores:
    """Score everything in a file of predictions.

    Args:
        predictions: from `read_predictions`.
        thresholds: of diagnosis: `validation`, the best F1 on the records of split validation; a number; or `test_set`,
            the best F1 on the scored records themselves, as the release does (marked as such).
        pool: of retrieval.
        bootstraps: of the 95 % intervals.
        surface: also NSD (at `tolerance` mm) and HD95 (mm), which take long on large masks.
        tokenizer: of texts, see `score_texts`; the notes and details of their scores name the chosen tokenizer.
        workers: processes for text.
        progress: called with a sentence.

    Raises:
        CTInstructError: for a mask that cannot be read, or thresholds that are none of these.
    """
    if isinstance(thresholds, str) and thresholds not in THRESHOLDS:
        raise CTInstructError(f"thresholds is '{thresholds}': use a number, {' or '.join(THRESHOLDS)}.")
    settings = Settings(
        thresholds, pool, bootstraps, surface, tolerance, tokenizer, workers, predictions.folder, progress=progress
    )
    scored: dict[tuple[str, str], list[Record]] = defaultdict(list)
    aside: dict[tuple[str, str], list[Record]] = defaultdict(list)
    # a data set with only a validation split is scored on it
    tested = {(record.task, record.dataset) for record in predictions.records if record.split != "validation"}
    for record in predictions.records:
        key = (record.task, record.dataset)
        (aside if record.split == "validation" and key in tested else scored)[key].append(record)
    notes = predictions.header.get("notes", {})
    found = [
        _score_task(task, dataset, records, notes.get(task, []), replace(settings, validation=aside[task, dataset]))
        for (task, dataset), records in sorted(scored.items())
    ]
    found += [_score_consistency(dataset, scored, found, settings) for dataset in sorted({key[1] for key in scored})]
    return SystemScores(predictions.system, [scores for scores in found if scores.count or scores.failed])


def _score_consistency(
    dataset: str, scored: Mapping[tuple[str, str], Sequence[Record]], found: Sequence[TaskScores], settings: Settings
) -> TaskScores:
    """Whether the answers of different tasks contradict each other, with the thresholds of the diagnosis."""
    records = [record for (_, name), several in scored.items() if name == dataset for record in several]
    diseases = [scores.details.get("per_disease", {}) for scores in found if scores.dataset == dataset]
    limits = {name: row["threshold"] for rows in diseases for name, row in rows.items()}
    scores = _score_task("consistency", dataset, records, [], replace(settings, limits=limits))
    scores.failed = []  # they are listed by task
    return scores


def _score_task(
    task: str, dataset: str, records: Sequence[Record], notes: Sequence[str], settings: Settings
) -> TaskScores:
    """All metrics of a task on a data set."""
    settings.progress(f"{task} {dataset}".strip())
    good = [record for record in records if not record.error]
    scores = TaskScores(task, dataset, len(good), [record.id for record in records if record.error], notes=[*notes])
    if not good:
        scores.notes.append("every sample failed")
        return scores
    settings = replace(settings, validation=[record for record in settings.validation if not record.error])
    for metric in metrics_of(task):
        metric.score(scores, good, settings)
    meta = {record.id: record.meta for record in good}
    for name, values in scores.per_sample.items():
        if name not in scores.metrics and any(not np.isnan(value) for value in values.values()):
            scores.metrics[name] = bootstrap_mean(list(values.values()), settings.bootstraps)
        if task not in ("diagnosis", "retrieval", "consistency"):  # those have no score per sample
            groups = by_group(list(values.values()), [meta.get(key, {}) for key in values], settings.bootstraps)
            scores.groups |= {name: groups} if groups else {}
    return scores


def parse_thresholds(text: str) -> str | float:
    """`validation`, `test_set` or a number between 0 and 1."""
    if text in THRESHOLDS:
        return text
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise CTInstructError(f"thresholds is '{text}': use {', '.join(THRESHOLDS)} or a number between 0 and 1.")
    return value


def findings_scores(
    named: Sequence[Sequence[str]], truth: Sequence[dict[str, int]], names: Sequence[str]
) -> dict[str, Any]:
    """Precision, recall and F1 of findings that were named, for any list of findings.

    Args:
        named: the findings that each report names as present.
        truth: {finding: 1, 0, −1} of each.
        names: the findings.
    """
    table = np.array([[name in row for name in names] for row in named], dtype=bool).reshape(len(named), len(names))
    right = np.array([[row.get(name, -1) for name in names] for row in truth]).reshape(len(named), len(names))
    return precision_recall_f1(table, right, names)


__all__ = ["SystemScores", "TaskScores", "findings_scores", "parse_thresholds", "score_predictions"]
