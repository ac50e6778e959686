"""Masks as one DICOM segmentation object that references the series they were made on (highdicom).

The standard ties a segmentation to its patient and study: the elements that it asks for (`_EXPECTED`) are all that is copied
from the source slices. highdicom alone would copy a patient's history, alerts and much else.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pydicom

from .. import __version__
from ..errors import CTInstructError
from ..processing.volume import CTVolume
from ..processing.volume_series import HEADER_TAGS

# name -> (SNOMED CT code, meaning, category); anatomy unless said otherwise
_ANATOMY = ("123037004", "Anatomical Structure")
_ABNORMAL = ("49755003", "Morphologically Abnormal Structure")
CODES: dict[str, tuple[str, str, tuple[str, str]]] = {
    "body": ("38266002", "Entire body", _ANATOMY),
    "lungs": ("39607008", "Lung", _ANATOMY),
    "right lung": ("3341006", "Right lung", _ANATOMY),
    "left lung": ("44029006", "Left lung", _ANATOMY),
    "trachea": ("44567001", "Trachea", _ANATOMY),
    "heart": ("80891009", "Heart", _ANATOMY),
    "aorta": ("15825003", "Aorta", _ANATOMY),
    "esophagus": ("32849002", "Esophagus", _ANATOMY),
    "liver": ("10200004", "Liver", _ANATOMY),
    "spleen": ("78961009", "Spleen", _ANATOMY),
    "stomach": ("69695003", "Stomach", _ANATOMY),
    "pancreas": ("15776009", "Pancreas", _ANATOMY),
    "kidneys": ("64033007", "Kidney", _ANATOMY),
    "right kidney": ("9846003", "Right kidney", _ANATOMY),
    "left kidney": ("18639004", "Left kidney", _ANATOMY),
    "urinary bladder": ("89837001", "Urinary bladder", _ANATOMY),
    "spine": ("421060004", "Vertebral column", _ANATOMY),
    "ribs": ("113197003", "Rib", _ANATOMY),
    "sternum": ("56873002", "Sternum", _ANATOMY),
    "bones": ("272673000", "Bone", _ANATOMY),
    "muscle": ("91727004", "Muscle", _ANATOMY),
    "subcutaneous fat": ("67769000", "Subcutaneous fatty tissue", _ANATOMY),
    "lung nodule": ("27925004", "Nodule", _ABNORMAL),
    "pleural effusion": ("41699000", "Effusion", _ABNORMAL),
    "pericardial effusion": ("41699000", "Effusion", _ABNORMAL),
    "liver lesion": ("52988006", "Lesion", _ABNORMAL),
    "kidney stone": ("56381008", "Calculus", _ABNORMAL),
    "lymphadenopathy": ("30746006", "Lymphadenopathy", _ABNORMAL),
}


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
def save_dicom_seg(volume: CTVolume, masks: dict[str, np.ndarray], path: Path) -> None:
    """Write a binary DICOM SEG with a segment per mask, on the frames of the source series.

    Args:
        volume: read from a DICOM file or folder whose files are still there.
        masks: {name: bool (depth, height, width)} on the volume's grid.
        path: the file to write.

    Raises:
        CTInstructError: where the scan is no DICOM, is a zip, or highdicom is not installed.
    """
    try:
        import highdicom as hd
        from highdicom.sr.coding import CodedConcept
    except ImportError as error:
        raise CTInstructError("DICOM SEG needs highdicom: pip install 'ctinstruct-hf[dicom-seg]'.") from error
    files = volume.source.dicom_files
    if volume.source.kind != "dicom" or not files:
        raise CTInstructError(
            f"{volume.source.name or 'The scan'} is no DICOM series on disk: DICOM SEG references one."
        )
    wanted: Any = [*HEADER_TAGS, *_EXPECTED, "SOPInstanceUID"]
    slices: list[Any] = [
        pydicom.dcmread(file, stop_before_pixels=True, specific_tags=wanted) for file in dict.fromkeys(files)
    ]
    for one in slices:
        if not one.get("SOPClassUID"):
            one.SOPClassUID, one.SOPInstanceUID = (
                one.file_meta.MediaStorageSOPClassUID,
                one.file_meta.MediaStorageSOPInstanceUID,
            )
        for name in _EXPECTED:
            if name not in one:
                setattr(one, name, None if name != "StudyInstanceUID" else pydicom.uid.generate_uid())
        if not one.get("FrameOfReferenceUID"):
            raise CTInstructError(f"{volume.source.name} has no frame of reference: DICOM SEG cannot be placed in it.")
    stored = [
        np.asarray(volume.to_source(mask.astype(np.uint8)).dataobj).transpose(2, 1, 0) > 0 for mask in masks.values()
    ]
    pixels = np.stack(stored, axis=-1)  # (frames, rows, columns, segments)
    descriptions = []
    for number, name in enumerate(masks, start=1):
        code, meaning, category = CODES.get(name, ("", name, _ANATOMY))
        concept = (
            CodedConcept(code, "SCT", meaning) if code else CodedConcept(f"CTI{number}", "99CTINSTRUCT", name[:64])
        )
        descriptions.append(
            hd.seg.SegmentDescription(
                segment_number=number,
                segment_label=name[:64],
                segmented_property_category=CodedConcept(category[0], "SCT", category[1]),
                segmented_property_type=concept,
                algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
                algorithm_identification=hd.AlgorithmIdentificationSequence(
                    name="ctinstruct-hf",
                    version=__version__,
                    family=CodedConcept("123109", "DCM", "Artificial Intelligence"),
                ),
            )
        )
    segmentation = hd.seg.Segmentation(
        source_images=slices,
        pixel_array=pixels,
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=descriptions,
        series_instance_uid=hd.UID(),
        series_number=900,
        sop_instance_uid=hd.UID(),
        instance_number=1,
        manufacturer="ctinstruct-hf",
        manufacturer_model_name="CTInstruct, research use only",
        software_versions=__version__,
        device_serial_number="0",
        omit_empty_frames=bool(pixels.any()),
    )
    segmentation.save_as(path)


# type 2 attributes that highdicom reads from the source: empty is allowed, absent is not
_EXPECTED = (
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "StudyInstanceUID",
    "StudyID",
    "StudyDate",
    "StudyTime",
    "AccessionNumber",
    "ReferringPhysicianName",
)


__all__ = ["CODES", "save_dicom_seg"]
