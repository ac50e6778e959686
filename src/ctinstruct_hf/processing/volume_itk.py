"""MetaImage (`.mha`, `.mhd`), NRRD (`.nrrd`, `.nhdr`) and SimpleITK images.

Headers are read here and not by ITK: it follows a data file's name anywhere, and takes 1 mm where no spacing is given.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .volume import CTInstructError, CTVolume, Limits, VolumeSource, check_size, clean_hu, last_line, upright
from .volume_files import file_beside, open_bzip2, open_gzip, open_zlib, read_exactly, skip

ITK_SUFFIXES = (".mha", ".mhd", ".nrrd", ".nhdr")
_HEADER_BYTES = 2**20
_META_TYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4",
    "MET_LONG": "i4", "MET_ULONG": "u4", "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}  # fmt: skip
_NRRD_TYPES = {
    **dict.fromkeys(("signed char", "int8", "int8_t"), "i1"),
    **dict.fromkeys(("uchar", "unsigned char", "uint8", "uint8_t"), "u1"),
    **dict.fromkeys(("short", "short int", "signed short", "signed short int", "int16", "int16_t"), "i2"),
    **dict.fromkeys(("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"), "u2"),
    **dict.fromkeys(("int", "signed int", "int32", "int32_t"), "i4"),
    **dict.fromkeys(("uint", "unsigned int", "uint32", "uint32_t"), "u4"),
    **dict.fromkeys(("longlong", "long long", "long long int", "signed long long", "int64", "int64_t"), "i8"),
    **dict.fromkeys(("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"), "u8"),
    "float": "f4",
    "double": "f8",
}
# signs that turn a space's axes into RAS
_SPACES = {
    **dict.fromkeys(("left-posterior-superior", "lps"), (-1, -1, 1)),
    **dict.fromkeys(("right-anterior-superior", "ras"), (1, 1, 1)),
    **dict.fromkeys(("left-anterior-superior", "las"), (-1, 1, 1)),
}
_MILLIMETRES = {
    **dict.fromkeys(("mm", "millimeter", "millimetre", "millimeters"), 1.0),
    **dict.fromkeys(("cm", "centimeter", "centimetre"), 10.0),
    **dict.fromkeys(("m", "meter", "metre"), 1000.0),
    **dict.fromkeys(("um", "µm", "μm", "micron", "microns", "micrometer", "micrometre"), 0.001),
}


@dataclass
class Stored:
    """The fields of a header.

    Attributes:
        shape: voxels along the file's axes (i, j, k), two or three.
        dtype: of a stored value, with its byte order.
        encoding: raw, text, zlib, gzip or bzip2.
        data: the detached file's name; "" where the voxels follow the header.
        lines, skipped: lines before the packed voxels, bytes before the unpacked voxels; −1: they end the file.
        columns: [3, axes] mm along LPS of a step along each axis; None without spacing.
        origin: [3] mm, LPS.
        scale: (slope, intercept) from stored values.
    """

    shape: list[int]
    dtype: np.dtype
    encoding: str
    data: str
    columns: np.ndarray | None
    origin: np.ndarray
    lines: int = 0
    skipped: int = 0
    scale: tuple[float, float] = (1.0, 0.0)
    warnings: list[str] = field(default_factory=list)


def read_itk(path: Path, spacing: tuple[float, float, float] | None, limit: Limits) -> CTVolume:
    """A MetaImage or NRRD file; see `read_volume`."""
    with open(path, "rb") as file:
        start = file.read(_HEADER_BYTES)
        try:
            header, end = (_nrrd_header if start.startswith(b"NRRD") else _meta_header)(start, path.name)
        except CTInstructError:
            raise
        except (ValueError, IndexError, KeyError, OverflowError, TypeError) as error:
            raise CTInstructError(f"{path.name} has a broken header: {last_line(error)}.") from error
        if header.columns is None:
            if spacing is None:
                raise CTInstructError(
                    f"{path.name} has no voxel spacing: pass spacing=(depth, height, width) in mm, as it would be read."
                )
            header.columns = np.diag([float(mm) for mm in spacing[::-1]])[:, : len(header.shape)]
        check_size(path.name, header.shape, header.dtype.itemsize, limit)
        if not header.data:
            file.seek(end)
            array = _voxels(file, header, path, limit)
        else:
            beside = file_beside(path, header.data)
            with open(beside, "rb") as data:
                array = _voxels(data, header, beside, limit)
    array = array.reshape(header.shape, order="F")
    columns = header.columns
    if array.ndim == 2:
        across = np.cross(columns[:, 0], columns[:, 1])
        columns = np.column_stack([columns, across / max(np.linalg.norm(across), 1e-12)])
        array = array[..., None]
        header.warnings.append("A single slice has no thickness: 1 mm is taken, volumes in ml mean nothing.")
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = columns, header.origin
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    if header.scale != (1.0, 0.0):
        array = array.astype(np.float32) * np.float32(header.scale[0]) + np.float32(header.scale[1])
    hu = clean_hu(array, path.name, header.warnings, in_place=True, keep_padding=limit.keep_padding)
    source = VolumeSource(hu.shape, affine, np.zeros((3, 2)), "itk", path.name, path)
    return upright(hu, affine, source, header.warnings, limit)


def from_simpleitk(image: Any, limit: Limits) -> CTVolume:
    """A volume from a SimpleITK image."""
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
    return upright(array, affine, VolumeSource(array.shape, affine, np.zeros((3, 2)), "simpleitk"), warnings, limit)


def itk_affine(origin: Any, spacing: Any, direction: Any) -> np.ndarray:
    """4 x 4 voxel -> RAS mm from SimpleITK's origin, spacing and direction, which speak LPS."""
    affine = np.eye(4)
    affine[:3, :3] = np.asarray(direction, float).reshape(3, 3) * np.asarray(spacing, float)
    affine[:3, 3] = origin
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def _voxels(file: Any, header: Stored, path: Path, limit: Limits) -> np.ndarray:
    """The stored values in the file's order, read from the stream's position."""
    count = int(np.prod(header.shape, dtype=np.int64))
    size = count * header.dtype.itemsize
    length = path.stat().st_size
    for _ in range(header.lines):
        if not file.readline(_HEADER_BYTES):
            break
    if header.skipped < 0:
        if header.encoding != "raw":
            raise CTInstructError(f"{path.name} counts packed voxels from the end of the file: cannot be read.")
        file.seek(max(length - size, 0))
    if header.encoding == "text":
        if length - file.tell() > 32 * count + 2**16:
            raise CTInstructError(f"{path.name} holds more text than its {count} voxels need.")
        skip(file, header.skipped)
        values = np.array(file.read().split(), dtype=np.float64)
        if len(values) < count:
            raise CTInstructError(f"{path.name} is cut short: {len(values)} of {count} voxels are there.")
        return values[:count].astype(header.dtype)
    stream = file
    if header.encoding != "raw":
        check_size(path.name, header.shape, header.dtype.itemsize, limit, packed=length)
        stream = {"zlib": open_zlib, "gzip": open_gzip, "bzip2": open_bzip2}[header.encoding](file)
    try:
        skip(stream, header.skipped)
        return read_exactly(stream, size, path.name).view(header.dtype)
    except CTInstructError:
        raise
    except Exception as error:  # isal, zlib and bz2 raise different classes
        raise CTInstructError(f"{path.name} cannot be unpacked or is cut short: {last_line(error)}") from error


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split()]


def _meta_header(start: bytes, name: str) -> tuple[Stored, int]:
    """A MetaImage header, which ends with `ElementDataFile`, and where it ends."""
    fields: dict[str, str] = {}
    end = 0
    while "ElementDataFile" not in fields:
        line_end = start.find(b"\n", end)
        line = start[end : line_end if line_end >= 0 else len(start)].decode("utf-8", "replace")
        if line_end < 0 and not line:
            raise CTInstructError(f"{name} is no MetaImage file: it has no ElementDataFile.")
        end = line_end + 1 if line_end >= 0 else len(start)
        key, found, value = line.partition("=" if "=" in line else ":")
        if found:
            fields[key.strip()] = value.strip()
    dims = int(fields["NDims"])
    shape = [int(part) for part in fields["DimSize"].split()]
    while len(shape) == dims > 3 and shape[-1] == 1:
        dims -= 1
        shape = shape[:-1]
    if dims not in (2, 3) or len(shape) != dims:
        raise CTInstructError(f"{name} has {dims} dimensions and size {fields['DimSize']}: give one volume of it.")
    channels = int(fields.get("ElementNumberOfChannels", "1"))
    element = fields["ElementType"]
    if channels != 1 or element.endswith("_ARRAY"):
        raise CTInstructError(f"{name} has {channels} values per voxel: expected CT in HU.")
    if element not in _META_TYPES:
        raise CTInstructError(f"{name} has the element type {element[:40]}: expected one of {', '.join(_META_TYPES)}.")
    large = fields.get("BinaryDataByteOrderMSB", fields.get("ElementByteOrderMSB", "False")).lower() in ("true", "1")
    binary = fields.get("BinaryData", "True").lower() in ("true", "1")
    packed = fields.get("CompressedData", "False").lower() in ("true", "1")
    data = fields["ElementDataFile"]
    if data.upper().startswith("LIST") or "%" in data:
        raise CTInstructError(f"{name} names a list of data files: write the volume as one .mha file.")
    full = int(fields["NDims"])
    offset = _first(fields, "Offset", "Position", "Origin")
    turn = _first(fields, "TransformMatrix", "Rotation", "Orientation")
    origin, rows = np.zeros(3), np.eye(full)
    if offset:
        origin[:dims] = _numbers(offset)[:dims]
    if turn:
        rows = np.array(_numbers(turn)).reshape(full, full)
    warnings = [] if turn else ["The header has no orientation: axes are taken as toward left, back and head."]
    steps = _first(fields, "ElementSpacing", "ElementSize")
    unit = fields.get("DistanceUnits", "mm").lower()
    if unit not in _MILLIMETRES:
        warnings.append(f"The header has an unknown unit of length ('{unit[:20]}'): mm is taken.")
    factor = _MILLIMETRES.get(unit, 1.0)
    columns = None
    if steps:
        lengths = np.array(_numbers(steps))[:dims]
        if len(lengths) != dims or not (np.isfinite(lengths) & (lengths > 0)).all():
            raise CTInstructError(f"{name} has spacing {steps}: expected {dims} positive numbers.")
        columns = np.zeros((3, dims))
        columns[:dims] = rows[:dims, :dims].T * lengths * factor
    slope = float(fields.get("ElementToIntensityFunctionSlope", "1"))
    inter = float(fields.get("ElementToIntensityFunctionOffset", "0"))
    if (slope, inter) != (1.0, 0.0):
        warnings.append(f"The header's slope {slope:g} and offset {inter:g} from stored values to HU are applied.")
    stored = Stored(
        shape=shape,
        dtype=np.dtype(_META_TYPES[element]).newbyteorder(">" if large else "<"),
        encoding=("zlib" if packed else "raw") if binary or packed else "text",
        data="" if data.upper() == "LOCAL" else data,
        columns=columns,
        origin=origin * factor,
        skipped=int(fields.get("HeaderSize", "0")),
        scale=(slope, inter),
        warnings=warnings,
    )
    return stored, end


def _first(fields: dict[str, str], *names: str) -> str:
    return next((fields[name] for name in names if fields.get(name)), "")


def _nrrd_header(start: bytes, name: str) -> tuple[Stored, int]:
    """An NRRD header, which ends with an empty line, and where it ends."""
    fields: dict[str, str] = {}
    end = 0
    while True:
        line_end = start.find(b"\n", end)
        line = start[end : line_end if line_end >= 0 else len(start)].decode("utf-8", "replace").rstrip("\r")
        end = line_end + 1 if line_end >= 0 else len(start)
        if not line or (line_end < 0 and end >= _HEADER_BYTES):
            break
        key, found, value = line.partition(": ")
        if found and not line.startswith("#"):
            fields[re.sub(r"[ _-]", "", key.strip().lower())] = value.strip()
        if line_end < 0:
            break
    dims = int(fields["dimension"])
    shape = [int(part) for part in fields["sizes"].split()]
    if len(shape) != dims:
        raise CTInstructError(f"{name} has {dims} dimensions and {len(shape)} sizes: its header is broken.")
    element = fields["type"].lower()
    if element not in _NRRD_TYPES:
        raise CTInstructError(f"{name} has the type {element[:40]}: expected numbers.")
    encoding = fields["encoding"].lower()
    known = {"raw": "raw", "txt": "text", "text": "text", "ascii": "text"}
    known |= {"gz": "gzip", "gzip": "gzip", "bz2": "bzip2", "bzip2": "bzip2"}
    if encoding not in known:
        raise CTInstructError(f"{name} has the encoding {encoding[:40]}: expected one of {', '.join(known)}.")
    itemsize = np.dtype(_NRRD_TYPES[element]).itemsize
    order = fields.get("endian", "little" if itemsize == 1 or known[encoding] == "text" else "").lower()
    if order not in ("little", "big"):
        raise CTInstructError(f"{name} does not say its byte order (endian).")
    data = fields.get("datafile", "")
    if data.upper().startswith("LIST") or "%" in data:
        raise CTInstructError(f"{name} names a list of data files: write the volume as one .nrrd file.")
    warnings: list[str] = []
    columns, origin, kept = _nrrd_grid(fields, shape, name, warnings)
    stored = Stored(
        shape=[shape[axis] for axis in kept],
        dtype=np.dtype(_NRRD_TYPES[element]).newbyteorder(">" if order == "big" else "<"),
        encoding=known[encoding],
        data=data,
        columns=columns,
        origin=origin,
        lines=int(fields.get("lineskip", "0")),
        skipped=int(fields.get("byteskip", "0")),
        warnings=warnings,
    )
    return stored, end


def _nrrd_grid(
    fields: dict[str, str], shape: Sequence[int], name: str, warnings: list[str]
) -> tuple[np.ndarray | None, np.ndarray, list[int]]:
    """Columns [3, axes] and origin in LPS mm, and which of the file's axes lie in space."""
    every = list(range(len(shape)))
    vectors = re.findall(r"none|\(([^)]*)\)", fields.get("spacedirections", ""))
    if vectors:
        if len(vectors) != len(shape):
            raise CTInstructError(f"{name} has {len(vectors)} space directions for {len(shape)} axes.")
        kept = [axis for axis in every if vectors[axis]]
    else:
        spacings = fields.get("spacings", "").split() or ["1"] * len(shape)
        kept = [axis for axis in every if shape[axis] > 1 or spacings[axis].lower() != "nan"]
        kept = kept if len(kept) <= 3 else [axis for axis in kept if shape[axis] > 1]
    values = int(np.prod([shape[axis] for axis in every if axis not in kept], dtype=np.int64))
    if values != 1:
        raise CTInstructError(f"{name} has {values} values per voxel: expected CT in HU.")
    if len(kept) not in (2, 3):
        raise CTInstructError(f"{name} has {len(kept)} dimensions: give one volume of it.")
    origin = np.zeros(3)
    if not vectors:
        warnings.append("The header has no orientation: axes are taken as toward left, back and head.")
        lengths = _nrrd_spacings(fields, shape, kept, name)
        if lengths is None:
            return None, origin, kept
        factors = _factors(fields.get("units", ""), len(shape), warnings)
        columns = np.eye(3)[:, : len(kept)] * (lengths * factors[kept])
        return columns, origin, kept
    space = fields.get("space", "").lower()
    if space not in _SPACES:
        warnings.append(f"The header's space ('{space[:40]}') has no left and head: it is taken as left, back, head.")
    signs = np.array([-1, -1, 1]) * _SPACES.get(space, (-1, -1, 1))
    numbers = [[float(part) for part in vectors[axis].split(",")] for axis in kept]
    if any(len(vector) != 3 for vector in numbers):
        raise CTInstructError(f"{name} has space directions that are not in three dimensions.")
    factors = _factors(fields.get("spaceunits", ""), 3, warnings)
    columns = np.array(numbers).T * (signs * factors)[:, None]
    offset = re.fullmatch(r"\s*\(([^)]*)\)\s*", fields.get("spaceorigin", ""))
    if offset:
        origin = np.array([float(part) for part in offset.group(1).split(",")]) * signs * factors
    if not np.isfinite(columns).all() or not np.isfinite(origin).all():
        raise CTInstructError(f"{name} has space directions or an origin that are no numbers.")
    return columns, origin, kept


def _nrrd_spacings(fields: dict[str, str], shape: Sequence[int], kept: list[int], name: str) -> np.ndarray | None:
    """Spacing along the kept axes, from `spacings` or from the axes' limits and centers; None where it is not stated."""
    if "spacings" in fields:
        lengths = np.array(_numbers(fields["spacings"]))[kept]
        if not (np.isfinite(lengths) & (lengths > 0)).all():
            raise CTInstructError(f"{name} has spacings {fields['spacings']}: expected positive numbers.")
        return lengths
    centers = fields.get("centers", fields.get("centerings", "")).lower().split()
    if "axismins" not in fields or "axismaxs" not in fields or len(centers) != len(shape):
        return None
    low, high = (np.array(_numbers(fields[key]))[kept] for key in ("axismins", "axismaxs"))
    steps = np.array([shape[axis] - (centers[axis] == "node") for axis in kept])
    lengths = np.abs(high - low) / np.maximum(steps, 1)
    return lengths if (np.isfinite(lengths) & (lengths > 0)).all() else None


def _factors(text: str, count: int, warnings: list[str]) -> np.ndarray:
    """mm in the units of each axis, as `"cm" "cm" "cm"`."""
    units = [unit.lower() for unit in re.findall(r'"([^"]*)"', text)]
    unknown = sorted({unit[:20] for unit in units if unit and unit not in _MILLIMETRES})
    if unknown:
        warnings.append(f"The header has unknown units of length ({', '.join(unknown)}): mm is taken.")
    found = np.ones(count)
    found[: len(units)] = [_MILLIMETRES.get(unit, 1.0) for unit in units[:count]]
    return found
