"""DICOM: find the CT series, order its slices by position, read pixels in threads, warn of what is odd.

Steps, in order: files -> headers -> a series -> slices in space -> pixels in HU -> an even, upright grid.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from .volume import (
    AIR_HU,
    CTInstructError,
    CTVolume,
    Limits,
    VolumeSource,
    canonical,
    check_affine,
    check_size,
    clean_hu,
)
from .volume_headers import integer, quiet_pydicom, some
from .volume_pixels import read_pixels
from .volume_resampling import SliceResampling
from .volume_series import SeriesList, choose_series, find_series
from .volume_slices import Slice

SMALLEST_STEP = 0.01  # mm


def read_dicom(
    path: Path, series: str | int | None, spacing: tuple[float, float, float] | None, limit: Limits
) -> CTVolume:
    """A DICOM file or folder; see `read_volume`."""
    with quiet_pydicom():
        name = path.name or str(path)
        found = find_series(path, limit)
        if not found:
            raise CTInstructError(_why_nothing(path, found))
        chosen = choose_series(found, series, name)
        warnings = [*_left_out(found), *chosen.notes]
        for image in chosen.images:
            if image.pixel_spacing is None:
                if spacing is None:
                    raise CTInstructError(
                        f"{image.path.name} has no pixel spacing: pass spacing=(depth, height, width) in mm."
                    )
                image.pixel_spacing = float(spacing[1]), float(spacing[2])
        if len(chosen.images) == 1 and chosen.images[0].thickness is None:
            chosen.images[0].thickness = float(spacing[0]) if spacing else 1.0
            if not spacing:
                warnings.append("The slice has no thickness: 1 mm is taken, volumes in ml mean nothing.")
        return build_volume(chosen.images, path, warnings, limit)


def _why_nothing(path: Path, found: SeriesList) -> str:
    """Why there is no series to read."""
    name = path.name or str(path)
    beside = _modalities(found)
    unreadable = [skipped for skipped in found.skipped if skipped.modality in ("", "CT")]
    if unreadable:
        first = unreadable[0]
        if first.modality:
            return f"{name}: {first.reason.removeprefix('cannot be read: ')}"
        more = f" and {len(unreadable) - 1} more files alike" if len(unreadable) > 1 else ""
        return f"{first.name} {first.reason.rstrip('.')}{more}."
    if beside:
        return f"{name} holds no CT image ({_counted(beside)}): only CT can be read."
    if path.is_file():
        return f"{name} is neither DICOM nor another format that can be read (NIfTI, MHA, NRRD, npy, PNG)."
    return f"{name} holds no DICOM file ({found.looked_at} files looked at)."


def _left_out(found: SeriesList) -> list[str]:
    """Sentences on what lies beside the series."""
    beside = _modalities(found)
    notes = [f"Left out beside the CT: {_counted(beside)}."] if beside else []
    reasons: dict[str, list[str]] = {}
    for skipped in found.skipped:
        if not skipped.modality:
            reasons.setdefault(skipped.reason.rstrip("."), []).append(skipped.name)
    return notes + [f"Left out ({reason}): {some(names)}." for reason, names in reasons.items()]


def _modalities(found: SeriesList) -> Counter[str]:
    return Counter(part.modality for part in found.skipped for _ in part.files if part.modality not in ("", "CT"))


def _counted(modalities: Counter[str]) -> str:
    return ", ".join(f"{count} {modality}" for modality, count in modalities.items())


def build_volume(slices: list[Slice], path: Path, warnings: list[str], limit: Limits) -> CTVolume:
    """Pixels in HU on the grid of the series, then even and upright if they were not."""
    first = slices[0]
    rows, columns = integer(first.header, "Rows"), integer(first.header, "Columns")
    name = path.name or str(path)
    frames = sum({image.path: integer(image.header, "NumberOfFrames", 1) for image in slices}.values())
    check_size(
        name, (max(frames, len(slices)), rows, columns), max(integer(first.header, "BitsAllocated") // 8, 2), limit
    )
    hu = read_pixels(slices, rows, columns, warnings, limit.keep_padding)
    if hu.dtype != np.int16:  # whole values are cleaned slice by slice as they are read
        hu = clean_hu(hu, name, warnings, in_place=True, keep_padding=limit.keep_padding)

    assert first.pixel_spacing is not None
    between_rows, between_columns = first.pixel_spacing  # mm
    normal = np.cross(*first.orientation)
    positions = np.array([image.position for image in slices])
    distances = positions @ normal - first.position @ normal
    step, even, gaps = slice_step(distances, first)
    if step < SMALLEST_STEP:
        raise CTInstructError(f"{name} has slices {step:.2g} mm apart: its positions are broken.")
    affine = np.eye(4)
    affine[:3, 0] = first.orientation[0] * between_columns
    affine[:3, 1] = first.orientation[1] * between_rows
    affine[:3, 2] = normal * step
    affine[:3, 3] = first.position
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    check_affine(affine, name)
    source = VolumeSource(
        (columns, rows, len(slices)),
        affine,
        np.zeros((3, 2)),
        "dicom",
        name,
        path,
        dicom_files=[image.path for image in slices],
        dicom_frames=[image.frame for image in slices],
    )
    stored = hu.transpose(2, 1, 0)  # (i, j, k)
    drift = positions - first.position
    shifts = np.stack(
        [
            drift @ first.orientation[0] / between_columns,
            drift @ first.orientation[1] / between_rows,
        ],
        axis=1,
    )
    tilted = bool(np.abs(shifts).max() > 0.5)
    if even and not tilted:
        return canonical(stored, affine, source, warnings)
    mean_step = (positions[-1] - positions[0]) / (len(slices) - 1)  # mm (LPS)
    if not even:
        off = np.linalg.norm(positions - positions[0] - np.arange(len(slices))[:, None] * mean_step, axis=1).max()
        warnings.append(
            f"Slice distances are uneven ({gaps}): resampled to one every {step:g} mm; a NIfTI mask on the file's slices "
            f"has their mean distance, up to {off:.1f} mm off."
        )
    if tilted:
        lean = drift - distances[:, None] * normal
        slope = lean[-1] / distances[-1]
        beside = float(np.linalg.norm(lean - distances[:, None] * slope, axis=1).max())
        if beside <= 0.5 * min(between_rows, between_columns):
            angle = np.degrees(np.arctan(np.linalg.norm(slope)))
            warnings.append(f"The gantry was tilted by {angle:.1f} degrees: resampled to an upright grid.")
        else:
            warnings.append(
                f"Slices are shifted against each other within their plane, up to {beside:.1f} mm: resampled to an upright "
                "grid; a NIfTI mask on the file's slices has one straight axis for them."
            )
    count = int(np.floor(distances[-1] / step + 1e-3)) + 1
    resampling = SliceResampling(distances, shifts if tilted else np.zeros_like(shifts), step, count)
    margins = resampling.margins
    check_size(name, (count, rows + margins[2] + margins[3], columns + margins[0] + margins[1]), 4, limit)
    source.resampling = resampling
    upright = affine.copy()
    upright[:3, 3] -= margins[0] * affine[:3, 0] + margins[2] * affine[:3, 1]
    source.affine = affine.copy()
    source.affine[:3, 2] = mean_step * [-1.0, -1.0, 1.0]
    even_hu = resampling.forward(stored, fill=0 if limit.labels else AIR_HU, nearest=limit.labels)
    return canonical(even_hu, upright, source, warnings)


def slice_step(distances: np.ndarray, first: Slice) -> tuple[float, bool, str]:
    """mm between slices, whether that holds for all, and where it does not."""
    if len(distances) == 1:
        return first.thickness or 1.0, True, ""
    steps = np.diff(distances)
    step = float(np.median(steps))
    odd = np.flatnonzero(np.abs(steps - step) > max(0.02, 0.02 * step))
    if len(odd) == 0:
        return float(distances[-1] / (len(distances) - 1)), True, ""
    gaps = [f"{steps[index]:.2f} mm after slice {index + 1}" for index in odd[:3]]
    return step, False, ", ".join(gaps) + (f" and {len(odd) - 3} more" if len(odd) > 3 else "")
