"""Uncertainty of scores: mean ± standard deviation, bootstrap intervals, paired tests between two systems, groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import CTInstructError


@dataclass(frozen=True)
class Interval:
    """A number with its spread.

    Attributes:
        mean, sd: over samples (standard deviation with n − 1); sd is NaN where it was computed from resampling only.
        low, high: bounds of the confidence interval.
        count: number of samples.
    """

    mean: float
    sd: float
    low: float
    high: float
    count: int


def deviation(values: Any) -> float:
    """Standard deviation with n − 1, everywhere in scores; 0 of one value, NaN of none."""
    scores = np.asarray(values, dtype=float)
    return float(scores.std(ddof=1)) if len(scores) > 1 else 0.0 if len(scores) else float("nan")


def resample(count: int, times: int = 1000, seed: int = 0) -> np.ndarray:
    """How often each of `count` samples is drawn in each of `times` bootstraps: int32 [times, count], rows sum to count."""
    rng = np.random.default_rng(seed)
    return np.stack([np.bincount(rng.integers(count, size=count), minlength=count) for _ in range(times)]).astype(np.int32)  # fmt: skip


def bootstrap_mean(values: Any, times: int = 1000, level: float = 0.95, seed: int = 0) -> Interval:
    """Mean, standard deviation and percentile bootstrap interval of scores per sample; NaN values are left out.

    Raises:
        CTInstructError: where nothing is left.
    """
    scores = np.asarray(values, dtype=float).ravel()
    scores = scores[~np.isnan(scores)]
    if not len(scores):
        raise CTInstructError("There are no scores to average.")
    means = resample(len(scores), times, seed) @ scores / len(scores)
    tail = (1 - level) / 2 * 100
    low, high = np.percentile(means, [tail, 100 - tail])
    return Interval(float(scores.mean()), deviation(scores), float(low), float(high), len(scores))


def bootstrap_auc(
    probabilities: Any, labels: Any, times: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[list[Interval], Interval]:
    """Bootstrap intervals of the area under the ROC curve of each disease and of their mean.

    Samples are drawn with replacement, the same for all diseases. Instead of sorting again in every bootstrap, samples
    are sorted once and counted by how often they were drawn (Mann and Whitney's U, ties as a half).

    Args:
        probabilities, labels: [N, diseases]; labels 1, 0, or −1 for unknown.
        times: bootstraps.

    Returns:
        The interval of each disease (NaN where it has one class only), and that of the mean over diseases with both
        classes. Their `mean` is the value on all samples, `sd` NaN.
    """
    scores, truth = np.asarray(probabilities, dtype=float), np.asarray(labels, dtype=float)
    if scores.shape != truth.shape or scores.ndim != 2:
        raise CTInstructError(
            f"probabilities has shape {scores.shape}, labels {truth.shape}: both must be [N, diseases]."
        )
    drawn = np.vstack([np.ones((1, len(scores)), np.int32), resample(len(scores), times, seed)])
    areas = np.stack([_weighted_auc(scores[:, column], truth[:, column], drawn) for column in range(scores.shape[1])])
    tail = (1 - level) / 2 * 100

    def interval(values: np.ndarray, count: int) -> Interval:
        kept = values[1:][~np.isnan(values[1:])]
        if np.isnan(values[0]) or not len(kept):
            return Interval(float("nan"), float("nan"), float("nan"), float("nan"), count)
        low, high = np.percentile(kept, [tail, 100 - tail])
        return Interval(float(values[0]), float("nan"), float(low), float(high), count)

    known = (truth >= 0).sum(0)
    each = [interval(row, int(known[index])) for index, row in enumerate(areas)]
    usable = areas[~np.isnan(areas[:, 0])]
    middle = np.full(areas.shape[1], np.nan) if not len(usable) else _nanmean(usable)
    return each, interval(middle, len(scores))


def _nanmean(rows: np.ndarray) -> np.ndarray:
    kept = ~np.isnan(rows)
    return np.where(kept, rows, 0).sum(0) / np.maximum(kept.sum(0), 1)


def _weighted_auc(score: np.ndarray, truth: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """[bootstraps]: AUC of a disease for each row of `drawn`."""
    known = truth >= 0
    order = np.argsort(score[known], kind="stable")
    values, positive = score[known][order], truth[known][order] == 1
    weights = drawn[:, known][:, order].astype(np.float64)
    ahead, behind = weights * positive, weights * ~positive
    starts = np.flatnonzero(np.r_[True, values[1:] != values[:-1]])  # of each group of equal scores
    if len(starts) < len(values):
        ahead, behind = np.add.reduceat(ahead, starts, axis=1), np.add.reduceat(behind, starts, axis=1)
    below = np.cumsum(behind, axis=1) - behind
    won = ((below + behind / 2) * ahead).sum(1)
    pairs = ahead.sum(1) * behind.sum(1)
    return np.where(pairs > 0, won / np.where(pairs > 0, pairs, 1), np.nan)


def paired_test(first: Any, second: Any, times: int = 10_000, seed: int = 0) -> float:
    """Two-sided p-value that two systems' scores on the same samples have the same mean, by sign-flip permutation.

    Args:
        first, second: scores per sample, in the same order; pairs with a NaN are left out.
        times: random sign patterns; with at most 13 pairs that differ, all of them are gone through.

    Raises:
        CTInstructError: for lists of different length.
    """
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if a.shape != b.shape or a.ndim != 1:
        raise CTInstructError(f"A paired test needs the same samples: {a.shape} and {b.shape} scores.")
    difference = (a - b)[~np.isnan(a - b)]
    difference = difference[difference != 0]
    if not len(difference):
        return 1.0
    seen = abs(difference.sum()) - 1e-12 * np.abs(difference).sum()
    if len(difference) <= 13:
        signs = ((np.arange(2 ** len(difference))[:, None] >> np.arange(len(difference))) & 1) * 2.0 - 1
        return float((np.abs(signs @ difference) >= seen).mean())
    rng = np.random.default_rng(seed)
    hits, done = 0, 0
    while done < times:
        batch = min(1000, times - done)
        signs = rng.integers(0, 2, size=(batch, len(difference)), dtype=np.int8) * 2.0 - 1
        hits += int((np.abs(signs @ difference) >= seen).sum())
        done += batch
    return (hits + 1) / (times + 1)


def stars(p: float) -> str:
    """The paper's marks: ** below 0.01, * below 0.05."""
    return "**" if p < 0.01 else "*" if p < 0.05 else ""


def age_group(value: str) -> str:
    """DICOM ages ("061Y", "6M") and numbers, in groups of 20 years."""
    text = str(value).strip().upper()
    months = text.endswith(("M", "W", "D"))
    try:
        years = 0 if months else float(text.rstrip("Y") or "x")
    except ValueError:
        return "unknown"
    start = int(years // 20) * 20
    return f"{start}-{start + 19}"


def thickness_group(value: str) -> str:
    """Slice thickness in mm."""
    try:
        mm = float(value)
    except ValueError:
        return "unknown"
    return "<= 1 mm" if mm <= 1 else "1-2.5 mm" if mm <= 2.5 else "> 2.5 mm"


GROUPINGS: dict[str, Callable[[str], str]] = {
    "scanner": lambda value: str(value).strip() or "unknown",
    "sex": lambda value: {"M": "male", "F": "female"}.get(str(value).strip().upper()[:1], "unknown"),
    "age": age_group,
    "slice_thickness": thickness_group,
}


def by_group(
    values: Sequence[float], meta: Sequence[Mapping[str, str]], times: int = 1000
) -> dict[str, dict[str, Interval]]:
    """Scores per group of scanner, sex, age and slice thickness, where the metadata has them.

    Args:
        values: a score per sample.
        meta: what is known of each sample.

    Returns:
        {"sex": {"female": interval, …}, …}; a grouping that no sample has is left out.
    """
    kept = [index for index, value in enumerate(values) if not np.isnan(value)]
    scores, known = np.asarray(values, dtype=float)[kept], [meta[index] for index in kept]
    return {
        key: {name: bootstrap_mean(scores[rows], times) for name, rows in groups.items()}
        for key, groups in group_rows(known).items()
    }


def group_rows(meta: Sequence[Mapping[str, str]]) -> dict[str, dict[str, list[int]]]:
    """{"sex": {"female": rows, …}, …}; a grouping that no sample has is left out."""
    found: dict[str, dict[str, list[int]]] = {}
    for key, name_of in GROUPINGS.items():
        if not any(key in fields for fields in meta):
            continue
        groups: dict[str, list[int]] = {}
        for row, fields in enumerate(meta):
            groups.setdefault(name_of(fields[key]) if key in fields else "unknown", []).append(row)
        found[key] = dict(sorted(groups.items()))
    return found


__all__ = [
    "GROUPINGS",
    "Interval",
    "bootstrap_auc",
    "bootstrap_mean",
    "by_group",
    "deviation",
    "group_rows",
    "paired_test",
    "resample",
    "stars",
]
