"""Makes scans for tests: NIfTI in any axis order, DICOM with any trouble."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

AXIS_ORDERS = [
    "".join(codes) for axes in itertools.permutations(("LR", "PA", "IS")) for codes in itertools.product(*axes)
]


def asymmetric(shape: tuple[int, int, int] = (9, 11, 13)) -> np.ndarray:
    """HU (depth, height, width) with a bright voxel block only at the head, the back and the left."""
    hu = np.random.default_rng(0).integers(-200, 200, shape).astype(np.int16)
    hu[-2:, -3:, -4:] = 1000
    return hu


def as_nifti(hu: np.ndarray, codes: str, spacing: tuple[float, float, float] = (2.0, 1.5, 1.0)) -> nib.Nifti1Image:
    """The same patient stored in another axis order. `hu` is (toward head, back, left)."""
    depth, height, width = spacing
    affine = np.diag([-width, -height, depth, 1.0])
    affine[:3, 3] = [40, 50, -60]
    image = nib.Nifti1Image(hu.transpose(2, 1, 0), affine)
    turn = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(affine), nib.orientations.axcodes2ornt(codes)
    )
    return image.as_reoriented(turn)


def dicom_slice(pixels: np.ndarray, **tags: Any) -> FileDataset:
    """One CT slice; `pixels` are stored values, tags override the usual ones."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = tags.get("SOPClassUID", CTImageStorage)
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    defaults: dict[str, Any] = {
        "SOPClassUID": CTImageStorage,
        "SOPInstanceUID": meta.MediaStorageSOPInstanceUID,
        "Modality": "CT",
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
        "PatientName": "Secret^Name",
        "PatientID": "SECRET-ID",
        "StudyInstanceUID": "1.2.3.4",
        "SeriesInstanceUID": "1.2.3.4.5",
        "FrameOfReferenceUID": "1.2.3.4.6",
        "StudyDate": "20200101",
        "StudyTime": "120000",
        "AccessionNumber": "",
        "PatientBirthDate": "",
        "PatientSex": "",
        "ReferringPhysicianName": "",
        "StudyID": "1",
        "SeriesNumber": 1,
        "InstanceNumber": 1,
        "ImagePositionPatient": [0.0, 0.0, 0.0],
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "PixelSpacing": [1.5, 1.0],
        "SliceThickness": 2.0,
        "Rows": pixels.shape[-2],
        "Columns": pixels.shape[-1],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": 15,
        "PixelRepresentation": 1 if pixels.dtype == np.int16 else 0,
        "RescaleSlope": 1,
        "RescaleIntercept": 0,
    }
    for name, value in {**defaults, **tags}.items():
        if value is not None:
            setattr(data, name, value)
    data.PixelData = pixels.tobytes()
    return data


def save(data: FileDataset, path: Path) -> Path:
    data.save_as(path, enforce_file_format=True)
    return path


def dicom_series(
    folder: Path,
    hu: np.ndarray,
    *,
    orientation: tuple[float, ...] = (1, 0, 0, 0, 1, 0),
    step: tuple[float, float, float] | None = None,
    positions: list[np.ndarray] | None = None,
    **tags: Any,
) -> Path:
    """A folder of slices hu[k], written in a shuffled order under names that say nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    normal = np.cross(orientation[:3], orientation[3:])
    order = np.random.default_rng(1).permutation(len(hu))
    for number, k in enumerate(order):
        place = (
            positions[k]
            if positions is not None
            else np.array([-30.0, -40.0, 10.0]) + k * np.array(step or 2.0 * normal)
        )
        extra = {
            name: value[k] if isinstance(value, list) and len(value) == len(hu) else value
            for name, value in tags.items()
        }
        data = dicom_slice(
            np.ascontiguousarray(hu[k]),
            ImagePositionPatient=[float(round(v, 5)) for v in place],
            ImageOrientationPatient=list(orientation),
            InstanceNumber=int(number + 1),
            **extra,
        )
        save(data, folder / f"IM{number:04d}")
    return folder


def enhanced(hu: np.ndarray, path: Path) -> Path:
    """One enhanced multi-frame CT with its frames from the head down."""
    data = dicom_slice(
        np.ascontiguousarray(hu[::-1]), SOPClassUID="1.2.840.10008.5.1.4.1.1.2.1", NumberOfFrames=len(hu)
    )
    for name in (
        "ImagePositionPatient",
        "ImageOrientationPatient",
        "PixelSpacing",
        "SliceThickness",
        "RescaleSlope",
        "RescaleIntercept",
    ):
        delattr(data, name)
    measures, orientation, rescale = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
    measures.PixelSpacing, measures.SliceThickness = [1.5, 1.0], 2.0
    orientation.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    rescale.RescaleSlope, rescale.RescaleIntercept = 1, 0
    shared = pydicom.Dataset()
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [orientation]
    shared.PixelValueTransformationSequence = [rescale]
    data.SharedFunctionalGroupsSequence = [shared]
    frames = []
    for k in range(len(hu))[::-1]:
        place = pydicom.Dataset()
        place.ImagePositionPatient = [0.0, 0.0, 2.0 * k]
        group = pydicom.Dataset()
        group.PlanePositionSequence = [place]
        frames.append(group)
    data.PerFrameFunctionalGroupsSequence = frames
    return save(data, path)
