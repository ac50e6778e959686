"""DICOM files of a folder and their headers; nothing outside the folder is read."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pydicom
from pydicom.tag import BaseTag, Tag
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

from .volume import CTInstructError, Limits

CT_CLASSES = {
    "1.2.840.10008.5.1.4.1.1.2",  # CT Image
    "1.2.840.10008.5.1.4.1.1.2.1",  # Enhanced CT Image
    "1.2.840.10008.5.1.4.1.1.2.2",  # Legacy Converted Enhanced CT Image
}
DIRECTORY = "1.2.840.10008.1.3.10"  # the class of a DICOMDIR
DEFLATED = b"1.2.840.10008.1.2.1.99"


tag_of = cache(Tag)  # keyword -> tag; pydicom looks a keyword up each time


def _tags(*keywords: str) -> list[BaseTag]:
    return [tag_of(keyword) for keyword in keywords]


# nothing in here identifies a patient
HEADER_TAGS = _tags(
    "ImageType",
    "SOPClassUID",
    "SOPInstanceUID",
    "Modality",
    "SeriesDescription",
    "SliceThickness",
    "KVP",
    "SpacingBetweenSlices",
    "ConvolutionKernel",
    "NominalPercentageOfCardiacPhase",
    "SeriesInstanceUID",
    "SeriesNumber",
    "AcquisitionNumber",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "FrameOfReferenceUID",
    "TemporalPositionIdentifier",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "PixelSpacing",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
    "RescaleIntercept",
    "RescaleSlope",
    "RescaleType",
    "ModalityLUTSequence",
    "LossyImageCompression",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
)
# compared with each other, never shown nor copied
_PATIENT_TAGS = _tags("PatientID", "PatientName")


@dataclass
class Skipped:
    """A file or series that is not read as a scan, and the reason.

    Attributes:
        name: a file's name, or the modality, number and description of a series.
        reason: the rest of a sentence that begins with the name.
        files: of the series, or the file.
        modality: of a series, CT for a part of a series; "" for a file that cannot be read.
    """

    name: str
    reason: str
    files: list[Path] = field(default_factory=list, repr=False)
    modality: str = ""

    def __str__(self) -> str:
        return f"{self.name} {self.reason}"


@contextmanager
def quiet_pydicom() -> Iterator[None]:
    """Without pydicom's validation: its warnings quote values, which may identify a patient."""
    before = pydicom.config.settings.reading_validation_mode
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    try:
        yield
    finally:
        pydicom.config.settings.reading_validation_mode = before


def list_files(folder: Path) -> tuple[list[Path], list[Skipped]]:
    """All files below a folder that are not hidden, and the links that lead out of it, which are not followed."""
    root = folder.resolve()
    found: list[Path] = []
    outside: list[Skipped] = []
    for base, folders, names in os.walk(folder, followlinks=False):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        for name in [*folders, *sorted(names)]:
            if name.startswith("."):
                continue
            file = Path(base, name)
            if file.is_symlink() and not Path(os.path.realpath(file)).is_relative_to(root):
                outside.append(Skipped(name, "is a link out of the folder and not followed", [file]))
            elif name not in folders and name != "DICOMDIR" and file.is_file():
                found.append(file)
    return found, outside


def read_headers(files: Sequence[Path], limit: Limits) -> tuple[list[tuple[Path, Any]], list[Skipped]]:
    """(file, header) of every DICOM file, and the DICOM files that cannot be read; other files are passed over."""
    found: list[tuple[Path, Any]] = []
    broken: list[Skipped] = []
    tags: Any = [*HEADER_TAGS, *_PATIENT_TAGS]
    for file in files:  # sequential: parsing holds the interpreter lock, threads would only wait for each other
        try:
            with open(file, "rb") as stream:
                start = stream.read(1024)
                bare = start[128:132] != b"DICM"
                if bare and start[:2] == b"\x1f\x8b":
                    if zlib.decompressobj(31).decompress(start, 132)[128:132] == b"DICM":
                        broken.append(Skipped(file.name, "is packed by gzip: unpack it first", [file]))
                    continue
                if bare and not _starts_like_dicom(start):
                    continue
                if DEFLATED in start:
                    _check_inflated(file, limit)
                stream.seek(0)
                header = pydicom.dcmread(stream, stop_before_pixels=True, specific_tags=tags, force=bare)
                header.pixel_offset = stream.tell()  # where the pixel data's tag lies
        except CTInstructError as error:
            broken.append(Skipped(file.name, str(error), [file]))
            continue
        except Exception:
            if not bare:
                broken.append(Skipped(file.name, "is a broken DICOM file", [file]))
            continue
        if "TransferSyntaxUID" not in header.file_meta:  # an archive's dump without the file meta header
            implicit = header.original_encoding[0]
            header.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
        if "SeriesInstanceUID" not in header and "Rows" not in header and class_of(header) != DIRECTORY:
            if not bare:
                broken.append(Skipped(file.name, "is a DICOM file cut short inside its header", [file]))
            continue
        found.append((file, header))
    return found, broken


def _starts_like_dicom(start: bytes) -> bool:
    """Whether bytes without preamble begin with an element of group 2 or 8, and a UID of DICOM follows."""
    if b"1.2.840.10008." not in start:
        return False
    if len(start) < 16 or start[:2] not in (b"\x02\x00", b"\x08\x00") or int.from_bytes(start[2:4], "little") > 0x70:
        return False
    return (start[4:6].isalpha() and start[4:6].isupper()) or int.from_bytes(start[4:8], "little") <= 256


def _check_inflated(file: Path, limit: Limits) -> None:
    """Refuse a deflated data set that inflates to more than is allowed; pydicom inflates all at once."""
    meta = pydicom.filereader.read_file_meta_info(file)
    if meta.TransferSyntaxUID != DEFLATED.decode():
        return
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    with open(file, "rb") as stream:
        stream.seek(132 + 12 + int(meta.FileMetaInformationGroupLength))
        left, packed = limit.bytes, stream.read()
    while packed and not inflate.eof:
        left -= len(inflate.decompress(packed, 2**22))
        packed = inflate.unconsumed_tail
        if left < 0:
            raise CTInstructError(f"inflates to more than the {limit.bytes / 2**30:.3g} GiB allowed")


def class_of(header: Any) -> str:
    """The SOP class, from the file's meta header where the data set has none."""
    return text(header, "SOPClassUID") or str(header.file_meta.get("MediaStorageSOPClassUID", ""))


def what_it_is(header: Any) -> str:
    """CT for a CT image, else a word for another object."""
    modality, sop_class = text(header, "Modality"), class_of(header)
    if modality in ("CT", "") and sop_class in CT_CLASSES:
        return "scout" if "LOCALIZER" in text(header, "ImageType").upper().split("\\") else "CT"
    if modality == "CT":
        return "CT secondary capture" if "Rows" in header else "CT document"
    return {"SR": "dose report or other SR", "": "unknown"}.get(modality, modality)


def numbers(dataset: Any, keyword: str) -> list[float]:
    """The decimal strings of an element, straight from its bytes where pydicom has not read them yet; [] for none."""
    element = dataset.get_item(tag_of(keyword))
    if element is None or element.value is None:
        return []
    value = element.value
    if isinstance(value, bytes):
        return [float(part) for part in value.rstrip(b"\0 ").split(b"\\") if part.strip()]
    parts = value if isinstance(value, list | tuple | pydicom.multival.MultiValue) else [value]
    return [float(part) for part in parts]


def integer(dataset: Any, keyword: str, default: int = 0) -> int:
    """A whole number of a header, straight from its bytes where pydicom has not read them yet."""
    element = dataset.get_item(tag_of(keyword))
    if element is None or element.value is None or element.value == b"":
        return default
    value = element.value
    if isinstance(value, bytes):
        if element.VR in ("US", "SS") or (element.VR is None and len(value) == 2):
            return int.from_bytes(value[:2], "little" if element.is_little_endian else "big")
        return int(value.strip(b"\0 ") or default)
    return int(value)


def text(dataset: Any, keyword: str) -> str:
    r"""An element's characters as stored, several values with \ between them; "" for none."""
    element = dataset.get_item(tag_of(keyword))
    value = None if element is None else element.value
    if value is None:
        return ""
    if isinstance(value, bytes):
        shown = value.decode("latin-1").strip("\0 ")
    else:
        shown = (
            "\\".join(map(str, value)) if isinstance(value, list | pydicom.multival.MultiValue) else str(value).strip()
        )
    return shown if shown.isprintable() else "".join(c for c in shown if c.isprintable())


def some(names: Sequence[str]) -> str:
    """The first three names and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
