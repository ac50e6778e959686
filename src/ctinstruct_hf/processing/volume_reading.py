"""`read_volume`: a CT volume from whatever holds one."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import nibabel as nib

from .volume import MAX_BYTES, CTInstructError, CTVolume, Limits, as_numpy, from_array, last_line
from .volume_arrays import read_array_file
from .volume_dicom import read_dicom
from .volume_itk import ITK_SUFFIXES, from_simpleitk, read_itk
from .volume_nifti import from_nibabel, read_nifti
from .volume_pictures import PICTURE_SUFFIXES, from_picture, read_picture
from .volume_zip import unpacked


def read_volume(
    source: Any,
    *,
    spacing: tuple[float, float, float] | None = None,
    series: str | int | None = None,
    window: tuple[float, float] | None = None,
    max_bytes: int | None = None,
    keep_padding: bool = False,
) -> CTVolume:
    """Read a CT volume from a file, a folder or an object.

    Args:
        source: NIfTI (`.nii`, `.nii.gz`), a DICOM file, folder or zip, `.mha/.mhd/.nrrd`, `.npy/.npz`, a picture
            (PNG, JPEG, BMP: one slice), a nibabel or SimpleITK image, a numpy array or torch tensor
            (depth, height, width), or a `CTVolume`, which is returned as it is.
        spacing: mm along (depth, height, width); for arrays, and for files that have none. An array file may have it
            beside it instead, as `<name>.json` with `{"spacing": [...]}`.
        series: which CT series to read where there are several (`list_series`): its SeriesInstanceUID, its number, a part of
            its description, `largest` (most slices) or `thinnest`.
        window: HU of black and white in a picture, −1250…250 by default.
        max_bytes: what the volume may unpack to, 4 GiB by default; checked before anything is allocated.
        keep_padding: leave values below −1024 HU as stored instead of setting them to air.

    Raises:
        CTInstructError: one sentence naming the file, what was found and what to do.
    """
    limit = Limits(MAX_BYTES if max_bytes is None else int(max_bytes), keep_padding)
    if isinstance(source, CTVolume):
        return source
    if isinstance(source, str | os.PathLike):
        return _read_path(Path(source), spacing, series, window, limit)
    if isinstance(source, nib.spatialimages.SpatialImage):
        return from_nibabel(source, limit)
    if type(source).__module__.partition(".")[0] == "SimpleITK":
        return from_simpleitk(source, "simpleitk", limit)
    if hasattr(source, "mode") and hasattr(source, "getbands"):
        return from_picture(source, "the picture", spacing, window)
    array = as_numpy(source)
    if array.dtype == object:
        raise CTInstructError(
            f"A volume cannot be read from a {type(source).__name__}: give a path, an image or an array."
        )
    return from_array(array, spacing or (1.0, 1.0, 1.0), keep_padding=keep_padding)


def _read_path(
    path: Path,
    spacing: tuple[float, float, float] | None,
    series: str | int | None,
    window: tuple[float, float] | None,
    limit: Limits,
) -> CTVolume:
    try:
        return _read_by_name(path, spacing, series, window, limit)
    except CTInstructError:
        raise
    except Exception as error:  # what a broken file makes a library raise, whatever it is
        raise CTInstructError(f"{path.name} cannot be read: {last_line(error)} ({type(error).__name__}).") from error


def _read_by_name(
    path: Path,
    spacing: tuple[float, float, float] | None,
    series: str | int | None,
    window: tuple[float, float] | None,
    limit: Limits,
) -> CTVolume:
    if not path.exists():
        raise CTInstructError(f"{path} does not exist.")
    name = path.name.lower()
    if path.is_file() and path.stat().st_size == 0:
        raise CTInstructError(f"{path.name} is empty.")
    if name.endswith((".nii", ".nii.gz", ".hdr", ".img")):
        return read_nifti(path, limit)
    if name.endswith((".npy", ".npz")):
        return read_array_file(path, spacing, limit)
    if name.endswith(PICTURE_SUFFIXES):
        return read_picture(path, spacing, window, limit)
    if name.endswith(ITK_SUFFIXES):
        return read_itk(path, limit)
    if path.is_file() and zipfile.is_zipfile(path):
        return _read_zip(path, series, spacing, limit)
    return read_dicom(path, series, spacing, limit)


def _read_zip(
    path: Path, series: str | int | None, spacing: tuple[float, float, float] | None, limit: Limits
) -> CTVolume:
    """The NIfTI file, or the DICOM series, of a zip."""
    with unpacked(path, limit) as files:
        if len(files) == 1 and files[0].name.endswith((".nii", ".nii.gz")):
            volume = read_nifti(files[0], limit)
        else:
            volume = read_dicom(files[0].parent, series, spacing, limit)
        volume.source.name, volume.source.path = path.name, path
        volume.source.dicom_files = []
        return volume


__all__ = ["read_volume"]
