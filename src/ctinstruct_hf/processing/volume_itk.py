"""MHA, MHD, NRRD and SimpleITK images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .volume import CTInstructError, CTVolume, Limits, VolumeSource, canonical, check_size, clean_hu, last_line

ITK_SUFFIXES = (".mha", ".mhd", ".nrrd", ".nhdr")


def read_itk(path: Path, limit: Limits) -> CTVolume:
    import SimpleITK

    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        check_size(path.name, reader.GetSize(), 4, limit)
        if reader.GetNumberOfComponents() != 1:
            raise CTInstructError(
                f"{path.name} has {reader.GetNumberOfComponents()} values per voxel: expected CT in HU."
            )
        if reader.GetDimension() not in (2, 3):
            raise CTInstructError(f"{path.name} has {reader.GetDimension()} dimensions: give one volume of it.")
        image = reader.Execute()
    except RuntimeError as error:
        raise CTInstructError(f"{path.name} cannot be read: {last_line(error)}") from error
    volume = from_simpleitk(image, "itk", limit)
    volume.source.name, volume.source.path = path.name, path
    return volume


def from_simpleitk(image: Any, kind: str, limit: Limits) -> CTVolume:
    import SimpleITK

    if image.GetNumberOfComponentsPerPixel() != 1:
        raise CTInstructError(
            f"The image has {image.GetNumberOfComponentsPerPixel()} values per voxel: expected CT in HU."
        )
    if image.GetDimension() == 2:
        image = SimpleITK.JoinSeries(image)
    if image.GetDimension() != 3:
        raise CTInstructError(f"The image has {image.GetDimension()} dimensions: give one volume of it.")
    warnings: list[str] = []
    affine = itk_affine(image.GetOrigin(), image.GetSpacing(), image.GetDirection())
    stored = SimpleITK.GetArrayFromImage(image)
    array = clean_hu(stored, "the image", warnings, in_place=True, keep_padding=limit.keep_padding).transpose(2, 1, 0)
    source = VolumeSource(array.shape, affine, np.zeros((3, 2)), kind=kind)
    return canonical(array, affine, source, warnings)


def itk_affine(origin: Any, spacing: Any, direction: Any) -> np.ndarray:
    """4 x 4 voxel -> RAS mm from SimpleITK's origin, spacing and direction, which speak LPS."""
    affine = np.eye(4)
    affine[:3, :3] = np.asarray(direction, float).reshape(3, 3) * np.asarray(spacing, float)
    affine[:3, 3] = origin
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
