"""A CT volume in Hounsfield units with the geometry of its file, and checks that the readers share (`volume_reading`).

The axes of `CTVolume.hu` are always (depth toward the head, height toward the back, width toward the patient's left).
"""

from __future__ import annotations

import importlib
import numbers
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from .volume_resampling import ShearResampling, SliceResampling, without_shear

try:
    from ctinstruct_hf.errors import CTInstructError
except ImportError:  # in a saved folder, on a machine without the package

    class CTInstructError(ValueError):  # type: ignore[no-redef]
        """Bad input; the message is one sentence."""


AIR_HU = -1024
# what a file may unpack to, unless the caller allows more
MAX_BYTES = int(os.environ.get("CTINSTRUCT_MAX_BYTES", 4 * 2**30))
# a packed file may unpack to this multiple of its size (CT packs to a half or a tenth), or to these bytes if that is more
PACKED_RATIO = 200
PACKED_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Limits:
    """Bytes that a reader may unpack, whether padding values stay as stored, and whether voxels are labels, not HU."""

    bytes: int
    keep_padding: bool = False
    labels: bool = False


@dataclass
class VolumeSource:
    """All that is needed to write a mask in the grid of the file that a volume came from.

    Attributes:
        shape: voxels along the file's axes (i, j, k), in the order of nibabel and of SimpleITK's GetSize.
        affine: 4 x 4, source voxel (i, j, k) -> RAS mm.
        orientation: [3, 2], nibabel's orientation that turns (width, height, depth) back into (i, j, k).
        kind: nifti, dicom, itk, array, picture, nibabel or simpleitk.
        name: the file's or folder's name without its path; "" for objects.
        path: the file or folder; never written to results.
        resampling: what was done to tilted or uneven slices, or to sheared axes.
        dicom_files: the source slices in the order of k, for DICOM SEG.
        dicom_frames: the frame of each in its file, from 0.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray
    orientation: np.ndarray
    kind: str = "array"
    name: str = ""
    path: Path | None = None
    resampling: SliceResampling | ShearResampling | None = None
    dicom_files: list[Path] = field(default_factory=list)
    dicom_frames: list[int] = field(default_factory=list)


@dataclass
class CTVolume:
    """A volume in HU with its position in the patient.

    Attributes:
        hu: float32 or int16 (depth, height, width): toward the head, the back, the patient's left.
        affine: 4 x 4, voxel (width, height, depth) -> RAS mm.
        source: what `to_source` needs.
        warnings: what was odd about the file and how it was handled, a sentence each.
    """

    hu: np.ndarray
    affine: np.ndarray
    source: VolumeSource
    warnings: list[str] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(depth, height, width) in voxels."""
        depth, height, width = self.hu.shape
        return depth, height, width

    @property
    def spacing(self) -> tuple[float, float, float]:
        """mm between voxels along (depth, height, width)."""
        width, height, depth = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(depth), float(height), float(width)

    def in_file_axes(self, array: np.ndarray) -> np.ndarray:
        """An array in the axes of `hu` turned to the file's axes (i, j, k); a view."""
        return nib.orientations.apply_orientation(array.transpose(2, 1, 0), self.source.orientation)

    def from_file_axes(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `in_file_axes`."""
        identity = np.array([[0, 1], [1, 1], [2, 1]])
        turn = nib.orientations.ornt_transform(identity, self.source.orientation)
        return nib.orientations.apply_orientation(array, turn).transpose(2, 1, 0)

    def to_source(self, mask: Any, path: str | Path | None = None) -> nib.Nifti1Image:
        """A mask of this volume on the grid and affine of the file it came from.

        Args:
            mask: numbers or bool (depth, height, width), array or tensor, the shape of `hu`.
            path: where to write it as NIfTI; nothing is written without it.

        Returns:
            The image in the source's geometry; voxel for voxel the mask where the volume was not resampled.

        Raises:
            CTInstructError: if the shape is another, or NIfTI cannot hold the values.
        """
        array = as_numpy(mask)
        if array.shape != self.hu.shape:
            raise CTInstructError(f"The mask has shape {array.shape}, the volume {self.hu.shape}: they must be equal.")
        array = as_stored(array)
        stored = self.in_file_axes(array)
        if self.source.resampling is not None:
            stored = self.source.resampling.mask_back(stored)
        image = nib.Nifti1Image(np.asfortranarray(stored), self.source.affine)
        image.header.set_xyzt_units("mm")
        if path is not None:
            nib.save(image, path)
        return image

    def to_sitk(self, array: Any = None) -> Any:
        """The volume, or a mask of it, as a SimpleITK image with its position in the patient.

        Args:
            array: numbers or bool (depth, height, width), the shape of `hu`; `hu` by default.

        Raises:
            CTInstructError: if the shape is another.
        """
        import SimpleITK

        image = SimpleITK.GetImageFromArray(as_stored(self._same_shape(array)))
        lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ self.affine
        lengths = np.linalg.norm(lps[:3, :3], axis=0)
        image.SetSpacing(lengths.tolist())
        image.SetDirection((lps[:3, :3] / lengths).ravel().tolist())
        image.SetOrigin(lps[:3, 3].tolist())
        return image

    def to_monai(self, array: Any = None) -> Any:
        """The volume, or a mask of it, as a MONAI `MetaTensor` [1, width, height, depth] with its affine to RAS mm.

        Args:
            array: numbers or bool (depth, height, width), the shape of `hu`; `hu` by default.

        Raises:
            CTInstructError: if the shape is another, or MONAI is not installed.
        """
        try:
            from monai.data import MetaTensor
        except ImportError as error:
            raise CTInstructError("to_monai needs MONAI: pip install monai.") from error
        stored = np.ascontiguousarray(as_stored(self._same_shape(array)).transpose(2, 1, 0))
        return MetaTensor(stored[None], affine=self.affine.copy(), meta={"space": "RAS"})  # type: ignore[arg-type]  # it converts

    def _same_shape(self, array: Any) -> np.ndarray:
        found = self.hu if array is None else as_numpy(array)
        if found.shape != self.hu.shape:
            raise CTInstructError(f"The array has shape {found.shape}, the volume {self.hu.shape}: they must be equal.")
        return found


def is_volume(image: Any) -> bool:
    """Whether it is a `CTVolume`, of this module or of the copy in a saved folder."""
    return isinstance(image, CTVolume) or all(hasattr(image, name) for name in ("hu", "affine", "source"))


def from_array(
    array: np.ndarray,
    spacing: tuple[float, float, float],
    name: str = "",
    kind: str = "array",
    warnings: list[str] | None = None,
    keep_padding: bool = False,
) -> CTVolume:
    """A volume from HU in the axes of `CTVolume.hu`; a 2D array is a slice. `spacing` in mm, the same order."""
    what = name or "the array"
    while array.ndim > 3 and array.shape[0] == 1:
        array = array[0]
    if array.ndim == 2:
        array = array[None]
    if array.ndim != 3 or 0 in array.shape:
        raise CTInstructError(f"{what} has shape {array.shape}: expected (depth, height, width) or one slice.")
    values = spacing_in_mm(spacing, what)
    affine = np.diag([-values[2], -values[1], values[0], 1.0])
    identity = np.array([[0, 1], [1, 1], [2, 1]])
    source = VolumeSource(array.shape[::-1], affine, identity, kind=kind, name=name)
    notes = list(warnings or [])
    return CTVolume(clean_hu(array, what, notes, keep_padding=keep_padding), affine, source, notes)


def spacing_in_mm(spacing: Any, what: str) -> list[float]:
    """Three positive mm, as numbers, not as text.

    Raises:
        CTInstructError: for anything else.
    """
    values = spacing.tolist() if hasattr(spacing, "tolist") else spacing
    values = list(values) if isinstance(values, list | tuple) else []
    usable = [float(value) for value in values if isinstance(value, numbers.Real) and not isinstance(value, bool)]
    if len(values) != 3 or len(usable) != 3 or not all(0 < value < np.inf for value in usable):
        raise CTInstructError(f"{what}: spacing is {spacing!r:.80}, expected three positive numbers in mm.")
    return usable


def check_affine(affine: np.ndarray, what: str) -> None:
    """Raises CTInstructError where the columns are no usable voxel sizes in mm, or do not span space."""
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or lengths.min() < 1e-4 or lengths.max() > 1e4:
        raise CTInstructError(f"{what} has no usable voxel size (affine columns of {lengths.tolist()} mm).")
    if abs(np.linalg.det(affine[:3, :3] / lengths)) < 0.1:
        raise CTInstructError(f"{what} has a broken orientation: its axes do not span space.")


def upright(
    array: np.ndarray, affine: np.ndarray, source: VolumeSource, warnings: list[str], limit: Limits
) -> CTVolume:
    """`canonical` for axes that may be sheared against each other: these are made perpendicular by resampling.

    Raises:
        CTInstructError: for an unusable affine, and where the upright grid is larger than allowed.
    """
    what = source.name or "the image"
    check_affine(affine, what)
    found = without_shear(affine, array.shape)
    if found is not None:
        affine, shape, source.resampling = found
        check_size(f"{what} on an upright grid", shape, 4, limit)
        array = source.resampling.forward(array, fill=0 if limit.labels else AIR_HU, nearest=limit.labels)
        warnings.append("The axes are sheared against each other (gantry tilt): resampled to an upright grid.")
    return canonical(array, affine, source, warnings)


def canonical(array: np.ndarray, affine: np.ndarray, source: VolumeSource, warnings: list[str]) -> CTVolume:
    """A volume from an array (i, j, k) and its affine -> RAS mm: axes turned and flipped, no voxel changed.

    One slice of another plane than axial keeps its plane as the image: depth is its thin axis.
    """
    codes = "".join(nib.aff2axcodes(affine))
    thin = [axis for axis in range(3) if array.shape[axis] == 1]
    wanted = "LPS"
    if len(thin) == 1 and codes[thin[0]] not in "SI":
        # (width, height, depth) of a coronal or sagittal slice, upright: head up
        wanted = {"A": "LIP", "P": "LIP", "L": "PIL", "R": "PIL"}[codes[thin[0]]]
    start = nib.orientations.io_orientation(affine)
    goal = nib.orientations.axcodes2ornt(wanted)
    turn = nib.orientations.ornt_transform(start, goal)
    turned = nib.orientations.apply_orientation(array, turn)
    source.orientation = nib.orientations.ornt_transform(goal, start)
    moved = affine @ nib.orientations.inv_ornt_aff(turn, array.shape)
    return CTVolume(turned.transpose(2, 1, 0), moved, source, warnings)


def clean_hu(
    array: np.ndarray, name: str, warnings: list[str], in_place: bool = False, keep_padding: bool = False
) -> np.ndarray:
    """HU as int16 or float32 without padding values, NaN or infinity; booleans and wide integers are cast.

    Values below −1024 (scanners pad with −2000, −3024 …) become air unless `keep_padding`; with `in_place` the array may
    be written to.
    """
    if array.dtype.kind not in "iufb":
        raise CTInstructError(f"{name} holds {array.dtype} values: expected numbers in HU.")
    if array.dtype.kind == "f":
        low_high = array.min(), array.max()
        if not np.isfinite(low_high).all():
            bad = ~np.isfinite(array)
            if bad.all():
                raise CTInstructError(f"{name} holds no finite value: nothing to read.")
            warnings.append(f"{int(bad.sum())} voxels were NaN or infinite and are set to air ({AIR_HU} HU).")
            array = np.where(bad, np.float32(AIR_HU), array)
        array = array.astype(np.float32, copy=False)
    elif array.dtype != np.int16:
        low, high = int(array.min()), int(array.max())
        fits = low >= np.iinfo(np.int16).min and high <= np.iinfo(np.int16).max
        array = array.astype(np.int16 if fits else np.float32)
        in_place = True
    if not keep_padding and array.min() < AIR_HU:
        array = np.maximum(array, array.dtype.type(AIR_HU), out=array if in_place and array.flags.writeable else None)
    return array


def as_numpy(value: Any) -> np.ndarray:
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if value.is_floating_point() else value
        return value.numpy()
    return np.asarray(value)


def as_stored(mask: np.ndarray) -> np.ndarray:
    """A mask in a type that NIfTI holds: bool as uint8, wide integers in 32 bits where they fit, half floats as float32.

    Raises:
        CTInstructError: for what is no number.
    """
    if mask.dtype.kind not in "biuf":
        raise CTInstructError(f"The mask holds {mask.dtype} values: expected numbers.")
    if mask.dtype == bool:
        return mask.astype(np.uint8)
    if mask.dtype.kind == "f":
        return mask.astype(np.float32) if mask.dtype.itemsize == 2 else mask
    if mask.dtype.itemsize == 8:
        low, high = int(mask.min(initial=0)), int(mask.max(initial=0))
        fits = [dtype for dtype in (np.int32, np.uint32) if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max]
        return mask.astype(fits[0] if fits else np.float64)
    return mask


def check_size(name: str, shape: Any, itemsize: int, limit: Limits, packed: int | None = None) -> None:
    """Refuse absurd sizes before anything is allocated or unpacked; `packed` is the size of a packed file in bytes."""
    dims = [int(dim) for dim in shape]
    size = itemsize
    for dim in dims:
        if dim < 1:
            raise CTInstructError(f"{name} has the impossible size {tuple(dims)}.")
        size *= dim
    if size > limit.bytes:
        raise CTInstructError(
            f"{name} would unpack to {size / 2**30:.1f} GiB ({' x '.join(map(str, dims))}), more than the "
            f"{limit.bytes / 2**30:.3g} GiB allowed: pass max_bytes to allow more."
        )
    if packed is not None and size > max(PACKED_BYTES, PACKED_RATIO * packed):
        raise CTInstructError(
            f"{name} would unpack from {packed / 2**20:.3g} to {size / 2**20:.0f} MiB, and a packed file may grow to "
            f"{PACKED_BYTES // 2**20} MiB or {PACKED_RATIO} times its size: give it unpacked."
        )


def last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:200]


def __getattr__(name: str) -> Any:
    if name == "read_volume":  # imported on first use: the readers import this module
        return importlib.import_module(".volume_reading", __package__).read_volume
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["CTVolume", "VolumeSource"]
