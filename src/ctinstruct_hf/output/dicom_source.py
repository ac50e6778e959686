"""What DICOM objects made from a scan take from its files: the patient and study, and where each slice is stored."""

from __future__ import annotations

import datetime
import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.uid import CTImageStorage
from pydicom.valuerep import DSfloat

from ..errors import CTInstructError
from ..processing.volume import CTVolume

# what the patient and study modules ask for; empty is allowed, absent is not
_PATIENT_AND_STUDY = (
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "StudyID",
    "StudyDate",
    "StudyTime",
    "AccessionNumber",
    "ReferringPhysicianName",
)
_WANTED = (
    *_PATIENT_AND_STUDY,
    "SOPClassUID",
    "SOPInstanceUID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "FrameOfReferenceUID",
    "ImagePositionPatient",
    "SliceThickness",
    "NumberOfFrames",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
)
LPS = np.diag([-1.0, -1.0, 1.0])  # from and to RAS


@contextmanager
def no_quotes() -> Iterator[None]:
    """pydicom and highdicom quote what they find odd in a header, a patient's name among it: not into anybody's log."""
    loggers = [logging.getLogger(name) for name in ("pydicom", "highdicom")]
    before = [logger.disabled for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.disabled = True
        try:
            yield
        finally:
            for logger, disabled in zip(loggers, before, strict=True):
                logger.disabled = disabled


@contextmanager
def writing(volume: CTVolume, what: str) -> Iterator[None]:
    """Around the writing of a DICOM object: nothing that a library says of a header gets out.

    Raises:
        CTInstructError: for whatever goes wrong but errors of ours and of the disk.
    """
    with no_quotes():
        try:
            yield
        except (CTInstructError, OSError):
            raise
        except Exception as error:  # its text may quote the patient: only its type is passed on
            raise CTInstructError(
                f"{volume.source.name} cannot be written as {what} ({type(error).__name__})."
            ) from None


def check_dicom(volume: CTVolume, what: str) -> None:
    """Raises CTInstructError where the scan is no DICOM series on disk, which a DICOM object must reference."""
    if volume.source.kind != "dicom" or not volume.source.dicom_files:
        raise CTInstructError(f"{volume.source.name or 'The scan'} is no DICOM series on disk: {what} references one.")


def derived_uid(seed: str | None, *parts: str) -> str:
    """A UID that is the same for the same seed and parts, so that what is sent again is not stored twice; a new one
    without a seed."""
    return str(pydicom.uid.generate_uid(entropy_srcs=[seed, *parts]) if seed else pydicom.uid.generate_uid())


@no_quotes()
def study_and_series(volume: CTVolume) -> tuple[str | None, str | None]:
    """StudyInstanceUID and SeriesInstanceUID of a DICOM scan on disk."""
    for file in volume.source.dicom_files[:1]:
        tags: list[Any] = ["StudyInstanceUID", "SeriesInstanceUID"]
        found = pydicom.dcmread(file, stop_before_pixels=True, force=True, specific_tags=tags)
        return tuple(str(found.get(tag) or "") or None for tag in tags)  # type: ignore[return-value]
    return None, None


@dataclass
class Frame:
    """A slice of the scan: where it lies (LPS mm), and where it is stored."""

    position: np.ndarray
    sop_class: str
    sop_instance: str
    number: int | None  # from 1, in a multi-frame file


def source_frames(volume: CTVolume, notes: list[str]) -> tuple[list[Frame], dict[str, Any]]:
    """The scan's slices in the order of k, and the elements that the SEG takes from them."""
    source = volume.source
    headers: dict[Path, Any] = {
        file: pydicom.dcmread(file, stop_before_pixels=True, force=True, specific_tags=list(_WANTED))
        for file in dict.fromkeys(source.dicom_files)
    }
    frames = []
    for k, (file, number) in enumerate(zip(source.dicom_files, source.dicom_frames, strict=True)):
        header = headers[file]
        meta = header.file_meta
        instance = header.get("SOPInstanceUID") or meta.get("MediaStorageSOPInstanceUID")
        if not instance:
            raise CTInstructError(f"{file.name} has no SOPInstanceUID: no DICOM object can reference it.")
        place = _part(header, number, "PlanePositionSequence").get("ImagePositionPatient")
        frames.append(
            Frame(
                # a slice without a position lies on the grid
                np.array(place, float) if place else LPS @ (source.affine @ [0, 0, k, 1])[:3],
                str(header.get("SOPClassUID") or meta.get("MediaStorageSOPClassUID") or CTImageStorage),
                str(instance),
                number + 1 if header.get("NumberOfFrames") is not None else None,
            )
        )
    first = headers[source.dicom_files[0]]
    axes, lengths = LPS @ source.affine[:3, :3], np.linalg.norm(source.affine[:3, :3], axis=0)
    thickness = _part(first, source.dicom_frames[0], "PixelMeasuresSequence").get("SliceThickness")
    elements: dict[str, Any] = {keyword: _valid(first, keyword, notes) or None for keyword in _PATIENT_AND_STUDY}
    elements |= {
        "ImageOrientationPatient": decimals((axes / lengths)[:, :2].T.ravel()),
        "PixelSpacing": decimals(lengths[[1, 0]]),
        "SliceThickness": decimals([thickness or lengths[2]])[0],
        "Columns": source.shape[0],
        "Rows": source.shape[1],
    }
    instances = sorted(one.sop_instance for one in frames)
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
        found = Counter(str(header.get(keyword) or "") for header in headers.values())
        found.pop("", None)
        if not found:
            notes.append(f"The files have no {keyword}: what refers to them has one that is derived from them.")
            found[str(pydicom.uid.generate_uid(entropy_srcs=[keyword, *instances[:1]]))] += 1
        elements[keyword] = found.most_common(1)[0][0]
    return frames, elements


def _part(header: Any, frame: int, sequence: str) -> Any:
    """Where a frame's elements of a functional group stand: in the frame's item, the shared one, or the header."""
    groups = header.get("PerFrameFunctionalGroupsSequence") or []
    for item in [*groups[frame : frame + 1], *(header.get("SharedFunctionalGroupsSequence") or [])]:
        if item.get(sequence):
            return item[sequence][0]
    return header


def decimals(values: Any) -> list[DSfloat]:
    return [DSfloat(float(value), auto_format=True) for value in values]


def _valid(header: Any, keyword: str, notes: list[str]) -> str:
    """An element of the patient or study as text that the standard allows; empty where there is none."""
    try:
        text = str(header.get(keyword) or "").strip(" \0")
    except Exception:  # bytes that its VR does not allow
        text = "?"
    kept = text
    if keyword.endswith("Date"):
        kept = re.sub(r"[.\-/]", "", text)
        try:
            datetime.datetime.strptime(kept, "%Y%m%d")
        except ValueError:
            kept = ""
    elif keyword.endswith("Time"):
        kept = text.replace(":", "")
        valid = r"([01]\d|2[0-3])([0-5]\d(([0-5]\d|60)(\.\d{1,6})?)?)?"
        kept = kept if re.fullmatch(valid, kept) else ""
    elif keyword == "PatientSex":
        kept = text.upper() if text.upper() in ("M", "F", "O") else ""
    if text and not kept:
        notes.append(f"{keyword} of the files is not valid: it is left empty in what is written as DICOM.")
    return kept


__all__ = ["LPS", "Frame", "check_dicom", "decimals", "derived_uid", "source_frames", "study_and_series", "writing"]
