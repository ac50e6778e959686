"""DICOM slices and their pixels in HU, read in threads."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.uid import UID

from .volume import AIR_HU, CTInstructError, last_line
from .volume_series import integer, numbers

# 8-bit lossy JPEG cannot hold CT; the extended processes 6/8 and 10/12 have no decoder
UNDECODABLE = {"1.2.840.10008.1.2.4.53", "1.2.840.10008.1.2.4.55"}
EIGHT_BIT_JPEG = {"1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51"}
LOSSY = {"1.2.840.10008.1.2.4.81", "1.2.840.10008.1.2.4.91"}
THREADS = min(8, (os.cpu_count() or 2) * 2)


@dataclass
class Slice:
    """One axial, coronal or sagittal image in space; `frame` counts within a multi-frame file."""

    path: Path
    header: Any
    position: np.ndarray
    orientation: np.ndarray
    pixel_spacing: tuple[float, float]
    thickness: float | None
    slope: float | None
    intercept: float | None
    frame: int = 0


def slices_of(file: Path, header: Any, spacing: tuple[float, float, float] | None) -> list[Slice]:
    """The images of one file, a frame each where it has several."""
    if integer(header, "SamplesPerPixel", 1) != 1:
        raise CTInstructError(f"{file.name} is a colour image: expected CT in HU.")
    if "Rows" not in header or "Columns" not in header:
        raise CTInstructError(f"{file.name} has no pixels.")
    frames = integer(header, "NumberOfFrames", 1)
    groups = header.get("PerFrameFunctionalGroupsSequence") or []
    shared = (header.get("SharedFunctionalGroupsSequence") or [None])[0]
    if frames > 1 and len(groups) != frames:
        raise CTInstructError(f"{file.name} has {frames} frames but positions for {len(groups)}.")
    if not groups:
        return [_slice(file, header, header, header, header, header, spacing, 0)]
    slices = []
    for index, group in enumerate(groups):

        def part(name: str, item: Any = group) -> Any:
            sequence = item.get(name) or (shared.get(name) if shared is not None else None)
            return sequence[0] if sequence else header

        slices.append(
            _slice(
                file,
                header,
                part("PlanePositionSequence"),
                part("PlaneOrientationSequence"),
                part("PixelMeasuresSequence"),
                part("PixelValueTransformationSequence"),
                spacing,
                index,
            )
        )
    return slices


def _slice(
    file: Path,
    header: Any,
    place: Any,
    orientation: Any,
    measures: Any,
    rescale: Any,
    spacing: tuple[float, float, float] | None,
    frame: int,
) -> Slice:
    try:
        position = np.array(numbers(place, "ImagePositionPatient") or [0.0, 0.0, 0.0])
        axes = np.array(numbers(orientation, "ImageOrientationPatient") or [1.0, 0.0, 0.0, 0.0, 1.0, 0.0])
        pixel = numbers(measures, "PixelSpacing") or [0.0, 0.0]
        thickness = (numbers(measures, "SliceThickness") or [0.0])[0] or None
        slope = next(iter(numbers(rescale, "RescaleSlope")), None)
        intercept = next(iter(numbers(rescale, "RescaleIntercept")), None)
    except (TypeError, ValueError) as error:
        raise CTInstructError(f"{file.name} has a broken position, spacing or rescale: {last_line(error)}") from error
    if len(pixel) != 2 or min(pixel) <= 0 or not np.isfinite(pixel).all():
        if spacing is None:
            raise CTInstructError(f"{file.name} has no pixel spacing: pass spacing=(depth, height, width) in mm.")
        pixel = [float(spacing[1]), float(spacing[2])]
    if len(position) != 3 or len(axes) != 6 or not np.isfinite(position).all() or not np.isfinite(axes).all():
        raise CTInstructError(f"{file.name} has a broken position or orientation.")
    row, column = axes[:3], axes[3:]
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    if min(lengths) < 0.5 or abs(row @ column) > 0.05:
        raise CTInstructError(f"{file.name} has a broken orientation {axes.tolist()}.")
    unit_axes = np.stack([row / lengths[0], column / lengths[1]])
    return Slice(file, header, position, unit_axes, (pixel[0], pixel[1]), thickness, slope, intercept, frame)


def read_pixels(
    slices: list[Slice], rows: int, columns: int, warnings: list[str], keep_padding: bool = False
) -> np.ndarray:
    """HU (slices, rows, columns): int16 where every rescale is whole, float32 otherwise."""
    syntaxes = {str(one.header.file_meta.get("TransferSyntaxUID", "")): one for one in slices}
    for syntax, one in syntaxes.items():
        bits = integer(one.header, "BitsStored", 16)
        if syntax in UNDECODABLE:
            raise CTInstructError(f"{one.path.name} is stored as {UID(syntax).name}, for which there is no decoder.")
        if syntax in EIGHT_BIT_JPEG:
            raise CTInstructError(
                f"{one.path.name} is stored as {UID(syntax).name}, which keeps 8 bits of {bits}: its HU are lost."
            )
        if syntax in LOSSY:
            warnings.append(f"Pixels are stored lossy ({UID(syntax).name}): HU are a few off.")
    missing = [one for one in slices if one.slope is None or one.intercept is None]
    if missing:
        warnings.append(f"{len(missing)} slices have no rescale slope and intercept: stored values are taken as HU.")
    rescales = {(one.slope if one.slope is not None else 1.0, one.intercept or 0.0) for one in slices}
    if any(slope == 0 or not np.isfinite([slope, intercept]).all() for slope, intercept in rescales):
        raise CTInstructError(f"{slices[0].path.name} and its series have a rescale slope of 0: HU cannot be computed.")
    if len(rescales) > 1:
        warnings.append("Rescale slope and intercept differ between slices: each slice has its own.")
    whole = all(slope == int(slope) and intercept == int(intercept) for slope, intercept in rescales)
    hu = np.empty((len(slices), rows, columns), dtype=np.int16 if whole else np.float32)
    wrong_sign: list[str] = []

    frames_of: dict[Path, list[int]] = {}
    for index, one in enumerate(slices):
        frames_of.setdefault(one.path, []).append(index)

    def fill(item: tuple[Path, list[int]]) -> None:
        path, indices = item
        if len(indices) == 1 and whole and fill_in_place(slices[indices[0]], hu[indices[0]], keep_padding):
            return
        stored = decode(path, slices[indices[0]].header)
        if stored.shape[-2:] != (rows, columns):
            raise CTInstructError(f"{path.name} holds {stored.shape[-2:]} pixels, its header says {(rows, columns)}.")
        stored = stored.reshape(-1, rows, columns)
        for index in indices:
            one = slices[index]
            if one.frame >= len(stored):
                raise CTInstructError(f"{path.name} is cut short: frame {one.frame + 1} is missing.")
            hu[index] = rescaled(stored[one.frame], one, hu.dtype, wrong_sign, keep_padding)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(fill, frames_of.items()))
    if wrong_sign:
        warnings.append(
            f"{len(wrong_sign)} slices say their pixels are unsigned, but they only make sense as signed: read as signed."
        )
    return hu


def rescaled(stored: np.ndarray, one: Slice, dtype: Any, wrong_sign: list[str], keep_padding: bool) -> np.ndarray:
    """One slice in HU, its padding set to air unless it is to be kept."""
    slope = one.slope if one.slope is not None else 1.0
    intercept = one.intercept or 0.0
    if stored.dtype == np.uint16 and integer(one.header, "BitsStored", 16) == 16:
        # stored values of 32768 and more as HU no matter can have are negative numbers whose sign was lost
        highest = int(stored.max())
        if highest >= 2**15 and highest * slope + intercept > 16000:
            stored = stored.view(np.int16)
            wrong_sign.append(one.path.name)
    padding = one.header.get("PixelPaddingValue", None)
    padded = None
    if padding is not None:
        padded = stored == np.array(padding).astype(stored.dtype)
    if np.dtype(dtype) == np.int16:
        lowest = np.iinfo(np.int16).min if keep_padding else AIR_HU
        low, high = int(stored.min()) + int(intercept), int(stored.max()) + int(intercept)
        if slope == 1 and padded is None and low >= -(2**15) and high < 2**15 and abs(intercept) < 2**15:
            values = stored.view(np.int16) + np.int16(intercept)  # wraps where uint16 does, so the sum is right
            return values if low >= lowest else np.maximum(values, np.int16(lowest), out=values)
        values = stored.astype(np.int32) * int(slope) + int(intercept)
        values = values.clip(lowest, np.iinfo(np.int16).max).astype(np.int16)
    else:
        values = stored.astype(np.float32) * np.float32(slope) + np.float32(intercept)
    if padded is not None and not keep_padding:
        values[padded] = AIR_HU
    return values


def decode(path: Path, header: Any) -> np.ndarray:
    """Stored values of one file, (rows, columns) or (frames, rows, columns)."""
    syntax = UID(str(header.file_meta.get("TransferSyntaxUID", "1.2.840.10008.1.2")))
    try:
        if syntax in _PLAIN and integer(header, "BitsAllocated", 16) == 16:
            plain = _plain_pixels(path, header, syntax)
            if plain is not None:
                return plain
        if not syntax.is_compressed or syntax.is_deflated or syntax == "1.2.840.10008.1.2.5":
            data = pydicom.dcmread(path)
            return native(data) if not syntax.is_compressed else data.pixel_array
        import SimpleITK

        SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
        reader = SimpleITK.ImageFileReader()
        reader.SetImageIO("GDCMImageIO")
        reader.SetFileName(str(path))
        image = reader.Execute()
        return stored_values(SimpleITK.GetArrayFromImage(image), reader, header)
    except CTInstructError:
        raise
    except Exception as error:
        raise CTInstructError(f"{path.name} cannot be decoded ({syntax.name}): {last_line(error)}") from error


def fill_in_place(one: Slice, hu: np.ndarray, keep_padding: bool) -> bool:
    """The usual slice (16-bit little endian, slope 1) read straight into its place; False where it is not usual."""
    header = one.header
    syntax = str(header.file_meta.get("TransferSyntaxUID", ""))
    bits = integer(header, "BitsStored", 16)
    slope, intercept = 1.0 if one.slope is None else one.slope, one.intercept or 0.0
    if syntax not in _PLAIN or slope != 1 or abs(intercept) >= 2**14 or bits not in (12, 16) or one.frame:
        return False
    if integer(header, "BitsAllocated", 16) != 16 or "PixelPaddingValue" in header:
        return False
    if integer(header, "NumberOfFrames", 1) != 1:
        return False
    with open(one.path, "rb") as stream:
        if not _at_plain_pixels(stream, header, syntax, hu.size):
            return False
        if stream.readinto(memoryview(hu).cast("B")) != hu.nbytes:
            return False
    low, high = int(hu.min()), int(hu.max())
    signed = integer(header, "PixelRepresentation", 0) == 1
    if (
        (not signed and low < 0)
        or (bits == 12 and (signed or high >= 2**12))
        or not -(2**15) <= low + intercept <= high + intercept < 2**15
    ):
        return False
    if intercept:
        hu += np.int16(intercept)
    if not keep_padding and low + intercept < AIR_HU:
        np.maximum(hu, np.int16(AIR_HU), out=hu)
    return True


def _at_plain_pixels(stream: Any, header: Any, syntax: str, count: int) -> bool:
    """Moves to the first pixel; False where the header does not end at plain pixels of that count."""
    stream.seek(header.pixel_offset)
    start = stream.read(12)
    if len(start) < 12 or start[:4] != b"\xe0\x7f\x10\x00":
        return False
    explicit = syntax == _PLAIN[1]
    length = int.from_bytes(start[8:12] if explicit else start[4:8], "little")
    stream.seek(header.pixel_offset + (12 if explicit else 8))
    return 2 * count <= length != 0xFFFFFFFF


_PLAIN = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1")  # little endian, implicit and explicit


def _plain_pixels(path: Path, header: Any, syntax: str) -> np.ndarray | None:
    """Little-endian 16-bit pixels straight from where the header ends; None where they do not start there."""
    signed = "i" if integer(header, "PixelRepresentation", 0) == 1 else "u"
    shape = (integer(header, "NumberOfFrames", 1), int(header.Rows), int(header.Columns))
    count = shape[0] * shape[1] * shape[2]
    with open(path, "rb") as stream:
        if not _at_plain_pixels(stream, header, syntax, count):
            return None
        array = np.fromfile(stream, dtype=f"<{signed}2", count=count)
    if len(array) < count:
        raise CTInstructError(f"{path.name} is cut short: {2 * len(array)} of {2 * count} bytes of pixels are there.")
    bits = integer(header, "BitsStored", 16)
    if bits < 16:  # bits above BitsStored are undefined by the standard
        array = (array << (16 - bits)) >> (16 - bits)
    return array.reshape(shape)


def native(data: Any) -> np.ndarray:
    """Uncompressed pixels without a copy where 16 bits are allocated; by pydicom otherwise."""
    if int(data.BitsAllocated) != 16 or "PixelData" not in data:
        return data.pixel_array
    order = ">" if not data.original_encoding[1] else "<"
    signed = "i" if int(data.PixelRepresentation) == 1 else "u"
    count = int(data.get("NumberOfFrames", 1) or 1) * int(data.Rows) * int(data.Columns)
    raw = data.PixelData
    if len(raw) < 2 * count:
        raise CTInstructError(f"its pixels are cut short: {len(raw)} of {2 * count} bytes are there.")
    array = np.frombuffer(raw, dtype=f"{order}{signed}2", count=count)
    bits = int(data.get("BitsStored", 16))
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if bits < 16:
        # bits above BitsStored are undefined by the standard
        array = (array << (16 - bits)) >> (16 - bits)
    return array.reshape(-1, int(data.Rows), int(data.Columns))


def stored_values(array: np.ndarray, reader: Any, header: Any) -> np.ndarray:
    """SimpleITK applies the rescale of the file itself; take that back, so that it is applied once and by us."""
    slope = reader.GetMetaData("0028|1053") if reader.HasMetaDataKey("0028|1053") else "1"
    intercept = reader.GetMetaData("0028|1052") if reader.HasMetaDataKey("0028|1052") else "0"
    values = (array.astype(np.float64) - float(intercept)) / float(slope)
    signed = integer(header, "PixelRepresentation", 0) == 1
    return np.rint(values).astype(np.int16 if signed else np.uint16)
