"""Multi-label diagnosis (section 4.1): AUC, accuracy, F1 and precision per disease and their means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import CTInstructError

METRICS = ("auc", "accuracy", "f1", "precision")


def best_thresholds(probabilities: Any, labels: Any) -> np.ndarray:
    """Per disease the threshold with the highest F1, of 1,000 between 0 and 1; meant for validation data.

    Args:
        probabilities, labels: [N, diseases]; labels 1, 0, or −1 for unknown.

    Returns:
        [diseases]; 0.5 where a disease has no positive case.
    """
    scores, truth = _checked(probabilities, labels)
    grid = np.linspace(0, 1, 1001)[:-1]
    chosen = []
    for column in range(scores.shape[1]):
        known = truth[:, column] >= 0
        score, positive = scores[known, column], truth[known, column] == 1
        if not positive.any():
            chosen.append(0.5)
            continue
        above = score[:, None] >= grid[None]
        hits = (above & positive[:, None]).sum(0)
        f1 = 2 * hits / np.maximum(above.sum(0) + positive.sum(), 1)
        chosen.append(float(grid[int(f1.argmax())]))
    return np.array(chosen)


def multilabel_scores(
    probabilities: Any,
    labels: Any,
    thresholds: float | Sequence[float] | np.ndarray | Mapping[str, float] | str = 0.5,
    names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """AUC, accuracy, F1 and precision, in 0…1.

    Args:
        probabilities, labels: [N, diseases]; labels 1, 0, or −1 for unknown.
        thresholds: a number for all, a list (from `best_thresholds` on validation data), {name: threshold}, or
            "test_set": `best_thresholds` on the scored data, as in the release; `thresholds_from` then says so.
        names: of the diseases; numbers by default.

    Returns:
        {"auc", "accuracy", "f1", "precision"}: means over diseases; "per_disease": {name: the same with "threshold"
        and "positives"}; "undefined_auc": diseases of one class only, left out of the mean; "thresholds_from".

    Raises:
        CTInstructError: for shapes that differ, or probabilities that are no numbers in 0…1.
    """
    from sklearn.metrics import roc_auc_score

    scores, truth = _checked(probabilities, labels)
    count = scores.shape[1]
    names = list(names) if names is not None else [str(index) for index in range(count)]
    if len(names) != count:
        raise CTInstructError(f"names has {len(names)} entries for {count} diseases.")
    if isinstance(thresholds, str):
        if thresholds != "test_set":
            raise CTInstructError(f"thresholds is '{thresholds}': give numbers, or 'test_set'.")
        limits, origin = best_thresholds(scores, truth), "test_set"
    elif isinstance(thresholds, Mapping):
        missing = [name for name in names if name not in thresholds]
        if missing:
            raise CTInstructError(f"thresholds lacks {', '.join(missing)}.")
        limits, origin = np.array([thresholds[name] for name in names]), "given"
    else:
        limits, origin = np.broadcast_to(np.asarray(thresholds, dtype=float), (count,)), "given"
    per_disease: dict[str, dict[str, float]] = {}
    for column, name in enumerate(names):
        known = truth[:, column] >= 0
        score, positive = scores[known, column], truth[known, column] == 1
        predicted = score >= limits[column]
        hits = int((predicted & positive).sum())
        both = positive.any() and not positive.all()
        per_disease[name] = {
            "auc": float(roc_auc_score(positive, score)) if both else float("nan"),
            "accuracy": float((predicted == positive).mean()) if len(score) else float("nan"),
            "f1": 2 * hits / max(int(predicted.sum() + positive.sum()), 1),
            "precision": hits / max(int(predicted.sum()), 1),
            "threshold": float(limits[column]),
            "positives": int(positive.sum()),
        }
    means = {metric: _mean([row[metric] for row in per_disease.values()]) for metric in METRICS}
    undefined = [name for name, row in per_disease.items() if np.isnan(row["auc"])]
    return {**means, "per_disease": per_disease, "undefined_auc": undefined, "thresholds_from": origin}


def calibration(probabilities: Any, labels: Any, bins: int = 10) -> dict[str, Any]:
    """Whether a probability of 0.8 is right eight times in ten.

    Args:
        probabilities, labels: [N, diseases] or [N]; labels 1, 0, or −1 for unknown.
        bins: of equal width between 0 and 1.

    Returns:
        {"ece": expected calibration error over all known labels, "brier": mean squared error, "bins": a row {"low",
        "high", "count", "confidence", "frequency"} for each bin that is not empty}.
    """
    scores, truth = _checked(probabilities, labels)
    known = truth >= 0
    score, positive = scores[known], truth[known]
    bin_of = np.minimum((score * bins).astype(int), bins - 1)
    counts = np.bincount(bin_of, minlength=bins)
    confidence = np.bincount(bin_of, score, bins) / np.maximum(counts, 1)
    frequency = np.bincount(bin_of, positive, bins) / np.maximum(counts, 1)
    rows = [
        {
            "low": index / bins,
            "high": (index + 1) / bins,
            "count": int(counts[index]),
            "confidence": float(confidence[index]),
            "frequency": float(frequency[index]),
        }
        for index in range(bins)
        if counts[index]
    ]
    total = max(int(counts.sum()), 1)
    return {
        "ece": float((np.abs(confidence - frequency) * counts).sum() / total),
        "brier": float(np.square(score - positive).mean()) if len(score) else float("nan"),
        "bins": rows,
    }


def table_of(
    probabilities: Sequence[Mapping[str, float]], labels: Sequence[Mapping[str, int]]
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Diseases, and probabilities and labels [N, diseases] of samples; a disease that a sample lacks is unknown there."""
    names = list(dict.fromkeys(name for row in probabilities for name in row))
    return (
        names,
        np.array([[row.get(name, 0.5) for name in names] for row in probabilities]),
        np.array([[row.get(name, -1) for name in names] for row in labels]),
    )


def _mean(values: Sequence[float]) -> float:
    kept = [value for value in values if not np.isnan(value)]
    return float(np.mean(kept)) if kept else float("nan")


def _checked(probabilities: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    scores, truth = (
        np.asarray(values.detach().float().cpu() if hasattr(values, "detach") else values, dtype=float)
        for values in (probabilities, labels)
    )
    if scores.ndim == 1:
        scores, truth = scores[:, None], truth.reshape(-1, 1)
    if scores.shape != truth.shape:
        raise CTInstructError(f"probabilities has shape {scores.shape}, labels {truth.shape}: they must be equal.")
    if np.isnan(scores).any():
        rows = sorted({int(row) for row in np.nonzero(np.isnan(scores))[0]})
        raise CTInstructError(f"probabilities has NaN in rows {rows[:10]}.")
    if not ((scores >= 0) & (scores <= 1)).all():
        raise CTInstructError("probabilities must lie between 0 and 1.")
    if not np.isin(truth, (-1, 0, 1)).all():
        raise CTInstructError("labels must be 1, 0, or −1 for unknown.")
    return scores, truth
