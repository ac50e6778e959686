"""What `ctinstruct calibrate` finds out: floors of masks, temperature, bias and threshold of each disease, and where the scans lie in
the tower's pooled features."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..data.reading import open_volume
from ..data.samples import AlignmentSample
from ..inference.calibration import Calibration, DiseaseCalibration
from ..inference.fitness import fit_features, pooled, properties
from ..inference.study import Study
from .diagnosis import calibration
from .floors import Marked, find_floor, mark

LEAST = 5  # scans with a disease, and as many without, that a threshold needs
LEAST_SCANS = 12  # that pooled features need
GAIN = 0.02  # of the expected calibration error, by which temperature and bias must win on folds that they were not fitted on
FOLDS = 5


def find_calibration(
    model: Any, processor: Any, samples: Iterable[AlignmentSample], progress: Callable[[str], None] = lambda step: None
) -> tuple[dict[str, list[float]], Calibration]:
    """A model's `mask_floors`, and its calibration, from scans whose masks and labels are known; each scan is read once.

    Args:
        model, processor: what `load_model` returns; an earlier calibration of it is left aside.
        samples: with labels of diseases, masks of the structures that are there, and empty ones of those known to be absent.
        progress: called with the number of each scan.
    """
    model.calibration = None
    names = list(dict.fromkeys(model.config.disease_names))
    features, found, scores, labels = [], [], [], []
    marked: dict[str, list[Marked]] = {}
    for number, sample in enumerate(samples, start=1):
        progress(f"scan {number}")
        study = Study(open_volume(sample.image), model, processor)
        for name, one in mark(study, sample.masks) if sample.masks else ():
            marked.setdefault(name, []).append(one)
        features.append(pooled(study))
        found.append(properties(study.volume))
        known = {label.name: label.value for label in sample.labels}
        row = study.diagnose(names) if names and any(known.get(name, -1) >= 0 for name in names) else {}
        scores.append([row.get(name, np.nan) for name in names])
        labels.append([known.get(name, -1) if row else -1 for name in names])
    fitted = fit_features(features, found) if len(features) >= LEAST_SCANS else None
    floors = {name: floor for name, ones in marked.items() if (floor := find_floor(ones)) is not None}
    return floors, Calibration(fit_diseases(names, np.array(scores), np.array(labels)), fitted)


def fit_diseases(names: Sequence[str], scores: np.ndarray, labels: np.ndarray) -> dict[str, DiseaseCalibration]:
    """{disease: its calibration} from probabilities [N, diseases] and labels [N, diseases] of 1, 0, −1 for unknown.

    Temperature and bias are kept where they lower the expected calibration error of scans that were held out by `GAIN`;
    diseases with too few labels have no calibration.
    """
    fitted = {}
    for column, name in enumerate(names):
        known = labels[:, column] >= 0
        values, truth = scores[known, column].astype(float), labels[known, column].astype(float)
        if min(truth.sum(), len(truth) - truth.sum()) < LEAST:
            continue
        held_out = values.copy()
        fold = np.arange(len(values)) % FOLDS
        for number in range(FOLDS):
            rest = fold != number
            if 0 < truth[rest].sum() < rest.sum():
                held_out[~rest] = _scaled(values[~rest], *_fit(values[rest], truth[rest]))
        before, after = (calibration(one[:, None], truth[:, None])["ece"] for one in (values, held_out))
        wins = before - after >= GAIN
        temperature, bias = _fit(values, truth) if wins else (1.0, 0.0)
        final = _scaled(values, temperature, bias) if wins else values
        fitted[name] = DiseaseCalibration(
            threshold=_threshold(final, truth),
            temperature=round(temperature, 6),
            bias=round(bias, 6),
            ece_before=round(float(before), 4),
            ece_after=round(float(after if wins else before), 4),
            scans=len(values),
        )
    return fitted


def _logits(values: np.ndarray) -> np.ndarray:
    inside = values.clip(1e-7, 1 - 1e-7)
    return np.log(inside / (1 - inside))


def _scaled(values: np.ndarray, temperature: float, bias: float) -> np.ndarray:
    return 1 / (1 + np.exp(-(_logits(values) / temperature + bias)))


def _threshold(values: np.ndarray, truth: np.ndarray) -> float:
    """The probability with the best F1; of several, the one in their middle, since these scans are few."""
    grid = np.linspace(0, 1, 1001)[1:-1]
    above = values[:, None] >= grid
    f1 = 2 * (above & (truth[:, None] == 1)).sum(0) / np.maximum(above.sum(0) + truth.sum(), 1)
    best = grid[f1 == f1.max()]
    return round(float(best[len(best) // 2]), 3)


def _fit(values: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Temperature and bias by logistic regression (Platt's scaling); a slope below 0.05 counts as that."""
    from sklearn.linear_model import LogisticRegression

    found = LogisticRegression(C=10.0).fit(_logits(values)[:, None], truth)
    return 1 / max(float(found.coef_[0, 0]), 0.05), float(found.intercept_[0])


def pooled_ece(diseases: Mapping[str, DiseaseCalibration]) -> tuple[float, float] | None:
    """Mean expected calibration error before and after, over diseases; None without any."""
    known = [(one.ece_before, one.ece_after) for one in diseases.values() if one.ece_before is not None]
    if not known:
        return None
    before, after = np.array(known, dtype=float).mean(axis=0)
    return float(before), float(after)


__all__ = ["find_calibration", "fit_diseases", "pooled_ece"]
