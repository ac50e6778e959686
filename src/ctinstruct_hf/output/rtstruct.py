"""Masks as a DICOM RT Structure Set: contours on the slices of the source series, for radiotherapy.

A contour runs half-way between voxels inside and outside, so that filling it gives the mask back. A hole is joined to the
contour around it by a line there and back (the keyhole of the standard), which every reader fills alike.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.uid import ExplicitVRLittleEndian, RTStructureSetStorage

from .._version import __version__
from ..errors import CTInstructError
from ..processing.volume import CTVolume
from .codes import coded
from .colours import rgb
from .dicom_source import Frame, check_dicom, decimals, derived_uid, source_frames, writing
from .measure import stored

SERIES_DESCRIPTION = "CTInstruct structures, research use only"
_STUDY_COMPONENT = "1.2.840.10008.3.1.2.3.1"  # retired, and still what the module asks for


def check_rtstruct(volume: CTVolume) -> None:
    """Raises CTInstructError where an RTSTRUCT of this scan is impossible."""
    try:
        import contourpy  # noqa: F401
    except ImportError as error:
        raise CTInstructError("RTSTRUCT needs contourpy: pip install 'ctinstruct-hf[dicom-seg]'.") from error
    check_dicom(volume, "RTSTRUCT")


def save_rtstruct(volume: CTVolume, masks: dict[str, np.ndarray], path: Path, *, seed: str | None = None) -> list[str]:
    """Write an RT Structure Set with a region of interest per mask.

    Args:
        volume: read from a DICOM file or folder whose files are still there.
        masks: {name: bool (depth, height, width)} on the volume's grid.
        path: the file to write.
        seed: see `dicom_seg.save_dicom_seg`.

    Returns:
        What was repaired in the elements of patient and study, a sentence each.

    Raises:
        CTInstructError: where the scan is no DICOM on disk, contourpy is not installed, or it cannot be written.
    """
    check_rtstruct(volume)
    notes: list[str] = []
    with writing(volume, "RTSTRUCT"):
        frames, elements = source_frames(volume, notes)
        dataset = _head(frames, elements, seed)
        axes = np.asarray(elements["ImageOrientationPatient"], float).reshape(2, 3)
        steps = axes * np.asarray(elements["PixelSpacing"], float)[::-1, None]  # mm from column to column, row to row
        for number, (name, mask) in enumerate(masks.items(), start=1):
            _add_region(dataset, number, name, stored(volume, mask), frames, steps)
        dataset.save_as(path, enforce_file_format=True)
    return notes


def contours(plane: np.ndarray) -> Iterator[np.ndarray]:
    """Closed contours [points, 2] (column, row) of a mask bool (columns, rows), holes joined to what is around them."""
    import contourpy

    padded = np.pad(plane.T.astype(np.float32), 1)
    generator = contourpy.contour_generator(z=padded, fill_type=contourpy.FillType.OuterOffset, quad_as_tri=False)
    for points, offsets in zip(*generator.filled(0.5, 2.0), strict=True):
        rings = [points[start:end] - 1 for start, end in pairwise(offsets)]
        yield _keyhole(rings)


def _keyhole(rings: Sequence[np.ndarray]) -> np.ndarray:
    """One ring of an outer one and its holes; the last point does not repeat the first."""
    joined, *holes = (ring[:-1] for ring in rings)
    while holes:
        distances = [((joined[:, None] - hole[None]) ** 2).sum(-1) for hole in holes]
        nearest = int(np.argmin([distance.min() for distance in distances]))
        at, start = np.unravel_index(distances[nearest].argmin(), distances[nearest].shape)
        hole = np.roll(holes.pop(nearest), -int(start), axis=0)
        joined = np.concatenate([joined[: at + 1], hole, hole[:1], joined[at:]])
    return joined


def _add_region(
    dataset: Any, number: int, name: str, grid: np.ndarray, frames: Sequence[Frame], steps: np.ndarray
) -> None:
    structure = coded(name)
    region, drawn, observed = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
    region.ROINumber = drawn.ReferencedROINumber = observed.ReferencedROINumber = observed.ObservationNumber = number
    region.ReferencedFrameOfReferenceUID = dataset.FrameOfReferenceUID
    region.ROIName, region.ROIGenerationAlgorithm = structure.label, "AUTOMATIC"
    region.ROIDescription = "Research use only"
    drawn.ROIDisplayColor = list(rgb(number - 1))
    items: list[Any] = []
    for k, frame in enumerate(frames):
        for ring in contours(grid[:, :, k]) if grid[:, :, k].any() else ():
            item, image = pydicom.Dataset(), pydicom.Dataset()
            image.ReferencedSOPClassUID, image.ReferencedSOPInstanceUID = frame.sop_class, frame.sop_instance
            if frame.number is not None:
                image.ReferencedFrameNumber = frame.number
            item.ContourImageSequence = [image]
            item.ContourGeometricType, item.NumberOfContourPoints = "CLOSED_PLANAR", len(ring)
            item.ContourNumber = len(items) + 1
            item.ContourData = decimals((frame.position + ring @ steps).round(4).ravel())
            items.append(item)
    if items:  # it may be absent, not empty
        drawn.ContourSequence = items
    observed.RTROIInterpretedType = "ORGAN" if structure.category[1] == "Anatomical Structure" else ""
    observed.ROIInterpreter = ""
    code = pydicom.Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = structure.code, structure.scheme, structure.meaning
    observed.RTROIIdentificationCodeSequence = [code]
    dataset.StructureSetROISequence.append(region)
    dataset.ROIContourSequence.append(drawn)
    dataset.RTROIObservationsSequence.append(observed)


def _head(frames: Sequence[Frame], elements: dict[str, Any], seed: str | None) -> Any:
    """The structure set without regions: patient, study, device, and the series that it refers to."""
    now = datetime.datetime.now()
    instances = [frame.sop_instance for frame in frames]
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SpecificCharacterSet = "ISO_IR 192"
    for keyword, value in elements.items():
        if keyword.startswith(("Patient", "Study", "Accession", "Referring")):
            setattr(dataset, keyword, value)
    dataset.SOPClassUID = RTStructureSetStorage
    dataset.SOPInstanceUID = derived_uid(seed, "structure set", *instances)
    dataset.SeriesInstanceUID = derived_uid(seed, "structure set series", *instances)
    dataset.Modality, dataset.SeriesNumber, dataset.InstanceNumber = "RTSTRUCT", 901, 1
    dataset.SeriesDescription = SERIES_DESCRIPTION
    dataset.OperatorsName = dataset.PositionReferenceIndicator = None
    dataset.Manufacturer, dataset.ManufacturerModelName = "ctinstruct-hf", "CTInstruct, research use only"
    dataset.SoftwareVersions = __version__
    dataset.StructureSetLabel, dataset.StructureSetName = "RESEARCH ONLY", SERIES_DESCRIPTION
    dataset.StructureSetDate = dataset.InstanceCreationDate = now.strftime("%Y%m%d")
    dataset.StructureSetTime = dataset.InstanceCreationTime = now.strftime("%H%M%S")
    dataset.ApprovalStatus = "UNAPPROVED"
    dataset.FrameOfReferenceUID = elements["FrameOfReferenceUID"]
    images = []
    for instance, sop_class in {frame.sop_instance: frame.sop_class for frame in frames}.items():
        image = pydicom.Dataset()
        image.ReferencedSOPClassUID, image.ReferencedSOPInstanceUID = sop_class, instance
        images.append(image)
    series, study, place = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
    series.SeriesInstanceUID, series.ContourImageSequence = elements["SeriesInstanceUID"], images
    study.ReferencedSOPClassUID, study.ReferencedSOPInstanceUID = _STUDY_COMPONENT, elements["StudyInstanceUID"]
    study.RTReferencedSeriesSequence = [series]
    place.FrameOfReferenceUID, place.RTReferencedStudySequence = elements["FrameOfReferenceUID"], [study]
    dataset.ReferencedFrameOfReferenceSequence = [place]
    dataset.StructureSetROISequence, dataset.ROIContourSequence = [], []
    dataset.RTROIObservationsSequence = []
    return dataset


__all__ = ["check_rtstruct", "contours", "save_rtstruct"]
