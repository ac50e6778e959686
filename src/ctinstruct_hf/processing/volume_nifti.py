"""NIfTI-1 and -2: header first, then exactly as many bytes as it promises, inflated by isal."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from .volume import CTInstructError, CTVolume, Limits, VolumeSource, canonical, check_size, clean_hu, last_line
from .volume_resampling import SliceResampling

_UNITS = {"meter": 1000.0, "mm": 1.0, "micron": 0.001, "unknown": 1.0}


def read_nifti(path: Path, limit: Limits) -> CTVolume:
    """A NIfTI file; see `read_volume`."""
    if path.name.lower().endswith((".hdr", ".img")):
        try:
            return from_nibabel(nib.load(path), limit, path)
        except CTInstructError:
            raise
        except Exception as error:
            raise CTInstructError(f"{path.name} is no readable NIfTI file: {last_line(error)}") from error
    try:
        with _open(path) as stream:
            header = _read_header(stream, path.name)
            stored = _read_voxels(stream, header, path.name, limit)
    except CTInstructError:
        raise
    except Exception as error:  # isal, zlib and nibabel each have their own
        raise CTInstructError(f"{path.name} is no readable NIfTI file or is cut short: {last_line(error)}") from error
    return _volume(stored, header, path.name, path, "nifti", limit)


def from_nibabel(image: Any, limit: Limits, path: Path | None = None) -> CTVolume:
    """A volume from a nibabel image."""
    name = path.name if path else "the image"
    header = image.header
    if not hasattr(header, "get_best_affine"):
        header = nib.Nifti1Header.from_header(header)
    check_size(name, image.shape, header.get_data_dtype().itemsize, limit)
    data = image.dataobj
    raw = data.get_unscaled() if hasattr(data, "get_unscaled") else np.asarray(data)
    header = header.copy()
    if not hasattr(data, "get_unscaled"):
        header.set_slope_inter(1.0, 0.0)
    if getattr(image, "affine", None) is not None and not np.allclose(image.affine, header.get_best_affine()):
        header.set_sform(image.affine, code=1)
    return _volume(
        _squeezed(raw, name), header, path.name if path else "", path, "nibabel" if path is None else "nifti", limit
    )


def _open(path: Path) -> io.BufferedIOBase:
    stream = open(path, "rb")  # noqa: SIM115 -- closed by the caller's with
    magic = stream.read(2)
    stream.seek(0)
    if magic == b"\x1f\x8b":
        from isal import igzip

        stream.close()
        return igzip.open(path, "rb")
    return stream


def _read_header(stream: Any, name: str) -> Any:
    start = stream.read(540)
    size = int.from_bytes(start[:4], "little")
    swapped = int.from_bytes(start[:4], "big")
    kind = nib.Nifti2Header if 540 in (size, swapped) else nib.Nifti1Header
    length = 540 if kind is nib.Nifti2Header else 348
    if 348 not in (size, swapped) and 540 not in (size, swapped):
        raise CTInstructError(f"{name} is no NIfTI file: its header does not start with 348 or 540.")
    if len(start) < length:
        raise CTInstructError(f"{name} is cut short inside its header.")
    header = kind(start[:length], check=False)
    header.already_read = start
    return header


def _read_voxels(stream: Any, header: Any, name: str, limit: Limits) -> np.ndarray:
    """The stored array (i, j, k), Fortran order, as the header says and no byte more."""
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
    check_size(name, shape, dtype.itemsize, limit)
    _squeezed(np.broadcast_to(np.zeros(1, np.int8), shape), name)
    offset = float(header["vox_offset"])
    if not np.isfinite(offset) or not 0 <= offset <= 64 * 2**20:
        raise CTInstructError(f"{name} says its voxels start at byte {offset}: its header is broken.")
    already, offset = header.already_read, max(int(offset), 352)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    buffer = np.empty(size, dtype=np.uint8)
    rest = already[offset:] if offset < len(already) else b""
    skip = offset - len(already)
    while skip > 0:
        skipped = stream.read(min(skip, 2**20))
        if not skipped:
            break
        skip -= len(skipped)
    buffer[: min(len(rest), size)] = np.frombuffer(rest[:size], np.uint8)
    filled = min(len(rest), size)
    view = memoryview(buffer)
    while filled < size:
        count = stream.readinto(view[filled : filled + 2**22])
        if not count:
            raise CTInstructError(f"{name} is cut short: {filled} of {size} bytes of voxels are there.")
        filled += count
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


def _volume(stored: np.ndarray, header: Any, name: str, path: Path | None, kind: str, limit: Limits) -> CTVolume:
    warnings: list[str] = []
    what = name or "the image"
    affine = _affine(header, what, warnings)
    if stored.dtype.byteorder not in "=|" and not stored.dtype.isnative:
        stored = stored.astype(stored.dtype.newbyteorder("="))
    hu = clean_hu(_scaled(stored, header), what, warnings, in_place=kind != "nibabel", keep_padding=limit.keep_padding)
    source = VolumeSource(hu.shape, affine, np.zeros((3, 2)), kind=kind, name=name, path=path)
    upright = without_shear(affine, hu.shape)
    if upright is None:
        return canonical(hu, affine, source, warnings)
    affine, source.resampling = upright
    warnings.append("The slices are sheared against each other (gantry tilt): resampled to an upright grid.")
    return canonical(source.resampling.forward(hu, fill=-1024), affine, source, warnings)


def _scaled(stored: np.ndarray, header: Any) -> np.ndarray:
    """Stored values to HU by scl_slope and scl_inter, in int16 where that is exact."""
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if not np.isfinite(slope) or slope == 0 or not np.isfinite(inter):
        slope, inter = 1.0, 0.0
    if (slope, inter) == (1.0, 0.0):
        return stored
    if stored.dtype.kind in "iu" and slope == int(slope) and inter == int(inter):
        low, high = int(stored.min()) * int(slope) + int(inter), int(stored.max()) * int(slope) + int(inter)
        if max(abs(low), abs(high)) < 2**15:
            return (stored.astype(np.int32) * int(slope) + int(inter)).astype(np.int16)
    return stored.astype(np.float32) * np.float32(slope) + np.float32(inter)


def _affine(header: Any, name: str, warnings: list[str]) -> np.ndarray:
    sform, qform = int(header["sform_code"]), int(header["qform_code"])
    try:
        affine = np.asarray(header.get_best_affine(), dtype=float)
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
    unit = header.get_xyzt_units()[0] if hasattr(header, "get_xyzt_units") else "mm"
    affine[:3] *= _UNITS.get(unit, 1.0)
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or lengths.min() < 1e-4 or lengths.max() > 1e4:
        raise CTInstructError(f"{name} has no usable voxel size (affine columns of {lengths.tolist()} mm).")
    if abs(np.linalg.det(affine[:3, :3] / lengths)) < 0.1:
        raise CTInstructError(f"{name} has a broken orientation: its axes do not span space.")
    return affine


def without_shear(affine: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, SliceResampling] | None:
    """Upright affine and resampling where the slices (k) drift within their plane by more than half a voxel."""
    i, j, k = affine[:3, :3].T
    normal = np.cross(i, j)
    normal /= np.linalg.norm(normal)
    distance = float(k @ normal)
    drift = k - distance * normal
    per_slice = np.array([drift @ i / (i @ i), drift @ j / (j @ j)])  # voxels along i and j
    if np.abs(per_slice).max() * (shape[2] - 1) < 0.5:
        return None
    count = shape[2]
    shifts = per_slice[None] * np.arange(count)[:, None]
    resampling = SliceResampling(np.arange(count) * abs(distance), shifts, abs(distance), count)
    upright = affine.copy()
    upright[:3, 2] = distance * normal
    upright[:3, 3] -= resampling.margins[0] * i + resampling.margins[2] * j
    return upright, resampling
