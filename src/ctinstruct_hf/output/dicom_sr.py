"""Results as DICOM structured reports (highdicom): measurements of every finding (TID 1500), and the text (TID 2000).

The measurement report has a group per finding, which refers to the segment of the DICOM SEG and to the slices that it lies
on. Codes are of SNOMED CT, DICOM and UCUM where they exist, else of a private scheme that says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom

from .._version import __version__
from ..errors import CTInstructError
from ..processing.volume import CTVolume
from .codes import (
    AGREEMENT,
    MEASUREMENTS,
    NOTICE,
    PRIVATE_SCHEME,
    REPORT,
    coded,
    coded_finding,
    plain_words,
    private_scheme,
)
from .dicom_seg import plain_image
from .dicom_source import Frame, check_dicom, derived_uid, source_frames, writing
from .measure import stored
from .results import Origin, Results

# key of a finding's measurements -> factor, (unit, its meaning), derivation
_UNITS: dict[str, tuple[float, tuple[str, str], tuple[str, str] | None]] = {
    "probability": (1, ("1", "no units"), None),
    "volume_ml": (1000, ("mm3", "cubic millimeter"), None),
    "diameter_mm": (1, ("mm", "millimeter"), ("56851009", "Maximum")),
    "mean_hu": (1, ("[hnsf'U]", "Hounsfield unit"), ("373098007", "Mean")),
}
_AGREEMENTS = {
    "consistent": ("CTI-CONSISTENT", "Sources agree"),
    "contradictory": ("CTI-CONTRADICT", "Sources contradict each other"),
    "unchecked": ("CTI-UNCHECKED", "Fewer than two sources"),
}


def check_dicom_sr(volume: CTVolume) -> None:
    """Raises CTInstructError where a DICOM SR about this scan is impossible."""
    try:
        import highdicom  # noqa: F401
    except ImportError as error:
        raise CTInstructError("DICOM SR needs highdicom: pip install 'ctinstruct-hf[dicom-seg]'.") from error
    check_dicom(volume, "DICOM SR")


@dataclass
class _Source:
    """What every document refers to."""

    frames: list[Frame]
    elements: dict[str, Any]
    origin: Origin
    seed: str | None

    def images(self) -> list[pydicom.Dataset]:
        """An item of evidence for each file of the scan."""
        files = {frame.sop_instance: frame for frame in self.frames}
        images = [plain_image(frame, self.elements) for frame in files.values()]
        for image, frame in zip(images, files.values(), strict=True):
            image.SOPClassUID = frame.sop_class
        return images

    def uid(self, purpose: str) -> str:
        return derived_uid(self.seed, purpose, *(frame.sop_instance for frame in self.frames))


def save_dicom_sr(
    volume: CTVolume,
    results: Results,
    origin: Origin,
    measurements: Mapping[str, Mapping[str, Any]],
    folder: Path,
    *,
    segmentation: Path | None = None,
    seed: str | None = None,
) -> list[str]:
    """Write `measurements.dcm`, where there is a mask or a probability, and `report.dcm`, where there is text.

    Args:
        volume: read from a DICOM file or folder whose files are still there.
        results: what came out.
        origin: the model, which is the observer of the documents.
        measurements: {name: any of probability, volume_ml, diameter_mm, mean_hu, agreement (consistent, contradictory or
            unchecked)} of masks and findings.
        folder: new, to write into.
        segmentation: the DICOM SEG of `results.masks`.
        seed: see `dicom_seg.save_dicom_seg`.

    Returns:
        What was repaired in the elements of patient and study, a sentence each.

    Raises:
        CTInstructError: where the scan is no DICOM on disk, highdicom is not installed, or they cannot be written.
    """
    check_dicom_sr(volume)
    notes: list[str] = []
    with writing(volume, "DICOM SR"):
        folder.mkdir()
        source = _Source(*source_frames(volume, notes), origin, seed)
        if measurements:
            _measurement_report(volume, results, measurements, source, segmentation).save_as(
                folder / "measurements.dcm"
            )
        if results.report or results.answers:
            _text_report(results, source).save_as(folder / "report.dcm")
    return notes


def _concept(code: str, scheme: str, meaning: str) -> Any:
    from highdicom.sr.coding import CodedConcept

    return CodedConcept(code, scheme, meaning[:64])


def _observer(source: _Source) -> Any:
    """The device that observed: the model, by its name and the fingerprint of its files."""
    import highdicom.sr as sr

    origin = source.origin
    uid = derived_uid(f"{origin.model} {origin.fingerprint}", "device", __version__)
    device = sr.DeviceObserverIdentifyingAttributes(
        uid=uid,
        name=f"ctinstruct-hf {__version__}, research use only",
        manufacturer_name="ctinstruct-hf",
        model_name=origin.model,
        serial_number=origin.fingerprint or origin.commit or "unknown",
    )
    return sr.ObservationContext(
        observer_device_context=sr.ObserverContext(_concept("121007", "DCM", "Device"), device)
    )


def _measurement_report(
    volume: CTVolume,
    results: Results,
    measurements: Mapping[str, Mapping[str, Any]],
    source: _Source,
    segmentation: Path | None,
) -> Any:
    import highdicom.sr as sr

    images = source.images()
    evidence = list(images)
    segment_numbers: dict[str, int] = {}
    if segmentation is not None:
        evidence.append(pydicom.dcmread(segmentation, stop_before_pixels=True))
        segment_numbers = {name: number for number, name in enumerate(results.masks, start=1)}
    groups = []
    for name, numbers in measurements.items():
        segment = None
        if name in segment_numbers:
            seg = evidence[-1]
            segment = _segment(seg, segment_numbers[name], stored(volume, results.masks[name]), source)
        groups.append(_group(name, numbers, segment, source))
    content = sr.MeasurementReport(
        observation_context=_observer(source),
        procedure_reported=_concept("77477000", "SCT", "Computed tomography"),
        imaging_measurements=groups,
        title=_concept("126000", "DCM", "Imaging Measurement Report"),
        referenced_images=images,
    )
    content[0].ContentSequence.append(_text("121106", "Comment", NOTICE))
    return _document(content, evidence, source, "measurements", "CTInstruct measurements, research use only", 902)


def _segment(segmentation: Any, number: int, grid: np.ndarray, source: _Source) -> Any:
    """A reference to a segment and to the slices that it lies on; to all slices where it is empty."""
    import highdicom.sr as sr

    inside = np.flatnonzero(grid.any(axis=(0, 1)))
    frames = [source.frames[k] for k in (inside if inside.size else range(len(source.frames)))]
    numbers: dict[tuple[str, str], list[int]] = {}
    for frame in frames:
        numbers.setdefault((frame.sop_class, frame.sop_instance), []).extend([frame.number] if frame.number else [])
    return sr.ReferencedSegment(
        str(segmentation.SOPClassUID),
        str(segmentation.SOPInstanceUID),
        number,
        source_images=[
            sr.SourceImageForSegmentation(sop_class, instance, listed or None)
            for (sop_class, instance), listed in numbers.items()
        ],
    )


def _group(name: str, numbers: Mapping[str, Any], segment: Any, source: _Source) -> Any:
    """One finding: what was measured of it, its segment, and whether what is said about it agrees."""
    import highdicom.sr as sr

    algorithm = sr.AlgorithmIdentification(
        name="ctinstruct-hf",
        version=__version__,
        parameters=[f"model={source.origin.model}", f"fingerprint={source.origin.fingerprint or 'unknown'}"],
    )
    finding = coded_finding(name)
    listed = [
        sr.Measurement(
            _concept(*MEASUREMENTS[key]),
            round(float(numbers[key]) * factor, 4),
            _concept(unit[0], "UCUM", unit[1]),
            derivation=None if derivation is None else _concept(derivation[0], "SCT", derivation[1]),
            algorithm_id=algorithm,
        )
        for key, (factor, unit, derivation) in _UNITS.items()
        if numbers.get(key) is not None
    ]
    evaluations = []
    if numbers.get("agreement") in _AGREEMENTS:
        code, meaning = _AGREEMENTS[numbers["agreement"]]
        verdict = _concept(code, PRIVATE_SCHEME, meaning)
        evaluations.append(sr.QualitativeEvaluation(_concept(*AGREEMENT), verdict))
    structure = coded(name)
    sites = []
    if structure.side is not None:
        side = _concept(structure.side[0], "SCT", structure.side[1])
        sites.append(sr.FindingSite(_concept(structure.code, structure.scheme, structure.meaning), laterality=side))
    shared: dict[str, Any] = {
        "tracking_identifier": sr.TrackingIdentifier(source.uid(f"finding {name}"), finding.label),
        "finding_type": _concept(finding.code, finding.scheme, finding.meaning),
        "algorithm_id": algorithm,
        "finding_sites": sites or None,
        "measurements": listed or None,
        "qualitative_evaluations": evaluations or None,
    }
    if segment is None:
        return sr.MeasurementsAndQualitativeEvaluations(**shared)
    return sr.VolumetricROIMeasurementsAndQualitativeEvaluations(referenced_segment=segment, **shared)


def _text(code: str, meaning: str, text: str, scheme: str = "DCM") -> Any:
    import highdicom.sr as sr

    return sr.TextContentItem(_concept(code, scheme, meaning), text, relationship_type="CONTAINS")


def _text_report(results: Results, source: _Source) -> Any:
    """The report and the answered questions as text under headings."""
    import highdicom.sr as sr

    report = sr.ContainerContentItem(_concept(REPORT[0], "LN", REPORT[1]), template_id="2000")
    content = sr.ContentSequence()
    content.extend(_observer(source))
    findings = sr.ContainerContentItem(_concept("121070", "DCM", "Findings"), relationship_type="CONTAINS")
    texts = sr.ContentSequence()
    texts.append(_text("121106", "Comment", NOTICE))
    if results.report:
        texts.append(_text("121071", "Finding", results.report))
    for question, answer in results.answers:
        code = ("CTI-ANSWER", "Answer of the model to a question", f"Question: {question}\nAnswer: {answer}")
        texts.append(_text(*code, PRIVATE_SCHEME))
    findings.ContentSequence = texts
    content.append(findings)
    report.ContentSequence = content
    return _document(report, source.images(), source, "report", "CTInstruct report, research use only", 903)


def _document(content: Any, evidence: Sequence[Any], source: _Source, name: str, description: str, number: int) -> Any:
    import highdicom.sr as sr

    document = sr.ComprehensiveSR(
        evidence=list(evidence),
        content=content if isinstance(content, pydicom.Dataset) else content[0],
        series_instance_uid=source.uid(f"{name} series"),
        series_number=number,
        sop_instance_uid=source.uid(name),
        instance_number=1,
        manufacturer="ctinstruct-hf",
        is_complete=True,
        series_description=description,
        manufacturer_model_name="CTInstruct, research use only",
        software_versions=__version__,
        device_serial_number="0",
    )
    document.SpecificCharacterSet = "ISO_IR 192"
    document.CodingSchemeIdentificationSequence = [private_scheme()]
    return document


def findings_of(results: Results, measures: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What `save_dicom_sr` is given: the measurements of every mask, with the probability and agreement of the finding of
    that name, and the findings that have no mask.

    Args:
        results: what came out; where it has a table of findings, their measurements and agreement are taken from it.
        measures: {name: what was measured} of the masks.
    """
    found = {name: dict(numbers) for name, numbers in measures.items()}
    by_words = {plain_words(name): name for name in found}

    def numbers_of(name: str) -> dict[str, Any]:
        return found.setdefault(by_words.setdefault(plain_words(name), name), {})

    for name, probability in results.diagnosis.items():
        numbers_of(name)["probability"] = probability
    for name, row in results.findings.items():
        numbers = numbers_of(name)
        numbers.update({key: value for key, value in (row["mask"] or {}).items() if value is not None})
        if row["probability"] is not None:
            numbers["probability"] = row["probability"]
        agreed = row["agreement"]
        numbers["agreement"] = agreed if agreed in _AGREEMENTS else "contradictory"
    return found


__all__ = ["check_dicom_sr", "findings_of", "save_dicom_sr"]
