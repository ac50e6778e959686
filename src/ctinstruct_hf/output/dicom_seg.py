"""Masks as one DICOM segmentation object that references the series they were made on (highdicom).

highdicom is given a plain image, whatever the files are: enhanced files keep their frames in any order, repeat them, or share
a series with others. Frames and references to the files' own frames are written here. The standard ties a
segmentation to its patient and study: the elements that it asks for (`_PATIENT_AND_STUDY`) are all that is copied.
"""

from __future__ import annotations

import copy
import datetime
import logging
import re
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.datadict import tag_for_keyword
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_data_element
from pydicom.uid import CTImageStorage
from pydicom.valuerep import DSfloat

from .._version import __version__
from ..errors import CTInstructError
from ..processing.volume import CTVolume
from .measure import stored
from .report import COLOURS

_ANATOMY = ("123037004", "Anatomical Structure")
_TISSUE = ("85756007", "Tissue")
_ABNORMAL = ("49755003", "Morphologically Abnormal Structure")
# name -> (SNOMED CT code, meaning, category); a side is a modifier of the pair's code
CODES: dict[str, tuple[str, str, tuple[str, str]]] = {
    "body": ("38266002", "Entire body", _ANATOMY),
    "lungs": ("39607008", "Lung", _ANATOMY),
    "trachea": ("44567001", "Trachea", _ANATOMY),
    "heart": ("80891009", "Heart", _ANATOMY),
    "aorta": ("15825003", "Aorta", _ANATOMY),
    "esophagus": ("32849002", "Esophagus", _ANATOMY),
    "liver": ("10200004", "Liver", _ANATOMY),
    "spleen": ("78961009", "Spleen", _ANATOMY),
    "stomach": ("69695003", "Stomach", _ANATOMY),
    "pancreas": ("15776009", "Pancreas", _ANATOMY),
    "kidneys": ("64033007", "Kidney", _ANATOMY),
    "urinary bladder": ("89837001", "Urinary bladder", _ANATOMY),
    "spine": ("421060004", "Vertebral column", _ANATOMY),
    "ribs": ("113197003", "Rib", _ANATOMY),
    "sternum": ("56873002", "Sternum", _ANATOMY),
    "bones": ("272673000", "Bone", _ANATOMY),
    "muscle": ("91727004", "Muscle", _TISSUE),
    "subcutaneous fat": ("67769000", "Subcutaneous fatty tissue", _ANATOMY),
    "lung nodule": ("27925004", "Nodule", _ABNORMAL),
    "pleural effusion": ("41699000", "Effusion", _ABNORMAL),
    "pericardial effusion": ("41699000", "Effusion", _ABNORMAL),
    "liver lesion": ("52988006", "Lesion", _ABNORMAL),
    "kidney stone": ("56381008", "Calculus", _ABNORMAL),
    "lymphadenopathy": ("30746006", "Lymphadenopathy", _ABNORMAL),
}
SIDES = {
    "right": ("24028007", "Right"),
    "left": ("7771000", "Left"),
    "both": ("51440002", "Right and left"),
}
PAIRS = ("lung", "kidney")
SERIES_DESCRIPTION = "CTInstruct segmentation, research use only"
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
_LPS = np.diag([-1.0, -1.0, 1.0])  # from and to RAS


@contextmanager
def _no_quotes() -> Iterator[None]:
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


@_no_quotes()
def save_dicom_seg(volume: CTVolume, masks: dict[str, np.ndarray], path: Path) -> list[str]:
    """Write a binary DICOM SEG with a segment per mask, on the frames of the source series.

    What the standard allows is repaired: an absent UID of the study, the series or the
    frame of reference becomes one that is derived from the files, a date,
    time or sex that is not valid is left empty, text is written in UTF-8.

    Args:
        volume: read from a DICOM file or folder whose files are still there.
        masks: {name: bool (depth, height, width)} on the volume's grid.
        path: the file to write.

    Returns:
        What was repaired, a sentence each.

    Raises:
        CTInstructError: where the scan is no DICOM on disk, highdicom is not installed, or the SEG cannot be written.
    """
    check_dicom_seg(volume)
    name = volume.source.name
    notes: list[str] = []
    try:
        frames, elements = _source_frames(volume, notes)
        _write(volume, masks, frames, elements, path)
    except (CTInstructError, OSError):
        raise
    except Exception as error:  # its text may quote the patient: only its type is passed on
        raise CTInstructError(f"{name} cannot be written as DICOM SEG ({type(error).__name__}).") from None
    return notes


def check_dicom_seg(volume: CTVolume) -> None:
    """Raises CTInstructError where a DICOM SEG of this scan is impossible."""
    try:
        import highdicom  # noqa: F401
    except ImportError as error:
        raise CTInstructError("DICOM SEG needs highdicom: pip install 'ctinstruct-hf[dicom-seg]'.") from error
    name = volume.source.name or "The scan"
    if volume.source.kind != "dicom" or not volume.source.dicom_files:
        raise CTInstructError(f"{name} is no DICOM series on disk: DICOM SEG references one.")


@_no_quotes()
def series_uid(volume: CTVolume) -> str | None:
    """The SeriesInstanceUID of a DICOM scan on disk."""
    for file in volume.source.dicom_files[:1]:
        found = pydicom.dcmread(file, stop_before_pixels=True, force=True, specific_tags=["SeriesInstanceUID"])
        return str(found.get("SeriesInstanceUID") or "") or None
    return None


@dataclass
class _Frame:
    """A slice of the scan: where it lies (LPS mm), and where it is stored."""

    position: np.ndarray
    sop_class: str
    sop_instance: str
    number: int | None  # from 1, in a multi-frame file


def _source_frames(volume: CTVolume, notes: list[str]) -> tuple[list[_Frame], dict[str, Any]]:
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
            raise CTInstructError(f"{file.name} has no SOPInstanceUID: DICOM SEG cannot reference it.")
        place = _part(header, number, "PlanePositionSequence").get("ImagePositionPatient")
        frames.append(
            _Frame(
                # a slice without a position lies on the grid
                np.array(place, float) if place else _LPS @ (source.affine @ [0, 0, k, 1])[:3],
                str(header.get("SOPClassUID") or meta.get("MediaStorageSOPClassUID") or CTImageStorage),
                str(instance),
                number + 1 if header.get("NumberOfFrames") is not None else None,
            )
        )
    first = headers[source.dicom_files[0]]
    axes, lengths = _LPS @ source.affine[:3, :3], np.linalg.norm(source.affine[:3, :3], axis=0)
    thickness = _part(first, source.dicom_frames[0], "PixelMeasuresSequence").get("SliceThickness")
    elements: dict[str, Any] = {keyword: _valid(first, keyword, notes) or None for keyword in _PATIENT_AND_STUDY}
    elements |= {
        "ImageOrientationPatient": _decimals((axes / lengths)[:, :2].T.ravel()),
        "PixelSpacing": _decimals(lengths[[1, 0]]),
        "SliceThickness": _decimals([thickness or lengths[2]])[0],
        "Columns": source.shape[0],
        "Rows": source.shape[1],
    }
    instances = sorted(one.sop_instance for one in frames)
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
        found = Counter(str(header.get(keyword) or "") for header in headers.values())
        found.pop("", None)
        if not found:
            notes.append(f"The files have no {keyword}: the DICOM SEG has one that is derived from them.")
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


def _decimals(values: Any) -> list[DSfloat]:
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
        notes.append(f"{keyword} of the files is not valid: it is left empty in the DICOM SEG.")
    return kept


def _write(
    volume: CTVolume, masks: dict[str, np.ndarray], frames: Sequence[_Frame], elements: dict[str, Any], path: Path
) -> None:
    """Write the file: what highdicom makes of one frame a segment, with the items and pixels of all frames in its place.

    highdicom and pydicom take some milliseconds a frame, and a scan has thousands of them. Their parts are encoded once a
    slice and once a segment here, and the masks are gone through once.
    """
    rows, columns = elements["Rows"], elements["Columns"]
    shown: list[tuple[int, int]] = []  # segment and slice of each frame
    packed: list[bytes] = []
    rest = np.zeros(0, dtype=bool)  # frames follow each other without padding to whole bytes
    seen = np.zeros((len(frames), rows, columns), dtype=bool)
    overlap = False
    for segment, mask in enumerate(masks.values()):
        grid = stored(volume, mask).transpose(2, 1, 0)
        for k, inside in enumerate(grid):
            if not inside.any():
                continue
            shown.append((segment, k))
            overlap = overlap or bool((seen[k] & inside).any())
            seen[k] |= inside
            bits = np.concatenate([rest, inside.ravel()])
            whole = len(bits) // 8 * 8
            packed.append(np.packbits(bits[:whole], bitorder="little").tobytes())
            rest = bits[whole:]
    if not shown:  # a file has a frame at least
        shown, rest = [(segment, 0) for segment in range(len(masks))], np.zeros(len(masks) * rows * columns, dtype=bool)
    packed.append(np.packbits(rest, bitorder="little").tobytes())

    dataset = _dataset(masks, frames[shown[0][1]], elements)
    dataset.NumberOfFrames = len(shown)
    dataset.SegmentsOverlap = "YES" if overlap else "NO"
    if volume.source.resampling is None and len(frames) > 1:
        spacing = np.linalg.norm(volume.source.affine[:3, 2])
        measures = dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
        measures.SpacingBetweenSlices = _decimals([spacing])[0]
    slices = sorted({k for _, k in shown})
    references = []
    for instance, sop_class in {frames[k].sop_instance: frames[k].sop_class for k in slices}.items():
        reference = pydicom.Dataset()
        reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = sop_class, instance
        references.append(reference)
    dataset.SourceImageSequence = references
    dataset.ReferencedSeriesSequence[0].ReferencedInstanceSequence = references
    groups = list(dataset.PerFrameFunctionalGroupsSequence)
    del dataset.PerFrameFunctionalGroupsSequence, dataset.PixelData
    items = _items(groups, shown, slices, frames)
    pixels = b"".join(packed)
    pixels += b"\0" * (len(pixels) % 2)
    dataset.save_as(path)
    with open(path, "ab") as stream:  # these two elements have the highest tags
        stream.write(struct.pack("<HH2sHI", 0x5200, 0x9230, b"SQ", 0, len(items)) + items)
        stream.write(struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OB", 0, len(pixels)) + pixels)


def _items(
    groups: Sequence[Any], shown: Sequence[tuple[int, int]], slices: Sequence[int], frames: Sequence[_Frame]
) -> bytes:
    """The items of PerFrameFunctionalGroupsSequence, of `groups`, a frame of each segment, for the frames that are shown."""
    derivation, content, position = (
        tag_for_keyword(f"{name}Sequence") for name in ("DerivationImage", "FrameContent", "PlanePosition")
    )
    by_slice: dict[int, dict[Any, bytes]] = {}
    for k in slices:
        group, one = copy.deepcopy(groups[0]), frames[k]
        reference = group.DerivationImageSequence[0].SourceImageSequence[0]
        reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = one.sop_class, one.sop_instance
        if one.number is not None:
            reference.ReferencedFrameNumber = one.number
        group.PlanePositionSequence[0].ImagePositionPatient = _decimals(one.position)
        by_slice[k] = {tag: _encoded(group, tag) for tag in (derivation, position)}
    ranks = {k: number for number, k in enumerate(slices, start=1)}
    by_segment = [
        {tag: _encoded(group, tag) for tag in group.keys() if tag not in (derivation, content, position)}  # noqa: SIM118
        for group in groups
    ]
    parts = []
    for segment, k in shown:
        frame = groups[segment].FrameContentSequence[0]
        frame.DimensionIndexValues = [*frame.DimensionIndexValues[:-1], ranks[k]]
        pieces = by_slice[k] | by_segment[segment] | {content: _encoded(groups[segment], content)}
        body = b"".join(pieces[tag] for tag in sorted(pieces))
        parts.append(struct.pack("<HHI", 0xFFFE, 0xE000, len(body)) + body)
    return b"".join(parts)


def _encoded(dataset: pydicom.Dataset, tag: Any) -> bytes:
    """One element in explicit VR, little endian."""
    stream = DicomBytesIO()
    stream.is_little_endian, stream.is_implicit_VR = True, False
    write_data_element(stream, dataset[tag], ["utf-8"])
    return bytes(stream.getvalue())


def _dataset(masks: dict[str, np.ndarray], first: _Frame, elements: dict[str, Any]) -> Any:
    """A segmentation with one frame a segment, all on one slice."""
    import highdicom as hd

    return hd.seg.Segmentation(
        source_images=[_plain_image(first, elements)],
        pixel_array=np.ones((1, elements["Rows"], elements["Columns"], len(masks)), dtype=bool),
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[_description(number, name) for number, name in enumerate(masks, start=1)],
        series_instance_uid=hd.UID(),
        series_number=900,
        series_description=SERIES_DESCRIPTION,
        sop_instance_uid=hd.UID(),
        instance_number=1,
        manufacturer="ctinstruct-hf",
        manufacturer_model_name="CTInstruct, research use only",
        software_versions=__version__,
        device_serial_number="0",
        specific_character_set="ISO_IR 192",
        transfer_syntax_uid=pydicom.uid.ExplicitVRLittleEndian,
    )


def _plain_image(one: _Frame, elements: dict[str, Any]) -> pydicom.Dataset:
    """A slice as highdicom asks for it: one frame, with the plane and the spacing of all."""
    image = pydicom.Dataset()
    for keyword, value in elements.items():
        setattr(image, keyword, value)
    image.SOPClassUID = CTImageStorage
    image.SOPInstanceUID = one.sop_instance
    image.Modality = "CT"
    image.ImagePositionPatient = _decimals(one.position)
    return image


def _description(number: int, name: str) -> Any:
    """One segment: its label, code, side and colour."""
    import highdicom as hd
    from highdicom.sr.coding import CodedConcept

    label = re.sub(r"[\\\x00-\x1f]", " ", name).strip()[:64] or "segment"
    words = re.sub(r"[\s_-]+", " ", name.lower()).strip()
    side, _, rest = words.partition(" ")
    side, organ = (side, f"{rest}s") if side in SIDES and rest in PAIRS else ("both", words)
    if organ not in (f"{one}s" for one in PAIRS):
        side = ""
    code, meaning, category = CODES.get(organ, (f"CTI{zlib.crc32(words.encode()):08X}", label, _ANATOMY))
    colour = COLOURS[(number - 1) % len(COLOURS)]
    description = hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=label,
        segmented_property_category=CodedConcept(category[0], "SCT", category[1]),
        segmented_property_type=CodedConcept(code, "SCT" if organ in CODES else "99CTINSTRUCT", meaning),
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=hd.AlgorithmIdentificationSequence(
            name="ctinstruct-hf",
            version=__version__,
            family=CodedConcept("123109", "DCM", "Artificial Intelligence"),
        ),
        display_color=hd.color.CIELabColor.from_rgb(*(int(colour[i : i + 2], 16) for i in (1, 3, 5))),
    )
    if side:
        modifier = CodedConcept(SIDES[side][0], "SCT", SIDES[side][1])
        description.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [modifier]
    return description


__all__ = ["CODES", "check_dicom_seg", "save_dicom_seg", "series_uid"]
