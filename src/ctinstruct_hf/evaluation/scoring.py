"""From predictions to numbers: every metric of section 4.1 per task and data set, per sample where there is one.

Nothing is dropped in silence: failed samples are counted and named, empty masks are decided by rule and counted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CTInstructError
from .diagnosis import METRICS, best_thresholds, calibration, multilabel_scores
from .predictions import TEXT_TASKS, Predictions, Record
from .retrieval import recall_at_k
from .segmentation import read_mask_pair, released_dice, surface_scores, volume_dice
from .significance import Interval, bootstrap_auc, bootstrap_mean, by_group, deviation, group_rows
from .text import TEXT_METRICS, choice_accuracy, clinical_efficacy, precision_recall_f1, score_texts
from .tokens import needs_unicode

THRESHOLDS = ("validation", "test_set")


@dataclass
class TaskScores:
    """Scores of one task on one data set.

    Attributes:
        task, dataset, count, failed: what was scored; `failed` names samples with an error.
        metrics: {metric: interval}, in 0…1 (surface distances in mm).
        per_sample: {metric: {id: score}}, what paired tests compare. A diagnosis is compared by disease.
        details: by task: per disease, per structure, per finding, calibration, curves.
        groups: {metric: {"sex": {"female": interval, …}, …}}.
        notes: how a number came about where that is not plain.
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

    def to_dict(self) -> dict[str, Any]:
        """For JSON; curves and scores per sample stay out."""
        told = asdict(self)
        told.pop("per_sample")
        told["details"] = {name: value for name, value in self.details.items() if not name.startswith("_")}
        return told


@dataclass
class SystemScores:
    """All scores of one system."""

    system: str
    tasks: list[TaskScores]

    def find(self, task: str, dataset: str) -> TaskScores | None:
        return next((one for one in self.tasks if (one.task, one.dataset) == (task, dataset)), None)

    def to_dict(self) -> dict[str, Any]:
        return {"system": self.system, "research_use_only": True, "tasks": [one.to_dict() for one in self.tasks]}


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
    tell: Callable[[str], None] = lambda step: None,
) -> SystemScores:
    """Score everything in a file of predictions.

    Args:
        predictions: from `read_predictions`.
        thresholds: of diagnosis: `validation`, the best F1 on the records of split validation; a number; or `test_set`,
            the best F1 on the scored records themselves, as the release does (marked as such).
        pool: of retrieval.
        bootstraps: of the 95 % intervals.
        surface: also NSD (at `tolerance` mm) and HD95 (mm), which take long on large masks.
        tokenizer: of texts, see `score_texts`; what was taken stands in the notes and details of their scores.
        workers: processes for text.
        tell: called with a sentence on progress.

    Raises:
        CTInstructError: for a mask that cannot be read, or thresholds that are none of these.
    """
    if isinstance(thresholds, str) and thresholds not in THRESHOLDS:
        raise CTInstructError(f"thresholds is '{thresholds}': use a number, {' or '.join(THRESHOLDS)}.")
    groups: dict[tuple[str, str], list[Record]] = defaultdict(list)
    aside: dict[tuple[str, str], list[Record]] = defaultdict(list)
    # a data set that has nothing but its validation split is scored on that
    tested = {(one.task, one.dataset) for one in predictions.records if one.split != "validation"}
    for record in predictions.records:
        key = (record.task, record.dataset)
        chosen = aside if record.split == "validation" and key in tested else groups
        chosen[key].append(record)
    found = []
    for (task, dataset), records in sorted(groups.items()):
        tell(f"{task} {dataset}".strip())
        good = [record for record in records if not record.error]
        scores = TaskScores(task, dataset, len(good), [record.id for record in records if record.error])
        scores.notes += predictions.header.get("notes", {}).get(task, [])
        found.append(scores)
        if not good:
            scores.notes.append("every sample failed")
            continue
        if task in TEXT_TASKS:
            _score_texts(scores, good, workers, tokenizer)
        elif task == "multiple_choice":
            _score_choices(scores, good)
        elif task == "diagnosis":
            validation = [record for record in aside[task, dataset] if not record.error]
            _score_diagnosis(scores, good, validation, thresholds, bootstraps)
        elif task == "segmentation":
            _score_masks(scores, good, predictions.folder, surface, tolerance, tell)
        else:
            _score_retrieval(scores, good, pool)
        for metric, values in scores.per_sample.items():
            if metric not in scores.metrics and any(not np.isnan(value) for value in values.values()):
                scores.metrics[metric] = bootstrap_mean(list(values.values()), bootstraps)
        _score_groups(scores, good, bootstraps)
    return SystemScores(predictions.system, found)


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


def _score_groups(scores: TaskScores, records: Sequence[Record], bootstraps: int) -> None:
    if scores.task in ("diagnosis", "retrieval"):  # no score per sample
        return
    meta = {record.id: record.meta for record in records}
    for metric, values in scores.per_sample.items():
        found = by_group(list(values.values()), [meta.get(name, {}) for name in values], bootstraps)
        if found:
            scores.groups[metric] = found


def _score_texts(scores: TaskScores, records: Sequence[Record], workers: int | None, tokenizer: str) -> None:
    said, right = [record.prediction for record in records], [record.reference for record in records]
    texts = score_texts(said, right, TEXT_METRICS, workers, tokenizer)
    scores.details["tokenizer"] = texts.tokenizer
    beyond = needs_unicode([*said, *right])
    if beyond and texts.tokenizer == "unicode":
        scores.notes.append(f"tokenizer: unicode, since {beyond} texts have letters beyond a–z: words of any script count in ROUGE-1, and single characters where a script has no blanks")  # fmt: skip
    elif beyond:
        scores.notes.append(
            f"tokenizer: ascii, by choice: ROUGE-1 leaves out letters beyond a–z, which {beyond} texts have"
        )
    names = [record.id for record in records]
    for metric in TEXT_METRICS:
        scores.per_sample[metric] = dict(zip(names, texts[metric], strict=True))
    if scores.task == "question":
        exact = [float(_plain(a) == _plain(b)) for a, b in zip(said, right, strict=True)]
        scores.per_sample["exact"] = dict(zip(names, exact, strict=True))
    if scores.task == "report":
        efficacy = clinical_efficacy(said, right)
        scores.details["clinical_efficacy"] = efficacy
        for metric in ("precision", "recall", "f1"):
            scores.metrics[f"clinical_{metric}"] = _point(efficacy[metric], len(records))


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")


def _point(value: float, count: int) -> Interval:
    """A number without a spread."""
    nan = float("nan")
    return Interval(float(value), nan, nan, nan, count)


def _score_choices(scores: TaskScores, records: Sequence[Record]) -> None:
    found = choice_accuracy(
        [record.prediction for record in records],
        [record.reference for record in records],
        [record.options for record in records],
    )
    scores.per_sample["accuracy"] = {
        record.id: float(right) for record, right in zip(records, found["correct"], strict=True)
    }
    if found["unreadable"]:
        names = ", ".join(records[index].id for index in found["unreadable"][:5])
        scores.notes.append(f"{len(found['unreadable'])} answers name no option and count as wrong: {names} …")


def _table(records: Sequence[Record]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Diseases, probabilities and labels [N, diseases]; a disease that a record does not have is unknown there."""
    names = list(dict.fromkeys(name for record in records for name in record.probabilities))
    probabilities = np.array([[record.probabilities.get(name, 0.5) for name in names] for record in records])
    labels = np.array([[record.labels.get(name, -1) for name in names] for record in records])
    return names, probabilities, labels


def _score_diagnosis(
    scores: TaskScores,
    records: Sequence[Record],
    validation: Sequence[Record],
    thresholds: str | float,
    bootstraps: int,
) -> None:
    names, probabilities, labels = _table(records)
    limits: Any = thresholds
    if thresholds == "validation":
        if validation:
            known, held_out, truth = _table(validation)
            best = dict(zip(known, best_thresholds(held_out, truth), strict=True))
            limits = {name: float(best.get(name, 0.5)) for name in names}
            scores.notes.append(f"thresholds: best F1 on {len(validation)} validation samples")
        else:
            limits = 0.5
            scores.notes.append("thresholds: 0.5, since there are no validation samples")
    elif thresholds == "test_set":
        scores.notes.append("thresholds: best F1 on the test set itself, as released; too high by construction")
    else:
        scores.notes.append(f"thresholds: {thresholds}")
    found = multilabel_scores(probabilities, labels, limits, names)
    each, mean = bootstrap_auc(probabilities, labels, bootstraps)
    per_disease = found["per_disease"]
    for name, interval in zip(names, each, strict=True):
        per_disease[name] |= {"auc_low": interval.low, "auc_high": interval.high}
    for metric in METRICS:
        values = {name: per_disease[name][metric] for name in names}
        scores.per_sample[metric] = values
        kept = [value for value in values.values() if not np.isnan(value)]
        over_diseases = deviation(kept)  # as in the paper's tables
        scores.metrics[metric] = replace(_point(found[metric], len(records)), sd=over_diseases)
    scores.metrics["auc"] = replace(mean, sd=scores.metrics["auc"].sd)
    calibrated = calibration(probabilities, labels)
    scores.metrics["ece"] = _point(calibrated["ece"], len(records))
    scores.details |= {
        "per_disease": per_disease,
        "calibration": calibrated,
        "thresholds_from": found["thresholds_from"],
        "_probabilities": probabilities,
        "_labels": labels,
        "_names": names,
    }
    if found["undefined_auc"]:
        scores.notes.append(f"no AUC for {', '.join(found['undefined_auc'])}: one class only; left out of the mean")
    groups = group_rows([record.meta for record in records])
    if groups:
        scores.groups["auc"] = {
            key: {name: bootstrap_auc(probabilities[rows], labels[rows], bootstraps)[1] for name, rows in one.items()}
            for key, one in groups.items()
        }


def _score_masks(
    scores: TaskScores,
    records: Sequence[Record],
    folder: Path,
    surface: bool,
    tolerance: float,
    tell: Callable[[str], None],
) -> None:
    """Dice by the rule of `volume_dice`: empty in both is no score, empty in one is 0; absent structures apart."""
    per_structure: dict[str, list[float]] = defaultdict(list)
    released: dict[str, float] = {}
    left_empty: dict[str, float] = {}
    distances: dict[str, dict[str, float]] = {"nsd": {}, "hd95": {}}
    elsewhere = 0
    for number, record in enumerate(records, start=1):
        tell(f"masks {number}/{len(records)}")
        for place, mask in enumerate(record.masks):
            key = record.id if len(record.masks) == 1 else f"{record.id}#{place}"
            name = str(mask["name"])
            if "dice" in mask:  # computed elsewhere, by whatever rule
                scores.per_sample.setdefault("dice_as_given", {})[key] = float(mask["dice"])
                elsewhere += 1
                continue
            said, truth, spacing = read_mask_pair(mask, folder)
            if not truth.any():
                left_empty[key] = float(not said.any())
                continue
            dice = float(volume_dice(said, truth))  # type: ignore[arg-type]
            scores.per_sample.setdefault("dice", {})[key] = dice
            per_structure[name].append(dice)
            released[key] = released_dice(said, truth)
            if surface:
                nsd, hd95 = surface_scores(said, truth, spacing, tolerance)
                distances["nsd"][key], distances["hd95"][key] = nsd, hd95
    scores.per_sample |= {name: values for name, values in (("released_dice", released), *distances.items()) if values}
    if left_empty:
        scores.per_sample["absent_left_empty"] = left_empty
    infinite = [key for key, value in distances["hd95"].items() if not np.isfinite(value)]
    if infinite:
        scores.per_sample["hd95"] = {key: value for key, value in distances["hd95"].items() if np.isfinite(value)}
        scores.notes.append(f"{len(infinite)} structures were missed: they have no HD95; their NSD and Dice are 0")
    if elsewhere:
        scores.notes.append(f"{elsewhere} masks come with a Dice computed elsewhere: see how before comparing")
    scores.details["per_structure"] = {
        name: {"dice": float(np.mean(values)), "sd": deviation(values), "count": len(values)}
        for name, values in sorted(per_structure.items())
    }
    scores.details["_per_structure"] = dict(per_structure)


def _score_retrieval(scores: TaskScores, records: Sequence[Record], pool: int | None) -> None:
    images = np.array([record.image_features for record in records])
    texts = np.array([record.text_features for record in records])
    for metric, value in recall_at_k(images, texts, pool=pool).items():
        scores.metrics[metric] = _point(value, len(records))
    scores.notes.append(f"pool of {min(pool or len(records), len(records))}")


def findings_scores(
    said: Sequence[Sequence[str]], truth: Sequence[dict[str, int]], names: Sequence[str]
) -> dict[str, Any]:
    """Precision, recall and F1 of findings that were named, for any list of findings.

    Args:
        said: the findings that each report names as present.
        truth: {finding: 1, 0, −1} of each.
        names: the findings.
    """
    table = np.array([[name in one for name in names] for one in said], dtype=bool).reshape(len(said), len(names))
    right = np.array([[one.get(name, -1) for name in names] for one in truth]).reshape(len(said), len(names))
    return precision_recall_f1(table, right, names)


__all__ = ["SystemScores", "TaskScores", "findings_scores", "score_predictions"]
