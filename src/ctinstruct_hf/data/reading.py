"""From the references in a row to voxels: volumes and label volumes."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np

from ..errors import CTInstructError
from ..processing.volume import CTVolume, clean_hu
from ..processing.volume_files import inside
from ..processing.volume_reading import read_volume
from .cases import ImageRef, MaskRef


def path_named(name: str, root: Path, named_by: str, anywhere: bool = False) -> str:
    """The absolute path of a file that a row names; "" of absent masks as it is.

    Args:
        name: relative to `root`, or absolute.
        root: the folder that it lies in.
        named_by: the row, for the message.
        anywhere: absolute paths may lie outside of `root`.

    Raises:
        CTInstructError: where it lies outside, by its path or by a link.
    """
    if not name or (anywhere and Path(name).is_absolute()):
        return name
    root = root.absolute()
    relative = Path(name)
    try:
        if relative.is_absolute():
            relative = relative.relative_to(root)
        return str(inside(root, str(relative), named_by))
    except ValueError as error:  # ours are, too
        raise CTInstructError(
            f"{named_by} names {Path(name).name}, which lies outside of {root.name or root}: name the folder of the files (--root)."
        ) from error


def open_volume(image: ImageRef) -> CTVolume:
    """The volume that a reference names, in HU with true spacing.

    Raises:
        CTInstructError: naming the file.
    """
    spacing = (image.spacing[0], image.spacing[1], image.spacing[2]) if image.spacing else None
    scaled = (image.slope, image.intercept) != (1.0, 0.0)
    if image.layout:
        array = _array_of(image)
        return read_volume(
            array * np.float32(image.slope) + np.float32(image.intercept), spacing=spacing or (1.0, 1.0, 1.0)
        )
    volume = read_volume(image.path, spacing=spacing, keep_padding=scaled)
    if scaled:
        hu = volume.hu * np.float32(image.slope) + np.float32(image.intercept)
        if float(image.slope).is_integer() and float(image.intercept).is_integer():
            hu = np.rint(hu).astype(np.int32)
        volume.hu = clean_hu(hu, Path(image.path).name, volume.warnings, in_place=True)
    if spacing and volume.source.kind != "array":
        volume.affine = volume.affine.copy()
        goal = np.array(spacing[::-1])
        volume.affine[:3, :3] *= goal / np.linalg.norm(volume.affine[:3, :3], axis=0)
    return volume


def _array_of(image: ImageRef) -> np.ndarray:
    """An array file of another layout in the axes of `CTVolume.hu`."""
    name = Path(image.path).name
    try:
        array = np.load(image.path, allow_pickle=False, mmap_mode="r")
    except Exception as error:
        raise CTInstructError(f"{name} is no readable numpy file: {error}") from error
    if array.ndim == 3:
        array = array[None]
    if array.ndim != 4:
        raise CTInstructError(f"{name} has shape {array.shape}: expected a channel and three axes.")
    first = np.asarray(array[0], dtype=np.float32)
    return first.transpose(2, 0, 1) if image.layout == "chwd" else first


def open_labels(path: str, volume: CTVolume) -> np.ndarray:
    """A label file in the axes of `volume.hu`: int16 (depth, height, width).

    Raises:
        CTInstructError: where it lies on another grid or has labels outside 0…127.
    """
    name = Path(path).name
    stored = read_volume(path, spacing=volume.spacing, labels=True)
    if stored.shape != volume.shape:
        raise CTInstructError(f"{name} has shape {stored.shape}, its image {volume.shape}: they must be equal.")
    if volume.source.kind != "array":
        turn = nib.aff2axcodes(stored.affine), nib.aff2axcodes(volume.affine)
        if turn[0] != turn[1]:
            raise CTInstructError(f"{name} lies along {turn[0]}, its image along {turn[1]}: they must be equal.")
    labels = np.rint(stored.hu).astype(np.int16)
    if labels.min() < 0 or labels.max() > 127:
        raise CTInstructError(f"{name} has labels {labels.min()} to {labels.max()}: expected 0 to 127.")
    return labels


def open_mask(mask: MaskRef, volume: CTVolume) -> np.ndarray:
    """One structure in the axes of `volume.hu`: bool (depth, height, width); all False where it is known to be absent."""
    if not mask.path:
        return np.zeros(volume.shape, bool)
    labels = open_labels(mask.path, volume)
    return np.isin(labels, mask.values) if mask.values else labels > 0
