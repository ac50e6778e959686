"""DICOM images in space: a slice per file or frame, with the marks that differ between image stacks of a series."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .volume import CTInstructError, last_line
from .volume_headers import integer, numbers, text


@dataclass(eq=False)
class Slice:
    """An axial, coronal or sagittal image in space; `frame` counts within a multi-frame file.

    Attributes:
        position: [3], mm (LPS) of the first pixel's centre, None where the file has none.
        orientation: [2, 3], unit vectors along a row and along a column, None where the file has none.
        pixel_spacing: mm between rows and between columns, None where the file has none.
        marks: {name: value} of what differs between images of different stacks.
    """

    path: Path
    header: Any = field(repr=False)  # both it and the marks name the patient
    position: Any
    orientation: Any
    pixel_spacing: tuple[float, float] | None
    thickness: float | None
    slope: float | None
    intercept: float | None
    unit: str
    marks: dict[str, str] = field(repr=False)
    frame: int = 0

    def along(self, normal: np.ndarray) -> float:
        """mm along a direction."""
        return float(self.position @ normal)


def slices_of(file: Path, header: Any) -> list[Slice]:
    """The images of a file, one per frame."""
    if integer(header, "SamplesPerPixel", 1) != 1 or text(header, "PhotometricInterpretation") == "PALETTE COLOR":
        raise CTInstructError(f"{file.name} is a colour image: expected CT in HU.")
    if header.get("ModalityLUTSequence"):
        raise CTInstructError(f"{file.name} has a table (Modality LUT) instead of a rescale to HU: it cannot be read.")
    if integer(header, "Rows") < 1 or integer(header, "Columns") < 1:
        raise CTInstructError(f"{file.name} has no pixels.")
    frames = integer(header, "NumberOfFrames", 1)
    shared = (header.get("SharedFunctionalGroupsSequence") or [None])[0]
    groups = header.get("PerFrameFunctionalGroupsSequence") or ([] if shared is None or frames > 1 else [{}])
    if frames > 1 and len(groups) != frames:
        raise CTInstructError(f"{file.name} has {frames} frames but positions for {len(groups)}.")
    if not groups:
        return [_slice(file, header, {}, 0)]
    slices = []
    for index, group in enumerate(groups):
        parts = {}
        for name in _GROUPS:
            sequence = group.get(name) or (shared.get(name) if shared is not None else None)
            if sequence:
                parts[name] = sequence[0]
        slices.append(_slice(file, header, parts, index))
    return slices


_GROUPS = (
    "PlanePositionSequence",
    "PlaneOrientationSequence",
    "PixelMeasuresSequence",
    "PixelValueTransformationSequence",
    "FrameContentSequence",
    "CTReconstructionSequence",
    "CTXRayDetailsSequence",
    "CTImageFrameTypeSequence",
    "CardiacSynchronizationSequence",
)


def _slice(file: Path, header: Any, parts: dict[str, Any], frame: int) -> Slice:
    """A slice from a header, or from the functional groups of a frame."""
    measures = parts.get("PixelMeasuresSequence", header)
    rescale = parts.get("PixelValueTransformationSequence", header)
    try:
        position = np.array(numbers(parts.get("PlanePositionSequence", header), "ImagePositionPatient"))
        axes = np.array(numbers(parts.get("PlaneOrientationSequence", header), "ImageOrientationPatient"))
        spacing = numbers(measures, "PixelSpacing")
        thickness = next(iter(numbers(measures, "SliceThickness") or numbers(measures, "SpacingBetweenSlices")), 0.0)
        slope = next(iter(numbers(rescale, "RescaleSlope")), None)
        intercept = next(iter(numbers(rescale, "RescaleIntercept")), None)
    except (TypeError, ValueError) as error:
        raise CTInstructError(f"{file.name} has a broken position, spacing or rescale: {last_line(error)}") from error
    if len(position) not in (0, 3) or len(axes) not in (0, 6) or not np.isfinite([*position, *axes]).all():
        raise CTInstructError(f"{file.name} has a broken position or orientation.")
    orientation = None
    if len(axes):
        row, column = axes[:3], axes[3:]
        lengths = np.linalg.norm(row), np.linalg.norm(column)
        if min(lengths) < 0.5 or abs(row @ column) > 0.05:
            raise CTInstructError(f"{file.name} has a broken orientation {axes.tolist()}.")
        orientation = np.stack([row / lengths[0], column / lengths[1]])
    return Slice(
        file,
        header,
        position if len(position) else None,
        orientation,
        (spacing[0], spacing[1]) if len(spacing) == 2 and min(spacing) > 0 and np.isfinite(spacing).all() else None,
        thickness if 0 < thickness < float("inf") else None,
        slope,
        intercept,
        text(rescale, "RescaleType"),
        _marks(header, parts),
        frame,
    )


def _marks(header: Any, parts: dict[str, Any]) -> dict[str, str]:
    content = parts.get("FrameContentSequence", {})
    kernel = text(parts.get("CTReconstructionSequence", header), "ConvolutionKernel")
    measures = parts.get("PixelMeasuresSequence", header)
    image_type = parts.get("CTImageFrameTypeSequence")
    try:
        thickness = f"{(numbers(measures, 'SliceThickness') or [0.0])[0]:.1f} mm"
    except ValueError:
        thickness = ""
    return {
        # a patient and a frame of reference are counted, not named
        "patient": text(header, "PatientID") or text(header, "PatientName"),
        "frame of reference": text(header, "FrameOfReferenceUID"),
        "stack": str(content.get("StackID", "")),
        "temporal position": str(content.get("TemporalPositionIndex", ""))
        or text(header, "TemporalPositionIdentifier"),
        "kernel": kernel,
        "acquisition": str(content.get("FrameAcquisitionNumber", "")) or text(header, "AcquisitionNumber"),
        "number": text(header, "SeriesNumber"),
        "description": text(header, "SeriesDescription"),
        "image type": text(header, "ImageType") if image_type is None else text(image_type, "FrameType"),
        "thickness": thickness,
        "tube voltage": text(parts.get("CTXRayDetailsSequence", header), "KVP"),
        "cardiac phase": text(parts.get("CardiacSynchronizationSequence", header), "NominalPercentageOfCardiacPhase"),
    }
