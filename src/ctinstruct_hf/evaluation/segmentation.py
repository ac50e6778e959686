"""Overlap of masks: ordinary volume Dice, and the release's Dice along lines, by which its tables must be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import CTInstructError


def volume_dice(
    prediction: Any, truth: Any, labels: Sequence[int] | Mapping[str, int] | None = None
) -> dict[Any, float] | float:
    """Dice coefficient over all voxels of a volume, in 0…1.

    Args:
        prediction, truth: masks or label volumes of one shape.
        labels: label values, or {name: value}, to score each; the volumes are masks without it.

    Returns:
        {label or name: Dice}, or one number for masks. Empty in both: NaN, so that absent structures do not raise a
        mean; empty in one: 0.

    Raises:
        CTInstructError: where the shapes differ.
    """
    predicted, true = _array(prediction), _array(truth)
    if predicted.shape != true.shape:
        raise CTInstructError(f"prediction has shape {predicted.shape}, truth {true.shape}: they must be equal.")
    if labels is None:
        predicted, true = predicted.astype(bool), true.astype(bool)
        return _dice(int((predicted & true).sum()), int(predicted.sum()), int(true.sum()))
    values = dict(labels) if isinstance(labels, Mapping) else {value: value for value in labels}
    # one pass over the voxels for all labels: sizes on both sides, and where they agree
    most = max(values.values(), default=0)
    sizes = []
    for array in (predicted, true, np.where(predicted == true, true, 0)):
        flat = array.ravel()
        if flat.dtype.kind not in "iu":
            flat = flat.astype(np.int64)
        if flat.size and int(flat.min()) < 0:
            flat = np.where(flat < 0, 0, flat)
        sizes.append(np.bincount(flat, minlength=most + 1))
    return {
        name: _dice(int(sizes[2][value]), int(sizes[0][value]), int(sizes[1][value])) for name, value in values.items()
    }


def _dice(overlap: int, predicted: int, true: int) -> float:
    return 2 * overlap / (predicted + true) if predicted + true else float("nan")


def released_dice(prediction: Any, truth: Any, smooth: float = 1e-7) -> float:
    """The release's evaluation: Dice of every line along the first axis, averaged over all lines.

    A line that is empty in both counts as 1, so a small organ scores near 1 even when it is missed: not comparable with
    `volume_dice`.
    """
    predicted, true = _array(prediction).astype(float), _array(truth).astype(float)
    if predicted.shape != true.shape:
        raise CTInstructError(f"prediction has shape {predicted.shape}, truth {true.shape}: they must be equal.")
    overlap = (predicted * true).sum(axis=0)
    total = predicted.sum(axis=0) + true.sum(axis=0)
    return float(((2 * overlap + smooth) / (total + smooth)).mean())


def _array(value: Any) -> np.ndarray:
    return np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
