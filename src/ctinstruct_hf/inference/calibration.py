"""What `ctinstruct calibrate` found out about a model on scans whose truth is known: `calibration.json` in its folder."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CTInstructError
from ..files import write_whole
from .agreement import THRESHOLD
from .folders import read_object

CALIBRATION = "calibration.json"


@dataclass(frozen=True)
class DiseaseCalibration:
    """How a disease's logit becomes a probability, and from which probability on the disease counts as there.

    Attributes:
        threshold: the probability with the best F1.
        temperature, bias: the probability is sigmoid(logit / temperature + bias).
        ece_before, ece_after: expected calibration error without and with temperature and bias, held out by folds.
        scans: with a label of it.
    """

    threshold: float = THRESHOLD
    temperature: float = 1.0
    bias: float = 0.0
    ece_before: float | None = None
    ece_after: float | None = None
    scans: int = 0


@dataclass(frozen=True)
class FeatureModel:
    """Where the scans lie that a model was calibrated on, in the tower's pooled features and in plain properties.

    Attributes:
        mean: [D] of the pooled features.
        axes: [K, D] principal axes.
        variances: [K] along them.
        rest: variance along each other axis.
        distances: [101] percentiles of the Mahalanobis distance of scans that were held out.
        properties: {name: [smallest, largest]} of the scans.
        scans: how many.
    """

    mean: list[float]
    axes: list[list[float]]
    variances: list[float]
    rest: float
    distances: list[float]
    properties: dict[str, list[float]]
    scans: int


@dataclass(frozen=True)
class Calibration:
    """All of it; a model without such a file has an empty one."""

    diseases: dict[str, DiseaseCalibration] = field(default_factory=dict)
    features: FeatureModel | None = None

    def of(self, disease: str) -> DiseaseCalibration:
        """Of a disease, or what holds without a calibration: probabilities as they are, there from 0.5 on."""
        return self.diseases.get(disease, DiseaseCalibration())

    def probability(self, disease: str, probability: float) -> float:
        """The calibrated probability of the model's own; that itself where no temperature and bias were found."""
        found = self.of(disease)
        if (found.temperature, found.bias) == (1.0, 0.0):
            return probability
        inside = min(max(probability, 1e-12), 1 - 1e-12)
        return 1 / (1 + math.exp(-(math.log(inside / (1 - inside)) / found.temperature + found.bias)))


def read_calibration(folder: Path) -> Calibration:
    """The calibration in a model's folder; an empty one where there is no file.

    Raises:
        CTInstructError: where the file is no calibration.
    """
    path = folder / CALIBRATION
    if not path.exists():
        return Calibration()
    found = read_object(path)
    try:
        diseases = {str(name): DiseaseCalibration(**values) for name, values in found["diseases"].items()}
        features = None if found.get("features") is None else FeatureModel(**found["features"])
        numbers = [x for one in diseases.values() for x in (one.threshold, one.temperature, one.bias)]
        sound = all(math.isfinite(x) for x in numbers) and all(one.temperature > 0 for one in diseases.values())
        if features is not None:
            width, count = len(features.mean), len(features.variances)
            shapes = len(features.axes) == count and all(len(axis) == width for axis in features.axes)
            sound = sound and shapes and features.rest > 0 and len(features.distances) == 101
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CTInstructError(f"{path} is no calibration: write it again by ctinstruct calibrate.") from error
    if not sound:
        raise CTInstructError(f"{path} has numbers that cannot be: write it again by ctinstruct calibrate.")
    return Calibration(diseases, features)


def write_calibration(folder: Path, calibration: Calibration) -> None:
    """Write `calibration.json` into a model's folder."""
    write_whole(folder / CALIBRATION, json.dumps(asdict(calibration), indent=1) + "\n")


def calibration_of(model: Any) -> Calibration:
    """The calibration that `load_model` found beside a model; an empty one for a model from elsewhere."""
    return getattr(model, "calibration", None) or Calibration()


__all__ = [
    "CALIBRATION",
    "Calibration",
    "DiseaseCalibration",
    "FeatureModel",
    "calibration_of",
    "read_calibration",
    "write_calibration",
]
