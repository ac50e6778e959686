"""Warn of values that cannot be HU and of voxel sizes that are no CT's; refuse a label map given as a scan."""

from __future__ import annotations

import numpy as np

from .volume import CTInstructError, CTVolume

SIZES_MM = (0.01, 100.0)  # of a voxel of any CT, micro-CT and thick slices included
MOST_LABELS = 128  # TotalSegmentator has 117
FEW_LABELS = 32  # a grey image has more values, however coarse
HIGHEST_LABEL = 2**15 - 1  # FreeSurfer's go beyond 12000; above 255 only where neighbours are alike
AIR_ABOVE = -850  # HU; noise and lung around air lie below


def check_plausible(volume: CTVolume, refuse_labels: bool) -> None:
    """Add a warning to `volume` where its values cannot be HU, or its voxels no CT's.

    Args:
        volume: as read.
        refuse_labels: refuse a mask or a label map instead of warning of it.

    Raises:
        CTInstructError: for a mask or a label map.
    """
    what = volume.source.name or "the image"
    odd = [mm for mm, count in zip(volume.spacing, volume.shape, strict=True) if count > 1 and _is_odd(mm)]
    if odd:
        sizes = " x ".join(f"{mm:.4g}" for mm in volume.spacing)
        volume.warnings.append(
            f"Voxels of {sizes} mm are no CT's: the file's unit of length is wrong, and so are sizes and volumes."
        )
    hu = volume.hu
    sample = hu[tuple(slice(None, None, max(1, count // 48)) for count in hu.shape)]
    low, high = float(sample.min()), float(sample.max())
    if low < -100 and high - low > 20:
        if np.mean(sample > 4000) > 0.25:
            volume.warnings.append("A quarter of the voxels is above 4000 HU, denser than bone: the values are not HU.")
        lowest = float(np.mean(sample == low))
        if low > AIR_ABOVE and lowest > 0.1 and volume.source.kind != "picture":
            volume.warnings.append(
                f"{lowest:.0%} of the voxels have the lowest value, {low:g} HU: air is cut off, as by a display window."
            )
        return
    low, high = float(hu.min()), float(hu.max())
    labels = _labels(hu, low, high)
    if labels and refuse_labels:
        raise CTInstructError(
            f"{what} is a {'mask' if labels <= 2 else 'label map'}, not a CT in HU: it holds only {labels} integers "
            f"from {low:g} to {high:g}; give the scan that it was drawn on."
        )
    if labels:
        why = f"{labels} integers from {low:g} to {high:g} are a mask or labels"
    elif low == high:
        why = f"every voxel is {low:g}"
    elif high - low <= 20:
        why = f"{low:.4g} to {high:.4g} is too narrow for air, tissue and bone: they may have been scaled"
    elif low >= 0 and high <= 255:
        why = f"{low:g} to {high:g} are grey levels of 8 bits"
    elif low >= 0:
        why = f"none is below 0, where air and fat lie ({low:g} to {high:g}): an intercept of -1024 may be missing"
    else:
        return
    volume.warnings.append(f"The values do not look like HU: {why}.")


def _is_odd(mm: float) -> bool:
    return not SIZES_MM[0] <= mm <= SIZES_MM[1]


def _labels(hu: np.ndarray, low: float, high: float) -> int:
    """How many labels a mask or label map has, its background among them; 0 where it is none."""
    if (
        low == high
        or low < -1
        or high > HIGHEST_LABEL
        or (hu.dtype.kind == "f" and any((plane % 1).any() for plane in hu))
    ):
        return 0
    counts = np.zeros(int(high) + 2, np.int64)
    for plane in hu:
        counts += np.bincount((plane.ravel().astype(np.int64) + 1), minlength=len(counts))
    values = np.flatnonzero(counts) - 1
    if 0 not in values or len(values) > MOST_LABELS or hu.size < 8 * len(values):
        return 0
    if (len(values) > FEW_LABELS or high > 255) and not _piecewise_constant(hu):
        return 0
    return len(values)


def _piecewise_constant(hu: np.ndarray) -> bool:
    """Whether most neighbours along every axis are equal, where not both are 0."""
    for axis in range(3):
        if hu.shape[axis] < 2:
            continue
        first, second = (hu.take(range(*ends), axis) for ends in ((0, hu.shape[axis] - 1), (1, hu.shape[axis])))
        counted = (first != 0) | (second != 0)
        if (first == second)[counted].mean() < 0.6:
            return False
    return True
