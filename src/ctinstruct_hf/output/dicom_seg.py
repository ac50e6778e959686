"""Masks as one DICOM segmentation object that references the series they were made on (highdicom).

highdicom is given a plain image, whatever the files are: enhanced files keep their frames in any order, repeat them, or share
a series with others. Frames and references to the files' own frames are written here. The standard ties a
segmentation to its patient and study: the elements that it asks for (`dicom_source`) are all that is copied.
"""

from __future__ import annotations

import copy
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.datadict import tag_for_keyword
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_data_element
from pydicom.uid import CTImageStorage

from .._version import __version__
from ..errors import CTInstructError
from ..processing.volume import CTVolume
from .codes import CODES, coded, private_scheme
from .colours import rgb
from .dicom_source import Frame, check_dicom, decimals, derived_uid, source_frames, writing
from .measure import stored
from .results import Origin

SERIES_DESCRIPTION = "CTInstruct segmentation, research use only"


def save_dicom_seg(
    volume: CTVolume,
    masks: dict[str, np.ndarray],
    path: Path,
    *,
    label_map: bool = False,
    seed: str | None = None,
    origin: Origin | None = None,
) -> list[str]:
    """Write a DICOM SEG with a segment per mask, on the frames of the source series.

    What the standard allows is repaired: an absent UID of the study, the series or the
    frame of reference becomes one that is derived from the files, a date,
    time or sex that is not valid is left empty, text is written in UTF-8.

    Args:
        volume: read from a DICOM file or folder whose files are still there.
        masks: {name: bool (depth, height, width)} on the volume's grid.
        path: the file to write.
        label_map: a frame a slice with the number of a segment in each voxel (Supplement 243) instead of a binary frame for
            each segment and slice. Where masks share a voxel, the later one has it.
        seed: what was asked of which model, as text: the same seed and scan give the same UIDs; None gives new ones.
        origin: the model, which is named as the algorithm.

    Returns:
        What was repaired or left out, a sentence each.

    Raises:
        CTInstructError: where the scan is no DICOM on disk, highdicom is not installed, or the SEG cannot be written.
    """
    check_dicom_seg(volume)
    notes: list[str] = []
    with writing(volume, "DICOM SEG"):
        frames, elements = source_frames(volume, notes)
        instances = [frame.sop_instance for frame in frames]
        what = "label map" if label_map else "segmentation"
        uids = tuple(derived_uid(seed, purpose, *instances) for purpose in (f"{what} series", what))
        covered = _write(volume, masks, frames, elements, path, uids, origin, label_map)
    if covered:
        names = ", ".join(covered)
        notes.append(f"The DICOM label map holds one structure a voxel: later ones cover voxels of {names}.")
    return notes


def check_dicom_seg(volume: CTVolume) -> None:
    """Raises CTInstructError where a DICOM SEG of this scan is impossible."""
    try:
        import highdicom  # noqa: F401
    except ImportError as error:
        raise CTInstructError("DICOM SEG needs highdicom: pip install 'ctinstruct-hf[dicom-seg]'.") from error
    check_dicom(volume, "DICOM SEG")


def _write(
    volume: CTVolume,
    masks: dict[str, np.ndarray],
    frames: Sequence[Frame],
    elements: dict[str, Any],
    path: Path,
    uids: tuple[str, ...],
    origin: Origin | None,
    label_map: bool,
) -> list[str]:
    """Write the file: what highdicom makes of one frame, with the items and pixels of all frames in its place.

    highdicom and pydicom take some milliseconds a frame, and a scan has thousands of them. Their parts are encoded once a
    slice and once a segment here, and the masks are gone through once.

    Returns:
        The masks that others cover in part in a label map.
    """
    grids = (stored(volume, mask).transpose(2, 1, 0) for mask in masks.values())
    shape = (len(frames), elements["Rows"], elements["Columns"])
    covered: list[str] = []
    if label_map:
        labels, numbers = _labels(grids, shape, len(masks))
        covered = [name for number, name in enumerate(masks, start=1) if number in numbers]
        shown = [(0, k) for k in range(len(frames)) if labels[k].any()] or [(0, 0)]
        pixels, overlap = b"".join(labels[k].tobytes() for _, k in shown), False
    else:
        shown, pixels, overlap = _bits(grids, shape, len(masks))
    dataset = _dataset(masks, frames[shown[0][1]], elements, uids, origin, label_map)
    dataset.NumberOfFrames = len(shown)
    dataset.SegmentsOverlap = "YES" if overlap else "NO"
    if volume.source.resampling is None and len(frames) > 1:
        spacing = np.linalg.norm(volume.source.affine[:3, 2])
        measures = dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
        measures.SpacingBetweenSlices = decimals([spacing])[0]
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
    pixels += b"\0" * (len(pixels) % 2)
    dataset.save_as(path)
    with open(path, "ab") as stream:  # these two elements have the highest tags
        stream.write(struct.pack("<HH2sHI", 0x5200, 0x9230, b"SQ", 0, len(items)) + items)
        vr = b"OB" if dataset.BitsAllocated <= 8 else b"OW"
        stream.write(struct.pack("<HH2sHI", 0x7FE0, 0x0010, vr, 0, len(pixels)) + pixels)
    return covered


def _bits(
    grids: Iterable[np.ndarray], shape: tuple[int, int, int], count: int
) -> tuple[list[tuple[int, int]], bytes, bool]:
    """Segment and slice of each frame, the frames as bits, and whether two segments share a voxel.

    Args:
        grids: bool [slice, row, column] of each segment.
        shape: of a grid.
        count: of segments.
    """
    shown: list[tuple[int, int]] = []
    packed: list[bytes] = []
    rest = np.zeros(0, dtype=bool)  # frames follow each other without padding to whole bytes
    seen = np.zeros(shape, dtype=bool)
    overlap = False
    for segment, grid in enumerate(grids):
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
        shown, rest = [(segment, 0) for segment in range(count)], np.zeros(count * shape[1] * shape[2], dtype=bool)
    packed.append(np.packbits(rest, bitorder="little").tobytes())
    return shown, b"".join(packed), overlap


def _labels(grids: Iterable[np.ndarray], shape: tuple[int, int, int], count: int) -> tuple[np.ndarray, set[int]]:
    """The number of a segment in each voxel [slice, row, column], and the numbers of which later ones cover voxels."""
    labels = np.zeros(shape, np.min_scalar_type(count))
    covered: set[int] = set()
    for number, grid in enumerate(grids, start=1):
        covered.update(np.flatnonzero(np.bincount(labels[grid])).tolist())
        labels[grid] = number
    return labels, covered


def _items(
    groups: Sequence[Any], shown: Sequence[tuple[int, int]], slices: Sequence[int], frames: Sequence[Frame]
) -> bytes:
    """The items of PerFrameFunctionalGroupsSequence for the frames that are shown, each made from one of `groups`."""
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
        group.PlanePositionSequence[0].ImagePositionPatient = decimals(one.position)
        by_slice[k] = {tag: _encoded(group, tag) for tag in (derivation, position)}
    ranks = {k: number for number, k in enumerate(slices, start=1)}
    by_segment = [
        {tag: _encoded(group, tag) for tag in group.keys() if tag not in (derivation, content, position)}  # noqa: SIM118
        for group in groups
    ]
    parts = []
    for segment, k in shown:
        frame = groups[segment].FrameContentSequence[0]
        frame.DimensionIndexValues = [*np.atleast_1d(frame.DimensionIndexValues)[:-1].tolist(), ranks[k]]
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


def _dataset(
    masks: dict[str, np.ndarray],
    first: Frame,
    elements: dict[str, Any],
    uids: tuple[str, ...],
    origin: Origin | None,
    label_map: bool,
) -> Any:
    """A segmentation with one frame a segment, or one of a label map, all on one slice."""
    import highdicom as hd

    types = hd.seg.SegmentationTypeValues
    shape = (1, elements["Rows"], elements["Columns"])
    dataset = hd.seg.Segmentation(
        source_images=[plain_image(first, elements)],
        pixel_array=np.ones(shape, np.uint8) if label_map else np.ones((*shape, len(masks)), dtype=bool),
        segmentation_type=types.LABELMAP if label_map else types.BINARY,
        segment_descriptions=[_description(number, name, origin) for number, name in enumerate(masks, start=1)],
        series_instance_uid=uids[0],
        series_number=900,
        series_description=SERIES_DESCRIPTION,
        sop_instance_uid=uids[1],
        instance_number=1,
        manufacturer="ctinstruct-hf",
        manufacturer_model_name="CTInstruct, research use only",
        software_versions=__version__,
        device_serial_number="0",
        specific_character_set="ISO_IR 192",
        transfer_syntax_uid=pydicom.uid.ExplicitVRLittleEndian,
    )
    dataset.ContentCreatorName = None  # no person; it may be empty, not absent
    dataset.CodingSchemeIdentificationSequence = [private_scheme()]
    return dataset


def plain_image(one: Frame, elements: dict[str, Any]) -> pydicom.Dataset:
    """A slice as highdicom asks for it: one frame, with the plane and the spacing of all."""
    image = pydicom.Dataset()
    for keyword, value in elements.items():
        setattr(image, keyword, value)
    image.SOPClassUID = CTImageStorage
    image.SOPInstanceUID = one.sop_instance
    image.Modality = "CT"
    image.ImagePositionPatient = decimals(one.position)
    return image


def algorithm(origin: Origin | None) -> Any:
    """The model as the standard identifies an algorithm."""
    import highdicom as hd
    from highdicom.sr.coding import CodedConcept

    parameters = {"model": origin.model, "fingerprint": origin.fingerprint or "unknown"} if origin else None
    return hd.AlgorithmIdentificationSequence(
        name="ctinstruct-hf",
        version=__version__,
        family=CodedConcept("123109", "DCM", "Artificial Intelligence"),
        parameters=parameters,
    )


def _description(number: int, name: str, origin: Origin | None) -> Any:
    """One segment: its label, code, side and colour."""
    import highdicom as hd
    from highdicom.sr.coding import CodedConcept

    structure = coded(name)
    description = hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=structure.label,
        segmented_property_category=CodedConcept(structure.category[0], "SCT", structure.category[1]),
        segmented_property_type=CodedConcept(structure.code, structure.scheme, structure.meaning),
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=algorithm(origin),
        display_color=hd.color.CIELabColor.from_rgb(*rgb(number - 1)),
    )
    if structure.side:
        modifier = CodedConcept(structure.side[0], "SCT", structure.side[1])
        description.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [modifier]
    return description


__all__ = ["CODES", "algorithm", "check_dicom_seg", "plain_image", "save_dicom_seg"]
