"""DICOM: find the CT series, order its slices by position, read pixels in threads, notice what is odd.

Steps, in order: files -> headers -> one series -> slices in space -> pixels in HU -> an even, upright grid.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pydicom

from .volume import AIR_HU, CTInstructError, CTVolume, Limits, VolumeSource, canonical, check_size, clean_hu
from .volume_pixels import Slice, read_pixels, slices_of
from .volume_resampling import SliceResampling
from .volume_series import choose_series, integer, list_files, read_headers, some


def read_dicom(path: Path, series: str | None, spacing: tuple[float, float, float] | None, limit: Limits) -> CTVolume:
    """A DICOM file or folder; see `read_volume`."""
    before = pydicom.config.settings.reading_validation_mode
    # pydicom's warnings quote what they find, and that may be a patient's
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    try:
        return _read_dicom(path, series, spacing, limit)
    finally:
        pydicom.config.settings.reading_validation_mode = before


def _read_dicom(path: Path, series: str | None, spacing: tuple[float, float, float] | None, limit: Limits) -> CTVolume:
    files = [path] if path.is_file() else list_files(path)
    headers, broken = read_headers(files)
    if not headers:
        if path.is_file():
            raise CTInstructError(
                f"{path.name} is neither DICOM nor another format that can be read (NIfTI, MHA, NRRD, npy, PNG)."
            )
        raise CTInstructError(f"{path.name or path} holds no DICOM file ({len(files)} files looked at).")
    warnings: list[str] = []
    if broken:
        warnings.append(f"{len(broken)} broken DICOM files are left out: {some(broken)}.")
    chosen = choose_series(headers, series, path.name or str(path), warnings)
    slices = [part for file, header in chosen for part in slices_of(file, header, spacing)]
    slices = order_slices(slices, warnings)
    return build_volume(slices, path, warnings, limit)


def order_slices(slices: list[Slice], warnings: list[str]) -> list[Slice]:
    """Slices of the commonest size, spacing and orientation, by position along their normal, each place once."""
    spacings = np.round([one.pixel_spacing for one in slices], 4).tolist()
    planes = np.round([one.orientation.ravel() for one in slices], 3).tolist()
    keys = [
        (integer(one.header, "Rows"), integer(one.header, "Columns"), *spacing, *plane)
        for one, spacing, plane in zip(slices, spacings, planes, strict=True)
    ]
    common, count = Counter(keys).most_common(1)[0]
    if count < len(slices):
        warnings.append(f"{len(slices) - count} images of another size, spacing or orientation are left out.")
        slices = [one for one, key in zip(slices, keys, strict=True) if key == common]
    normal = np.cross(*slices[0].orientation)
    slices = sorted(slices, key=lambda one: float(one.position @ normal))
    distances = np.array([float(one.position @ normal) for one in slices])
    repeated = np.flatnonzero(np.diff(distances) < 1e-3) + 1
    if len(repeated) == 0:
        return slices
    places = len(slices) - len(repeated)
    if (
        places == 1
        and len(slices) > 1
        and all("ImagePositionPatient" not in one.header for one in slices)
        and not any(one.header.get("PerFrameFunctionalGroupsSequence") for one in slices)
    ):
        raise CTInstructError(f"{slices[0].path.name} and its series have no slice positions: they cannot be ordered.")
    if places > 1 and len(slices) % places == 0 and len(slices) // places > 1:
        raise CTInstructError(
            f"The series of {slices[0].path.name} has {len(slices) // places} images at each of {places} places (4D): "
            "give the files of one phase."
        )
    warnings.append(f"{len(repeated)} repeated slices are left out, the first of each place is kept.")
    gone = set(repeated.tolist())
    return [one for index, one in enumerate(slices) if index not in gone]


def build_volume(slices: list[Slice], path: Path, warnings: list[str], limit: Limits) -> CTVolume:
    """Pixels in HU on the grid of the series, then even and upright if they were not."""
    first = slices[0]
    rows, columns = int(first.header.Rows), int(first.header.Columns)
    name = path.name or str(path)
    check_size(name, (len(slices), rows, columns), 2, limit)
    hu = read_pixels(slices, rows, columns, warnings, limit.keep_padding)
    if hu.dtype != np.int16:  # whole values are cleaned slice by slice as they are read
        hu = clean_hu(hu, name, warnings, in_place=True, keep_padding=limit.keep_padding)

    normal = np.cross(*first.orientation)
    positions = np.array([one.position for one in slices])
    distances = positions @ normal - first.position @ normal
    step, even, gaps = slice_step(distances, first)
    affine = np.eye(4)
    # pixel spacing is (between rows, between columns); i counts columns
    affine[:3, 0] = first.orientation[0] * first.pixel_spacing[1]
    affine[:3, 1] = first.orientation[1] * first.pixel_spacing[0]
    affine[:3, 2] = normal * step
    affine[:3, 3] = first.position
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    source = VolumeSource(
        (columns, rows, len(slices)),
        affine,
        np.zeros((3, 2)),
        "dicom",
        name,
        path,
        dicom_files=[one.path for one in slices],
        dicom_frames=[one.frame for one in slices],
    )
    stored = hu.transpose(2, 1, 0)  # (i, j, k)
    drift = positions - first.position
    shifts = np.stack(
        [
            drift @ first.orientation[0] / first.pixel_spacing[1],
            drift @ first.orientation[1] / first.pixel_spacing[0],
        ],
        axis=1,
    )
    tilted = bool(np.abs(shifts).max() > 0.5)
    if even and not tilted:
        return canonical(stored, affine, source, warnings)
    if not even:
        warnings.append(f"Slice distances are uneven ({gaps}): resampled to one every {step:g} mm.")
    if tilted:
        slope = np.linalg.norm(drift[-1] - distances[-1] * normal) / max(float(distances[-1]), 1e-6)
        warnings.append(
            f"The gantry was tilted by {np.degrees(np.arctan(slope)):.1f} degrees: resampled to an upright grid."
        )
    count = int(np.floor(distances[-1] / step + 1e-3)) + 1
    resampling = source.resampling = SliceResampling(
        distances, shifts if tilted else np.zeros_like(shifts), step, count
    )
    upright = affine.copy()
    upright[:3, 3] -= resampling.margins[0] * affine[:3, 0] + resampling.margins[2] * affine[:3, 1]
    if not even:
        source.affine = affine.copy()
        source.affine[:3, 2] *= distances[-1] / (len(slices) - 1) / step
    return canonical(resampling.forward(stored, fill=AIR_HU), upright, source, warnings)


def slice_step(distances: np.ndarray, first: Slice) -> tuple[float, bool, str]:
    """mm between slices, whether that holds for all, and where it does not."""
    if len(distances) == 1:
        return first.thickness or float(first.header.get("SpacingBetweenSlices", 0) or 0) or 1.0, True, ""
    steps = np.diff(distances)
    step = float(np.median(steps))
    odd = np.flatnonzero(np.abs(steps - step) > max(0.02, 0.02 * step))
    if len(odd) == 0:
        return float(distances[-1] / (len(distances) - 1)), True, ""
    gaps = [f"{steps[index]:.2f} mm after slice {index + 1}" for index in odd[:3]]
    return step, False, ", ".join(gaps) + (f" and {len(odd) - 3} more" if len(odd) > 3 else "")
