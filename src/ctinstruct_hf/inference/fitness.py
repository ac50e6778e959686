"""Whether a scan is like those that a model was calibrated on: Mahalanobis distance of the tower's pooled features (Lee et
al. 2018), and what is unusual about the scan in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..processing.volume import CTVolume
from .calibration import FeatureModel, calibration_of

KEPT_AXES = 16
# no alarm where the distance is below this percentile of held-out scans, with a margin for how few they are
PERCENTILE, MARGIN = 99, 1.15
_STEP = 4  # voxels between those that HU are looked at
# name -> (its unit, what more and less than usual mean)
PROPERTIES: dict[str, tuple[str, str, str]] = {
    "slice distance": ("mm", "slices far apart", "slices close together"),
    "pixel spacing": ("mm", "coarse pixels", "fine pixels"),
    "length from head to feet": ("mm", "much of the body in the scan", "body part cut short from head to feet"),
    "field of view across": ("mm", "wide field of view", "body part cut at the sides, or a small field of view"),
    "share of air": ("%", "hardly any body in the scan", "no air around the body"),
    "share of lung": ("%", "much lung", "no lung, or another body part"),
    "share of fat": ("%", "much fat", "little fat"),
    "share of soft tissue": ("%", "much soft tissue", "little soft tissue"),
    "share of bone": ("%", "much bone or metal", "no bone"),
    "soft tissue": ("HU", "strong contrast medium", "no contrast medium, or values that are no HU"),
    "noise": ("HU", "noisy values", "smooth values, as of no scanner"),
}
UNKNOWN = "unknown"
USUAL = "like what the model was trained on"
UNLIKE = "unlike what the model was trained on"


@dataclass(frozen=True)
class Fitness:
    """How a scan compares with those that a model was calibrated on.

    Attributes:
        state: like or unlike what the model was trained on, or unknown without a calibration.
        percentile: of held-out scans, the share (0…100) that lie closer; None where it is unknown.
        distance: Mahalanobis, of the pooled features.
        unusual: properties outside the range of those scans, a phrase each.
    """

    state: str = UNKNOWN
    percentile: float | None = None
    distance: float | None = None
    unusual: tuple[str, ...] = ()

    @property
    def fits(self) -> bool | None:
        """Whether the scan is like the others; None where it is unknown."""
        return None if self.state == UNKNOWN else self.state == USUAL

    @property
    def warning(self) -> str | None:
        """A sentence where the scan is unlike the others."""
        if self.state != UNLIKE:
            return None
        why = f": {'; '.join(self.unusual)}" if self.unusual else ""
        return f"The scan is {UNLIKE} (farther than {self.percentile:.0f} % of such scans){why}."

    def to_json(self) -> dict[str, Any]:
        found = asdict(self)
        return {**found, "unusual": list(self.unusual)}


def pooled(study: Any) -> np.ndarray:
    """[D] the mean of the tower's features over the slices of a study's last scan that are no padding."""
    stop = len(study.batch["slice_mask"])
    rows = slice(stop - int(np.prod(study.batch["patch_grid"][-1].tolist())), stop)
    states = study.features.last_hidden_state[rows][study.batch["slice_mask"][rows]]
    return states.float().mean(dim=0).cpu().numpy().astype(np.float64)


def properties(volume: CTVolume) -> dict[str, float]:
    """{name of `PROPERTIES`: value} of a scan."""
    depth, height, width = volume.shape
    mm = volume.spacing
    hu = volume.hu[:: max(1, min(_STEP, depth // 16)), ::_STEP, ::_STEP].astype(np.float32)
    soft = (hu > -20) & (hu < 300)
    body = hu > -300
    rough = np.abs(np.diff(volume.hu[depth // 2].astype(np.float32), axis=-1)) if width > 1 else np.zeros(1)
    return {
        "slice distance": mm[0],
        "pixel spacing": max(mm[1:]),
        "length from head to feet": depth * mm[0],
        "field of view across": max(height * mm[1], width * mm[2]),
        "share of air": 100 * float((hu < -950).mean()),
        "share of lung": 100 * float(((hu > -950) & (hu < -500)).mean()),
        "share of fat": 100 * float(((hu > -150) & (hu < -50)).sum() / max(body.sum(), 1)),
        "share of soft tissue": 100 * float(soft.sum() / max(body.sum(), 1)),
        "share of bone": 100 * float((hu > 300).sum() / max(body.sum(), 1)),
        "soft tissue": float(hu[soft].mean()) if soft.any() else -1000.0,
        "noise": float(np.median(rough)),
    }


def fit_features(
    pooled_features: Sequence[np.ndarray], found: Sequence[dict[str, float]], folds: int = 5
) -> FeatureModel:
    """A normal distribution of pooled features: its first axes and a common variance of the rest.

    Args:
        pooled_features: [D] of each scan.
        found: `properties` of each.
        folds: that distances are held out by.
    """
    matrix = np.stack(pooled_features)
    fold = np.arange(len(matrix)) % min(folds, len(matrix))
    held_out = np.zeros(len(matrix))
    for number in set(fold.tolist()):
        part = _axes(matrix[fold != number])
        held_out[fold == number] = [_distance(row, *part) for row in matrix[fold == number]]
    mean, axes, variances, rest = _axes(matrix)
    ranges = {name: [min(one[name] for one in found), max(one[name] for one in found)] for name in PROPERTIES}
    return FeatureModel(
        mean=_short(mean),
        axes=[_short(axis) for axis in axes],
        variances=_short(variances),
        rest=float(f"{rest:.6g}"),
        distances=_short(np.percentile(held_out, np.arange(101))),
        properties={name: _short(np.array(ends)) for name, ends in ranges.items()},
        scans=len(matrix),
    )


def _axes(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    mean = matrix.mean(axis=0)
    _, lengths, axes = np.linalg.svd(matrix - mean, full_matrices=False)
    variances = lengths**2 / max(len(matrix) - 1, 1)
    kept = min(KEPT_AXES, max(len(matrix) // 4, 1))
    rest = max(float(variances[kept:].sum()) / max(matrix.shape[1] - kept, 1), 1e-9)
    return mean, axes[:kept], np.maximum(variances[:kept], rest), rest


def _distance(row: np.ndarray, mean: np.ndarray, axes: np.ndarray, variances: np.ndarray, rest: float) -> float:
    along = axes @ (row - mean)
    beside = max(float(((row - mean) ** 2).sum() - (along**2).sum()), 0.0)
    return float(np.sqrt((along**2 / variances).sum() + beside / rest))


def _short(values: np.ndarray) -> list[float]:
    return [float(f"{value:.6g}") for value in values]


def judge(model: FeatureModel | None, row: np.ndarray, found: dict[str, float]) -> Fitness:
    """A scan by its pooled features [D] and `properties`."""
    if model is None or len(model.mean) != len(row):
        return Fitness()
    distance = _distance(row, np.array(model.mean), np.array(model.axes), np.array(model.variances), model.rest)
    percentile = float(np.searchsorted(model.distances, distance) / len(model.distances) * 100)
    unusual = []
    for name, (unit, more, less) in PROPERTIES.items():
        low, high = model.properties.get(name, (-np.inf, np.inf))
        slack = 0.05 * (high - low)
        if not low - slack <= found[name] <= high + slack:
            word = more if found[name] > high else less
            unusual.append(f"{word} ({name} {found[name]:.3g} {unit}, usually {low:.3g} to {high:.3g})")
    alarm = distance > MARGIN * model.distances[PERCENTILE]
    return Fitness(UNLIKE if alarm else USUAL, round(percentile, 1), round(distance, 2), tuple(unusual))


def study_fitness(study: Any) -> Fitness:
    """Of a study's last scan; see `Study.fitness`."""
    model = calibration_of(study.model).features
    if model is None:
        return Fitness()
    return judge(model, pooled(study), properties(study.volume))


__all__ = [
    "PROPERTIES",
    "UNKNOWN",
    "UNLIKE",
    "USUAL",
    "Fitness",
    "fit_features",
    "judge",
    "pooled",
    "properties",
    "study_fitness",
]
