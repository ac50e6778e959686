"""DICOM: find the CT series, order its slices by position, read pixels in threads, notice what is odd.

Steps, in order: files -> headers -> one series -> slices in space -> pixels in HU -> an even, upright grid.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.uid import UID

from .volume import AIR_HU, CTInstructError, CTVolume, Limits, VolumeSource, _last_line, canonical, check_size, clean_hu
from .volume_resampling import SliceResampling

CT_CLASSES = {
    "1.2.840.10008.5.1.4.1.1.2",  # CT Image
    "1.2.840.10008.5.1.4.1.1.2.1",  # Enhanced CT Image
    "1.2.840.10008.5.1.4.1.1.2.2",  # Legacy Converted Enhanced CT Image
}
# nothing in here identifies a patient
HEADER_TAGS: list[int | str] = [
    "SOPClassUID",
    "Modality",
    "ImageType",
    "SeriesInstanceUID",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "SliceThickness",
    "SpacingBetweenSlices",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "BitsAllocated",
    "BitsStored",
    "PixelRepresentation",
    "PixelPaddingValue",
    "RescaleSlope",
    "RescaleIntercept",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
    "FrameOfReferenceUID",
]
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


def read_dicom(path: Path, series: str | None, spacing: tuple[float, float, float] | None, limit: Limits) -> CTVolume:
    """A DICOM file, folder or zip; see `read_volume`."""
    before = pydicom.config.settings.reading_validation_mode
    # pydicom's warnings quote what they find, and that may be a patient's
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    try:
        return _read_dicom(path, series, spacing, limit)
    finally:
        pydicom.config.settings.reading_validation_mode = before


def _read_dicom(path: Path, series: str | None, spacing: tuple[float, float, float] | None, limit: Limits) -> CTVolume:
    if path.is_file() and zipfile.is_zipfile(path):
        return _read_zip(path, series, spacing, limit)
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
        warnings.append(f"{len(broken)} broken DICOM files are left out: {_some(broken)}.")
    chosen = choose_series(headers, series, path.name or str(path), warnings)
    slices = [part for file, header in chosen for part in slices_of(file, header, spacing)]
    slices = order_slices(slices, warnings)
    return build_volume(slices, path, warnings, limit)


def list_files(folder: Path) -> list[Path]:
    """All files below a folder, without hidden ones; links are not followed into folders."""
    found: list[Path] = []
    for root, folders, names in os.walk(folder, followlinks=False):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        found.extend(Path(root, name) for name in sorted(names) if not name.startswith(".") and name != "DICOMDIR")
    return [file for file in found if file.is_file()]


def _read_zip(path: Path, series: str | None, spacing: tuple[float, float, float] | None, limit: Limits) -> CTVolume:
    """Members go to a private folder under names of our own, so that no name of the zip can lead out of it."""
    folder = Path(tempfile.mkdtemp(prefix="ctinstruct-"))
    try:
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
            if sum(member.file_size for member in members) > limit.bytes:
                raise CTInstructError(
                    f"{path.name} would unpack to more than the {limit.bytes / 2**30:.3g} GiB allowed."
                )
            budget = limit.bytes
            for index, member in enumerate(members):
                suffix = "".join(Path(Path(member.filename).name).suffixes[-2:]).lower()
                suffix = suffix if suffix in (".nii", ".nii.gz") else ""
                with archive.open(member) as packed, open(folder / f"{index:06d}{suffix}", "wb") as unpacked:
                    while block := packed.read(min(2**20, budget + 1)):
                        budget -= len(block)
                        if budget < 0:
                            raise CTInstructError(f"{path.name} unpacks to more than it says: refused.")
                        unpacked.write(block)
        nifti = sorted([*folder.glob("*.nii"), *folder.glob("*.nii.gz")])
        if len(nifti) == 1 and len(members) == 1:
            from .volume_nifti import read_nifti

            volume = read_nifti(nifti[0], limit)
        else:
            volume = read_dicom(folder, series, spacing, limit)
        volume.source.name, volume.source.path = path.name, path
        volume.source.dicom_files = []
        return volume
    except CTInstructError as error:
        raise CTInstructError(str(error).replace(folder.name, path.name)) from error
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError, OSError, ValueError) as error:
        raise CTInstructError(f"{path.name} is no readable zip: {_last_line(error)}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def read_headers(files: Sequence[Path]) -> tuple[list[tuple[Path, Any]], list[str]]:
    """(file, header) of every DICOM file, and the names of DICOM files that are broken; others are passed over."""

    found: list[tuple[Path, Any]] = []
    broken: list[str] = []
    for file in files:  # one after the other: parsing holds the interpreter, threads would only wait for each other
        try:
            with open(file, "rb") as stream:
                stream.seek(128)
                if stream.read(4) != b"DICM":
                    continue
                stream.seek(0)
                header = pydicom.dcmread(stream, stop_before_pixels=True, specific_tags=HEADER_TAGS)
                header.pixel_offset = stream.tell()  # where the pixel data's tag lies
                found.append((file, header))
        except Exception:
            broken.append(file.name)
    return found, broken


def choose_series(
    headers: list[tuple[Path, Any]], wanted: str | None, name: str, warnings: list[str]
) -> list[tuple[Path, Any]]:
    """The CT series, the only one or the one asked for; what else lies there is named in a warning."""
    series: dict[str, list[tuple[Path, Any]]] = {}
    left_out: Counter[str] = Counter()
    for file, header in headers:
        kind = _kind(header)
        if kind == "CT":
            series.setdefault(str(header.get("SeriesInstanceUID", "")), []).append((file, header))
        else:
            left_out[kind] += 1
    if not series:
        kinds = ", ".join(f"{count} {kind}" for kind, count in left_out.items())
        raise CTInstructError(f"{name} holds no CT image ({kinds}): only CT can be read.")
    if left_out:
        warnings.append(
            "Left out beside the CT: " + ", ".join(f"{count} {kind}" for kind, count in left_out.items()) + "."
        )
    if wanted is not None:
        if wanted not in series:
            raise CTInstructError(f"{name} has no CT series {wanted}; it has {_listed(series)}.")
        return series[wanted]
    if len(series) > 1:
        raise CTInstructError(f"{name} holds {len(series)} CT series, name one as series=: {_listed(series)}.")
    return next(iter(series.values()))


def _kind(header: Any) -> str:
    modality = str(header.get("Modality", "") or "unknown")
    image_type = [str(part).upper() for part in header.get("ImageType", None) or []]
    if modality == "CT" and "LOCALIZER" in image_type:
        return "scout"
    meta = getattr(header, "file_meta", {})
    sop_class = header.get("SOPClassUID", None) or meta.get("MediaStorageSOPClassUID", None)
    if modality == "CT" and str(sop_class) in CT_CLASSES:
        return "CT"
    if modality == "CT":
        return "CT secondary capture" if "Rows" in header else "CT document"
    return {"SR": "dose report or other SR"}.get(modality, modality)


def _listed(series: dict[str, list[tuple[Path, Any]]]) -> str:
    return ", ".join(
        f"{uid} ({len(members)} files, {members[0][1].get('SliceThickness', '?')} mm)"
        for uid, members in series.items()
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


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
        raise CTInstructError(f"{file.name} has a broken position, spacing or rescale: {_last_line(error)}") from error
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


def numbers(dataset: Any, keyword: str) -> list[float]:
    """The decimal strings of an element, straight from its bytes where pydicom has not read them yet; [] for none."""
    element = dataset.get_item(keyword)
    if element is None or element.value is None:
        return []
    value = element.value
    if isinstance(value, bytes):
        return [float(part) for part in value.rstrip(b"\0 ").split(b"\\") if part.strip()]
    return [
        float(part) for part in (value if isinstance(value, list | tuple | pydicom.multival.MultiValue) else [value])
    ]


def integer(dataset: Any, keyword: str, default: int = 0) -> int:
    """A whole number of a header, straight from its bytes where pydicom has not read them yet."""
    element = dataset.get_item(keyword)
    if element is None or element.value is None or element.value == b"":
        return default
    value = element.value
    if isinstance(value, bytes):
        if element.VR in ("US", "SS") or (element.VR is None and len(value) == 2):
            return int.from_bytes(value[:2], "little" if element.is_little_endian else "big")
        return int(value.strip(b"\0 ") or default)
    return int(value)


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
        raise CTInstructError(f"{path.name} cannot be decoded ({syntax.name}): {_last_line(error)}") from error


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
