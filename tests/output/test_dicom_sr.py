"""DICOM SR and FHIR: what was found, with codes, segments, slices and the model, as validators and readers take it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from scans import asymmetric, dicom_series, enhanced

from ctinstruct_hf import CTInstructError, Study, read_volume
from ctinstruct_hf.inference.agreement import agreement
from ctinstruct_hf.output.codes import FINDINGS
from ctinstruct_hf.output.dicom_seg import save_dicom_seg
from ctinstruct_hf.output.dicom_sr import NOTICE, findings_of, save_dicom_sr
from ctinstruct_hf.output.measure import measure
from ctinstruct_hf.output.results import Origin, Results
from ctinstruct_hf.output.rtstruct import save_rtstruct
from ctinstruct_hf.phantoms import phantom_of

hd = pytest.importorskip("highdicom", reason="highdicom is not installed")
ORIGIN = Origin("tiny-model", fingerprint="ab" * 32)


def written(folder: Path, source: str = "plain") -> tuple[Any, Results]:
    """SEG, RTSTRUCT and SR of a scan with four structures, one of which is empty, and three probabilities."""
    hu = asymmetric((6, 12, 10))
    if source == "enhanced":
        volume = read_volume(enhanced(hu, folder / "e.dcm"))
    else:
        tilt = {"step": (0.0, 0.3, 2.0)} if source == "tilted" else {}
        volume = read_volume(dicom_series(folder / "ct", hu, **tilt))
    masks = {
        "right lung": volume.hu < -100,
        "lung nodule": volume.hu > 500,
        "spleen": np.zeros(volume.shape, bool),
        "structure of no code": volume.hu == volume.hu[0, 0, 0],
    }
    diagnosis = {"Lung_nodule": 0.25, "emphysema": 0.75, "something else": 0.5}
    results = Results("No emphysema. Größe 3 mm.", [("Is there a nodule?", "Yes.")], diagnosis, masks)
    measures = {name: measure(volume, mask) for name, mask in masks.items()}
    measures["lung nodule"] |= {"diameter_mm": 8.5, "agreement": "contradictory"}
    save_dicom_seg(volume, masks, folder / "seg.dcm", seed="asked", origin=ORIGIN)
    save_rtstruct(volume, masks, folder / "rt.dcm", seed="asked")
    found = findings_of(results, measures)
    save_dicom_sr(volume, results, ORIGIN, found, folder / "sr", segmentation=folder / "seg.dcm", seed="asked")
    return volume, results


# what a dciodvfy that is older than label maps says of every one
UNKNOWN = ("Error - Information Object Not found", "Error - SegmentNumber not monotonically increasing from one by one")


@pytest.mark.parametrize("source", ["plain", "enhanced", "tilted"])
def test_the_validator_of_dicom3tools_finds_no_error(tmp_path: Path, source: str) -> None:
    if shutil.which("dciodvfy") is None:
        pytest.skip("dciodvfy is not installed: scripts/install_pacs.sh")
    volume, results = written(tmp_path, source)
    save_dicom_seg(volume, results.masks, tmp_path / "label_map.dcm", label_map=True, origin=ORIGIN)
    for file in ("seg.dcm", "label_map.dcm", "rt.dcm", "sr/measurements.dcm", "sr/report.dcm"):
        done = subprocess.run(["dciodvfy", tmp_path / file], capture_output=True, text=True, check=False)
        errors = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("Error")]
        if file == "label_map.dcm":
            errors = [line for line in errors if not line.startswith(UNKNOWN)]
        else:
            assert done.returncode == 0, file
        assert errors == [], file


def content(item: Any, name: str) -> list[Any]:
    """Items of a content tree by the meaning of their name."""
    found = [
        child
        for child in item.get("ContentSequence", [])
        if child.ConceptNameCodeSequence[0].CodeMeaning.lower() == name.lower()
    ]
    return found + [deeper for child in item.get("ContentSequence", []) for deeper in content(child, name)]


def code(item: Any) -> tuple[str, str]:
    return item.CodeValue, item.CodingSchemeDesignator


def numbers(group: Any) -> dict[str, tuple[float, str]]:
    found = {}
    for item in group.ContentSequence:
        if item.ValueType == "NUM":
            value = item.MeasuredValueSequence[0]
            unit = value.MeasurementUnitsCodeSequence[0].CodeValue
            found[item.ConceptNameCodeSequence[0].CodeMeaning] = float(value.NumericValue), unit
    return found


def test_a_group_a_finding_with_its_numbers_codes_segment_and_slices(tmp_path: Path) -> None:
    volume, results = written(tmp_path)
    report = hd.sr.srread(tmp_path / "sr" / "measurements.dcm")
    groups = {content(one, "Tracking Identifier")[0].TextValue: one for one in content(report, "Measurement Group")}
    assert list(groups) == [*results.masks, "emphysema", "something else"]
    nodule = groups["lung nodule"]
    inside = results.masks["lung nodule"]
    volume_ml = measure(volume, inside)["volume_ml"]
    assert numbers(nodule) == {
        "Probability": (0.25, "1"),
        "Volume": (pytest.approx(1000 * volume_ml), "mm3"),
        "Diameter": (8.5, "mm"),
        "Attenuation Coefficient": (1000.0, "[hnsf'U]"),
    }
    assert agreement_of(nodule) == ("CTI-CONTRADICT", "99CTINSTRUCT")
    segment = content(nodule, "Referenced Segment")[0].ReferencedSOPSequence[0]
    seg = pydicom.dcmread(tmp_path / "seg.dcm")
    assert segment.ReferencedSOPInstanceUID == seg.SOPInstanceUID
    assert seg.SegmentSequence[segment.ReferencedSegmentNumber - 1].SegmentLabel == "lung nodule"
    slices = [
        one.ReferencedSOPSequence[0].ReferencedSOPInstanceUID
        for one in content(nodule, "Source image for segmentation")
    ]
    files = [volume.source.dicom_files[k] for k in np.flatnonzero(inside.any(axis=(1, 2)))]
    assert slices == [pydicom.dcmread(file).SOPInstanceUID for file in files]
    codes = {name: code(content(one, "Finding")[0].ConceptCodeSequence[0]) for name, one in groups.items()}
    assert codes["spleen"] == ("78961009", "SCT")
    assert codes["emphysema"] == (FINDINGS["emphysema"][0], "SCT")
    assert codes["something else"][1] == "99CTINSTRUCT"
    assert numbers(groups["emphysema"]) == {"Probability": (0.75, "1")}
    side = content(groups["right lung"], "Laterality")[0].ConceptCodeSequence[0]
    assert side.CodeMeaning == "Right"
    scheme = report.CodingSchemeIdentificationSequence[0]
    assert (scheme.CodingSchemeDesignator, "rivate" in scheme.CodingSchemeName) == ("99CTINSTRUCT", True)


def test_dcmqi_reads_the_groups_with_their_numbers_and_segments(tmp_path: Path) -> None:
    reader = shutil.which("tid1500reader") or Path(sys.executable).with_name("tid1500reader")
    if not Path(reader).exists():
        pytest.skip("dcmqi is not installed: pip install dcmqi")
    _, results = written(tmp_path)
    command = [reader, "--inputDICOM", tmp_path / "sr" / "measurements.dcm", "--outputMetadata", tmp_path / "read.json"]
    subprocess.run(command, check=True, capture_output=True)
    read = json.loads((tmp_path / "read.json").read_text())
    groups = {group["TrackingIdentifier"]: group for group in read["Measurements"]}
    assert [group.get("ReferencedSegment") for group in groups.values()] == [1, 2, 3, 4, None, None]
    assert list(groups)[:4] == list(results.masks)
    items = {item["quantity"]["CodeMeaning"]: item for item in groups["lung nodule"]["measurementItems"]}
    assert {name: (float(item["value"]), item["units"]["CodeValue"]) for name, item in items.items()} == numbers(
        content(hd.sr.srread(tmp_path / "sr" / "measurements.dcm"), "Measurement Group")[1]
    )
    assert read["observerContext"]["DeviceObserverSerialNumber"] == "ab" * 32


def test_a_table_of_findings_gives_size_probability_and_agreement_to_the_mask_of_that_name() -> None:
    results: Any = Results(diagnosis={"emphysema": 0.5})
    mask = {"volume_ml": 2.0, "diameter_mm": 9.5, "mean_hu": None}
    results.findings = {
        "Lung_nodule": {"probability": 0.8, "mask": mask, "agreement": "consistent"},
        "emphysema": {"probability": 0.6, "mask": None, "agreement": "present by probability; absent by report"},
        "cyst": {"probability": None, "mask": None, "agreement": "unchecked"},
    }
    assert findings_of(results, {"lung nodule": {"volume_ml": 1.0, "mean_hu": 40.0}}) == {
        "lung nodule": {
            "volume_ml": 2.0,
            "mean_hu": 40.0,
            "diameter_mm": 9.5,
            "probability": 0.8,
            "agreement": "consistent",
        },
        "emphysema": {"probability": 0.6, "agreement": "contradictory"},
        "cyst": {"agreement": "unchecked"},
    }


def agreement_of(group: Any) -> tuple[str, str]:
    """The code of whether what is said about a finding agrees."""
    (item,) = (one for one in group.ContentSequence if "Agreement" in str(one.get("ConceptNameCodeSequence")))
    return code(item.ConceptCodeSequence[0])


AGREEMENTS: dict[str, dict[str, Any]] = {
    "CTI-CONSISTENT": {"report": "absent", "probability": 0.1},
    "CTI-CONTRADICT": {"report": "absent", "probability": 0.9, "mask": 7},
    "CTI-UNCHECKED": {"report": "not mentioned", "mask": 0},
}


def test_every_verdict_about_a_finding_has_its_code(tmp_path: Path) -> None:
    volume = read_volume(dicom_series(tmp_path / "ct", asymmetric((4, 12, 10))))
    rows = {
        name: {"mask": None, "probability": says.get("probability"), "agreement": str(agreement(**says))}
        for name, says in AGREEMENTS.items()
    }
    results = Results(findings=rows)
    save_dicom_sr(volume, results, ORIGIN, findings_of(results, {}), tmp_path / "sr")
    report = hd.sr.srread(tmp_path / "sr" / "measurements.dcm")
    codes = {
        content(one, "Tracking Identifier")[0].TextValue: agreement_of(one)
        for one in content(report, "Measurement Group")
    }
    assert codes == {name: (name, "99CTINSTRUCT") for name in AGREEMENTS}


def test_the_table_of_the_bundled_model_is_in_the_groups(tmp_path: Path) -> None:
    made = phantom_of("phantom:trunk:3").volume
    depth, height, width = made.spacing
    spacing = {"PixelSpacing": [height, width], "SliceThickness": depth}
    study = Study.open(dicom_series(tmp_path / "ct", made.hu, step=(0.0, 0.0, depth), **spacing), device="cpu")
    study.results.report = "No pulmonary nodules. No emphysema."
    rows = study.findings(["lung nodule", "emphysema"])
    assert (rows["lung nodule"]["agreement"], rows["emphysema"]["agreement"]) == (
        "present by question, mask; absent by report, probability",
        "consistent",
    )
    volume, results = study.volume, study.results
    save_dicom_seg(volume, results.masks, tmp_path / "seg.dcm")
    measured = findings_of(results, {name: measure(volume, mask) for name, mask in results.masks.items()})
    save_dicom_sr(volume, results, ORIGIN, measured, tmp_path / "sr", segmentation=tmp_path / "seg.dcm")
    report = hd.sr.srread(tmp_path / "sr" / "measurements.dcm")
    groups = {content(one, "Tracking Identifier")[0].TextValue: one for one in content(report, "Measurement Group")}
    assert set(groups) == set(rows)
    nodule, emphysema = groups["lung nodule"], groups["emphysema"]
    mask = rows["lung nodule"]["mask"]
    found = numbers(nodule)
    assert mask["diameter_mm"] > 5
    assert found["Diameter"] == (mask["diameter_mm"], "mm")
    assert found["Volume"] == (pytest.approx(1000 * mask["volume_ml"]), "mm3")
    assert found["Probability"] == (rows["lung nodule"]["probability"], "1")
    assert len(content(nodule, "Referenced Segment")) == 1
    assert agreement_of(nodule)[0] == "CTI-CONTRADICT"
    assert numbers(emphysema) == {"Probability": (rows["emphysema"]["probability"], "1"), "Volume": (0.0, "mm3")}
    assert not content(emphysema, "Referenced Segment")
    assert agreement_of(emphysema)[0] == "CTI-CONSISTENT"


def test_the_observer_is_the_model_and_every_object_is_for_research_only(tmp_path: Path) -> None:
    written(tmp_path)
    for name in ("measurements", "report"):
        document = pydicom.dcmread(tmp_path / "sr" / f"{name}.dcm")
        assert content(document, "Observer Type")[0].ConceptCodeSequence[0].CodeMeaning == "Device"
        assert content(document, "Device Observer Model Name")[0].TextValue == "tiny-model"
        assert content(document, "Device Observer Serial Number")[0].TextValue == "ab" * 32
        assert "research use only" in document.SeriesDescription
        assert content(document, "Comment")[0].TextValue == NOTICE
        assert (document.VerificationFlag, document.PreliminaryFlag) == ("UNVERIFIED", "PRELIMINARY")
    document = pydicom.dcmread(tmp_path / "sr" / "measurements.dcm")
    assert {item.TextValue for item in content(document, "Algorithm Name")} == {"ctinstruct-hf"}
    assert "model=tiny-model" in {item.TextValue for item in content(document, "Algorithm Parameters")}
    seg = pydicom.dcmread(tmp_path / "seg.dcm")
    assert "research use only" in seg.SeriesDescription
    for segment in seg.SegmentSequence:
        identified = segment.SegmentationAlgorithmIdentificationSequence[0]
        assert (identified.AlgorithmName, identified.AlgorithmVersion) == ("ctinstruct-hf", seg.SoftwareVersions)
        assert "tiny-model" in identified.AlgorithmParameters


def test_the_text_report_and_the_answers_are_read_back_in_any_letters(tmp_path: Path) -> None:
    written(tmp_path)
    document = pydicom.dcmread(tmp_path / "sr" / "report.dcm")
    assert [item.TextValue for item in content(document, "Finding")] == ["No emphysema. Größe 3 mm."]
    answer = content(document, "Answer of the model to a question")[0].TextValue
    assert answer == "Question: Is there a nodule?\nAnswer: Yes."


def test_colours_of_many_structures_are_all_different(tmp_path: Path) -> None:
    volume = read_volume(dicom_series(tmp_path / "ct", asymmetric((6, 12, 10))))
    save_dicom_seg(volume, {f"structure {n}": volume.hu > 500 for n in range(34)}, tmp_path / "seg.dcm")
    seg = pydicom.dcmread(tmp_path / "seg.dcm")
    assert len({tuple(one.RecommendedDisplayCIELabValue) for one in seg.SegmentSequence}) == 34


def saved(tmp_path: Path, model: str, output_types: tuple[str, ...], asked: Any, folder: str = "out") -> Path:
    if not (tmp_path / "ct").exists():
        dicom_series(tmp_path / "ct", asymmetric((6, 32, 32)))
    study = Study.open(tmp_path / "ct", model)
    study.results.report, study.results.diagnosis = "Nothing.", {"emphysema": 0.5}
    study.results.masks = {"liver": study.volume.hu > 500}
    study.save(tmp_path / folder, output_types=output_types, asked=asked)
    return tmp_path / folder


def test_the_same_request_gives_the_same_uids_and_another_gives_others(tmp_path: Path, untrained: Path) -> None:
    found = []
    for number, asked in enumerate([{"report": True}, {"report": True}, {"report": False}]):
        folder = saved(tmp_path, str(untrained), ("dicom_sr",), asked, str(number))
        files = ("masks.dcm", "dicom_sr/measurements.dcm", "dicom_sr/report.dcm")
        found.append([pydicom.dcmread(folder / file).SOPInstanceUID for file in files])
    assert found[0] == found[1]
    assert len({*found[0], *found[2]}) == 6


def test_a_report_without_masks_is_an_sr_and_a_scan_that_is_no_dicom_has_none(tmp_path: Path, untrained: Path) -> None:
    study = Study.open(dicom_series(tmp_path / "ct", asymmetric((6, 32, 32))), str(untrained))
    study.results.report = "Nothing."
    study.save(tmp_path / "out", output_types=("dicom-sr",))
    assert [file.name for file in (tmp_path / "out" / "dicom_sr").iterdir()] == ["report.dcm"]
    assert not (tmp_path / "out" / "masks.dcm").exists()
    array = Study.open(asymmetric((6, 32, 32)), (study.model, study.processor), spacing=(2, 1, 1))
    with pytest.raises(CTInstructError, match="no DICOM series on disk: DICOM"):
        array.save(tmp_path / "array", output_types=("dicom-sr",))


def test_a_fhir_bundle_is_valid_and_names_no_patient(tmp_path: Path, untrained: Path) -> None:
    bundles = pytest.importorskip("fhir.resources.R4B.bundle", reason="fhir.resources is not installed")
    folder = saved(tmp_path, str(untrained), ("fhir",), {"report": True})
    text = (folder / "fhir.json").read_text()
    bundles.Bundle.model_validate_json(text)
    assert "Secret" not in text
    assert "SECRET" not in text
    resources = {one["fullUrl"]: one["resource"] for one in json.loads(text)["entry"]}
    by_type = {one["resourceType"]: one for one in resources.values()}
    report = by_type["DiagnosticReport"]
    assert report["status"] == "preliminary"
    assert report["conclusion"].endswith("Nothing.")
    assert NOTICE in report["conclusion"]
    assert by_type["ImagingStudy"]["identifier"][0]["value"] == "urn:oid:1.2.3.4"
    assert all(url["reference"] in resources for url in [*report["result"], *report["imagingStudy"]])
    observed = {one["code"]["text"]: one for one in resources.values() if one["resourceType"] == "Observation"}
    assert set(observed) == {"liver", "emphysema"}
    (probability,) = observed["emphysema"]["component"]
    assert probability["valueQuantity"]["value"] == 0.5
    volume = observed["liver"]["component"][0]
    assert (volume["code"]["text"], volume["valueQuantity"]["code"]) == ("Volume", "mL")
    again = saved(tmp_path, str(untrained), ("fhir",), {"report": True}, "again")
    assert list(resources) == [one["fullUrl"] for one in json.loads((again / "fhir.json").read_text())["entry"]]
