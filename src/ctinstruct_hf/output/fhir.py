"""Results as a FHIR R4B bundle: a DiagnosticReport, an Observation per finding, the model as Device, and the ImagingStudy that
they refer to by its UID. No element identifies the patient."""

from __future__ import annotations

import datetime
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._version import __version__
from ..errors import CTInstructError
from ..processing.volume import CTVolume
from .codes import AGREEMENT, MEASUREMENTS, NOTICE, PRIVATE_SCHEME, REPORT, coded_finding
from .dicom_source import study_and_series
from .results import Origin, Results

_SYSTEMS = {
    "SCT": "http://snomed.info/sct",
    "DCM": "http://dicom.nema.org/resources/ontology/DCM",
    PRIVATE_SCHEME: "urn:ctinstruct-hf:private-codes-for-research-use-only",
}
# key of a finding's measurements -> UCUM unit, how the unit is written
_UNITS = {
    "probability": ("1", ""),
    "volume_ml": ("mL", "mL"),
    "diameter_mm": ("mm", "mm"),
    "mean_hu": ("[hnsf'U]", "HU"),
}


def check_fhir(volume: CTVolume) -> None:
    """Raises CTInstructError where fhir.resources is not installed."""
    try:
        import fhir.resources.R4B  # noqa: F401
    except ImportError as error:
        raise CTInstructError("FHIR needs fhir.resources: pip install 'ctinstruct-hf[pacs]'.") from error


def save_fhir(
    volume: CTVolume,
    results: Results,
    origin: Origin,
    measurements: Mapping[str, Mapping[str, Any]],
    path: Path,
    *,
    seed: str | None = None,
) -> None:
    """Write a bundle that fhir.resources has validated.

    Args:
        volume: the scan; the ImagingStudy is left out where it is no DICOM on disk.
        results: what came out.
        origin: the model.
        measurements: as in `dicom_sr.save_dicom_sr`.
        path: the file to write.
        seed: what was asked of which model: the same seed and scan give the same identifiers.

    Raises:
        CTInstructError: where fhir.resources is not installed.
    """
    check_fhir(volume)
    from fhir.resources.R4B.bundle import Bundle

    study, series = study_and_series(volume)
    names: dict[str, str] = {}

    def identify(name: str) -> str:
        text = f"{seed} {study} {series} {name}"
        names[name] = f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, text) if seed else uuid.uuid4()}"
        return names[name]

    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    resources: dict[str, dict[str, Any]] = {identify("device"): _device(origin)}
    if study is not None:
        resources[identify("study")] = _imaging_study(study, series)
    observations = []
    for name, numbers in measurements.items():
        observations.append(identify(f"finding {name}"))
        resources[observations[-1]] = _observation(name, numbers, names, now)
    report = {
        "resourceType": "DiagnosticReport",
        **_shared(now),
        "code": _concept(REPORT[0], "http://loinc.org", REPORT[1]),
        "conclusion": "\n".join([NOTICE, *([results.report] if results.report else [])]),
        "result": [{"reference": one} for one in observations],
        "resultsInterpreter": [],
        **({"imagingStudy": [{"reference": names["study"]}]} if study is not None else {}),
    }
    if results.answers:
        report["conclusion"] += "".join(
            f"\nQuestion: {question}\nAnswer: {answer}" for question, answer in results.answers
        )
    bundle = {
        "resourceType": "Bundle",
        "type": "collection",
        "timestamp": now,
        "entry": [
            {"fullUrl": url, "resource": {key: value for key, value in resource.items() if value not in ([], "")}}
            for url, resource in {identify("report"): report, **resources}.items()
        ],
    }
    path.write_text(Bundle.model_validate(bundle).model_dump_json(indent=2) + "\n", encoding="utf-8")


def _concept(code: str, system: str, text: str) -> dict[str, Any]:
    return {"coding": [{"system": _SYSTEMS.get(system, system), "code": code, "display": text}], "text": text}


def _shared(now: str) -> dict[str, Any]:
    """What a report and an observation have in common."""
    research = {
        "system": "http://terminology.hl7.org/CodeSystem/v3-ActReason",
        "code": "HRESCH",
        "display": "healthcare research",
    }
    category = {"system": "http://terminology.hl7.org/CodeSystem/observation-category", "code": "imaging"}
    return {
        "meta": {"tag": [research]},
        "status": "preliminary",
        "category": [{"coding": [category]}],
        "issued": now,
    }


def _device(origin: Origin) -> dict[str, Any]:
    version = origin.fingerprint or origin.commit or "unknown"
    return {
        "resourceType": "Device",
        "manufacturer": "ctinstruct-hf",
        "deviceName": [{"name": origin.model, "type": "model-name"}],
        "version": [{"value": f"ctinstruct-hf {__version__}"}, {"value": f"model {version}"}],
        "note": [{"text": NOTICE}],
    }


def _imaging_study(study: str, series: str | None) -> dict[str, Any]:
    modality = {"system": _SYSTEMS["DCM"], "code": "CT"}
    return {
        "resourceType": "ImagingStudy",
        "identifier": [{"system": "urn:dicom:uid", "value": f"urn:oid:{study}"}],
        "status": "available",
        "modality": [modality],
        "subject": {"display": "The patient of this imaging study"},
        "series": [{"uid": series, "modality": modality}] if series else [],
    }


def _observation(name: str, numbers: Mapping[str, Any], names: Mapping[str, str], now: str) -> dict[str, Any]:
    finding = coded_finding(name)
    components: list[dict[str, Any]] = [
        {
            "code": _concept(*MEASUREMENTS[key]),
            "valueQuantity": {
                "value": round(float(numbers[key]), 4),
                "system": "http://unitsofmeasure.org",
                "code": unit,
                **({"unit": written} if written else {}),
            },
        }
        for key, (unit, written) in _UNITS.items()
        if numbers.get(key) is not None
    ]
    if numbers.get("agreement"):
        components.append({"code": _concept(*AGREEMENT), "valueString": numbers["agreement"]})
    return {
        "resourceType": "Observation",
        **_shared(now),
        "code": {**_concept(finding.code, finding.scheme, finding.meaning), "text": finding.label},
        "device": {"reference": names["device"]},
        "note": [{"text": NOTICE}],
        "component": components,
        **({"derivedFrom": [{"reference": names["study"]}]} if "study" in names else {}),
    }


__all__ = ["check_fhir", "save_fhir"]
