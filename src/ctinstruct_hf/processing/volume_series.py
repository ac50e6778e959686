"""DICOM files of a folder: their headers, and the series that is read."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pydicom

from .volume import CTInstructError

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


def list_files(folder: Path) -> list[Path]:
    """All files below a folder, without hidden ones; links are not followed into folders."""
    found: list[Path] = []
    for root, folders, names in os.walk(folder, followlinks=False):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        found.extend(Path(root, name) for name in sorted(names) if not name.startswith(".") and name != "DICOMDIR")
    return [file for file in found if file.is_file()]


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


def some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


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
