"""NIfTI-1 and -2, pairs of `.hdr` and `.img`, Analyze 7.5: header first, then exactly as many bytes as it promises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from .volume import CTInstructError, CTVolume, Limits, VolumeSource, check_size, clean_hu, last_line, upright
from .volume_files import file_beside, is_packed, open_inflated, read_exactly, skip

_UNITS = {1: 1000.0, 2: 1.0, 3: 0.001, 0: 1.0}  # codes of NIfTI: metre, mm, micrometre, not stated
_PAIR = {".hdr": ".img", ".img": ".hdr"}


def read_nifti(path: Path, limit: Limits) -> CTVolume:
    """A NIfTI file, or a pair by either of its names; see `read_volume`."""
    try:
        head, voxels = _pair_of(path)
        with open_inflated(head) as stream:
            header, start = _read_header(stream, head.name, pair=voxels is not None)
            if voxels is None:
                packed = path.stat().st_size if is_packed(path) else None
                stored = _read_voxels(stream, header, start, path.name, limit, packed)
            else:
                with open_inflated(voxels) as data:
                    packed = voxels.stat().st_size if is_packed(voxels) else None
                    stored = _read_voxels(data, header, b"", voxels.name, limit, packed)
    except CTInstructError:
        raise
    except Exception as error:  # isal, zlib and nibabel raise different classes
        raise CTInstructError(f"{path.name} is no readable NIfTI file or is cut short: {last_line(error)}") from error
    scale = _scale_of(header, path.name)
    return _volume(
        stored, header, scale, VolumeSource(stored.shape, np.eye(4), np.zeros((3, 2)), "nifti", path.name, path), limit
    )


def from_nibabel(image: Any, limit: Limits) -> CTVolume:
    """A volume from a nibabel image."""
    what = "the image"
    header = image.header
    check_size(what, image.shape, header.get_data_dtype().itemsize, limit)
    data = image.dataobj
    if all(isinstance(getattr(data, name, None), float | int | np.number) for name in ("slope", "inter")):
        raw, scale = np.asanyarray(data.get_unscaled()), (float(data.slope), float(data.inter))
    else:  # an array, or scaled by nibabel
        raw, scale = np.asanyarray(data), (1.0, 0.0)
    affine = image.affine
    known = isinstance(header, nib.AnalyzeHeader)  # the base class of NIfTI's headers
    header = header.copy() if known else nib.Nifti1Header()
    stated = affine is None or (known and np.allclose(affine, header.get_best_affine()))
    if not stated and isinstance(header, nib.Nifti1Header):
        header.set_qform(None, code=0)
        header.set_sform(affine, code=1)
    source = VolumeSource(raw.shape, np.eye(4), np.zeros((3, 2)), "nibabel")
    return _volume(_squeezed(raw, what), header, scale, source, limit)


def _pair_of(path: Path) -> tuple[Path, Path | None]:
    """The file with the header, and the file with the voxels; None where both are the same."""
    name = path.name
    ending = ".gz" if name.lower().endswith(".gz") else ""
    stem, suffix = name[: len(name) - len(ending) - 4], name[len(name) - len(ending) - 4 : len(name) - len(ending)]
    other = _PAIR.get(suffix.lower())
    if other is None:
        return path, None
    other = other.upper() if suffix.isupper() else other
    candidates = [stem + other + end for end in (name[len(name) - len(ending) :] if ending else "", ".gz", "")]
    found = next((file for file in candidates if (path.parent / file).exists()), candidates[0])
    beside = file_beside(path, found)
    return (path, beside) if suffix.lower() == ".hdr" else (beside, path)


def _read_header(stream: Any, name: str, pair: bool) -> tuple[Any, bytes]:
    """The header, and the bytes that were read for it; that of a pair may be Analyze 7.5."""
    start = stream.read(540)
    sizes = {int.from_bytes(start[:4], order) for order in ("little", "big")}
    if not sizes & {348, 540}:
        raise CTInstructError(f"{name} is no NIfTI file: its header does not start with 348 or 540.")
    length = 540 if 540 in sizes else 348
    if len(start) < length:
        raise CTInstructError(f"{name} is cut short inside its header.")
    header: type[Any] = nib.Nifti2Header if length == 540 else nib.Nifti1Header
    if pair and length == 348 and start[344:347] not in (b"n+1", b"ni1"):
        header = nib.spm2analyze.Spm2AnalyzeHeader
    return header(start[:length], check=False), start


def _read_voxels(stream: Any, header: Any, already: bytes, name: str, limit: Limits, packed: int | None) -> np.ndarray:
    """The stored array (i, j, k), Fortran order; no byte beyond it is read.

    Args:
        stream: of the voxels, after the bytes `already` read from it.
        packed: the file's size in bytes where it is inflated.
    """
    dims = header["dim"]
    ndim = int(dims[0])
    if not 1 <= ndim <= 7:
        raise CTInstructError(f"{name} has {ndim} dimensions: its header is broken.")
    shape = [int(dim) for dim in dims[1 : ndim + 1]]
    try:
        dtype = header.get_data_dtype()
    except Exception as error:
        raise CTInstructError(f"{name} has an unknown data type {int(header['datatype'])}.") from error
    if dtype.fields is not None:
        raise CTInstructError(f"{name} is a colour image: expected CT in HU.")
    if dtype.itemsize == 0 or dtype.kind not in "iuf":
        raise CTInstructError(f"{name} holds {dtype} values: expected numbers in HU.")
    check_size(name, shape, dtype.itemsize, limit, packed)
    _squeezed(np.broadcast_to(np.zeros(1, np.int8), shape), name)
    offset = float(header["vox_offset"])
    if not np.isfinite(offset) or not 0 <= offset <= 64 * 2**20:
        raise CTInstructError(f"{name} says its voxels start at byte {offset}: its header is broken.")
    least = header.single_vox_offset if already else 0  # a single file's voxels never lie in its header
    first = max(int(offset), least)
    skip(stream, first - len(already))
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    buffer = read_exactly(stream, size, name, already[first:])
    return _squeezed(buffer.view(dtype).reshape(shape, order="F"), name)


def _squeezed(array: np.ndarray, name: str) -> np.ndarray:
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim > 3:
        raise CTInstructError(
            f"{name} is {array.ndim}D with shape {array.shape}: give one volume of it, for example image.slicer[..., 0]."
        )
    while array.ndim < 3:
        array = array[..., None]
    return array


def _volume(
    stored: np.ndarray, header: Any, scale: tuple[float, float], source: VolumeSource, limit: Limits
) -> CTVolume:
    warnings: list[str] = []
    what = source.name or "the image"
    affine = _affine(header, what, warnings)
    if stored.dtype.byteorder not in "=|" and not stored.dtype.isnative:
        stored = stored.astype(stored.dtype.newbyteorder("="))
    if stored.dtype.kind not in "iufb":  # before scaling, which would drop an imaginary part
        raise CTInstructError(f"{what} holds {stored.dtype} values: expected numbers in HU.")
    in_place = source.kind != "nibabel"
    hu = clean_hu(_scaled(stored, *scale), what, warnings, in_place=in_place, keep_padding=limit.keep_padding)
    source.shape, source.affine = hu.shape, affine
    return upright(hu, affine, source, warnings, limit)


def _scale_of(header: Any, name: str) -> tuple[float, float]:
    """(slope, intercept) of a header; (1, 0) where its slope is 0 or no number, which means none by the standard.

    Raises:
        CTInstructError: for a slope without a usable intercept.
    """
    if not isinstance(header, nib.Nifti1Header):
        slope, inter = header.get_slope_inter() if hasattr(header, "get_slope_inter") else (None, None)
        return (1.0 if slope is None else float(slope)), (0.0 if inter is None else float(inter))
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if not np.isfinite(slope) or slope == 0:
        return 1.0, 0.0
    if not np.isfinite(inter):
        raise CTInstructError(f"{name} has scl_slope {slope:g} and scl_inter {inter:g}: its HU are not known.")
    return slope, inter


def _scaled(stored: np.ndarray, slope: float, inter: float) -> np.ndarray:
    """Stored values to HU, in int16 where that is exact."""
    if (slope, inter) == (1.0, 0.0):
        return stored
    if stored.dtype.kind in "iu" and slope == int(slope) and inter == int(inter):
        low, high = int(stored.min()) * int(slope) + int(inter), int(stored.max()) * int(slope) + int(inter)
        if max(abs(low), abs(high)) < 2**15:
            return (stored.astype(np.int32) * int(slope) + int(inter)).astype(np.int16)
    if stored.dtype.itemsize > (4 if stored.dtype.kind == "f" else 2):  # float32 holds 24 bits of a wide integer
        return (stored.astype(np.float64) * slope + inter).astype(np.float32)
    return stored.astype(np.float32) * np.float32(slope) + np.float32(inter)


def _affine(header: Any, name: str, warnings: list[str]) -> np.ndarray:
    """Voxel -> RAS mm by the rules and units of the header."""
    if not isinstance(header, nib.Nifti1Header):
        warnings.append("An Analyze file has no orientation: its first axis is taken as toward the patient's left.")
        return np.asarray(header.get_best_affine(), dtype=float)
    header = header.copy()
    sform, qform = int(header["sform_code"]), int(header["qform_code"])
    # the standard: qfac is −1 or else 1; without a form, voxel sizes have no sign
    header["pixdim"][0] = -1.0 if header["pixdim"][0] < 0 else 1.0
    if sform == 0 and qform == 0:
        header["pixdim"][1:4] = np.abs(header["pixdim"][1:4])
    try:
        affine = np.array(header.get_best_affine(), dtype=float)
    except Exception as error:
        raise CTInstructError(f"{name} has a broken orientation (qform): {last_line(error)}") from error
    if sform == 0 and qform == 0:
        warnings.append("The header has no orientation (sform and qform codes are 0): voxel axes are taken as given.")
    elif sform > 0 and qform > 0:
        try:
            other = np.asarray(header.get_qform(), dtype=float)
        except Exception:
            other = affine
        if not np.allclose(affine, other, atol=1e-2, rtol=1e-3):
            warnings.append("sform and qform disagree: the sform is used.")
    unit = int(header["xyzt_units"]) % 8
    if unit not in _UNITS:
        warnings.append(f"The header has an unknown unit of length ({unit}): mm is taken.")
    affine[:3] *= _UNITS.get(unit, 1.0)
    return affine
