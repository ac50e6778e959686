"""Results on disk: masks in the source's geometry, label maps, DICOM SEG, the page, and nothing half-written."""

from __future__ import annotations

import html.parser
import json
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from conftest import shared
from scans import as_nifti, asymmetric, dicom_series

from ctinstruct_hf import CTInstructError, Study, read_volume
from ctinstruct_hf.output.dicom_seg import save_dicom_seg
from ctinstruct_hf.output.folder import file_name
from ctinstruct_hf.study import load_model


@pytest.fixture(scope="module")
def model(untrained: Path):
    return load_model(str(untrained))


def test_label_maps_carry_their_table(tmp_path: Path, model) -> None:
    nib.save(as_nifti(asymmetric((8, 32, 32)), "RAS"), tmp_path / "scan.nii.gz")
    study = Study.open(tmp_path / "scan.nii.gz", model)
    half = np.zeros(study.volume.shape, bool)
    half[:4] = True
    study.results.masks = {"liver": half, "spleen": ~half}
    study.save(tmp_path / "out", multi_label=True)
    image = nib.load(tmp_path / "out" / "masks" / "labels.nii.gz")
    assert set(np.unique(image.dataobj)) == {1, 2}
    assert json.loads((tmp_path / "out" / "masks" / "labels.json").read_text()) == {"labels": {"liver": 1, "spleen": 2}}
    assert b"spleen" in image.header.extensions[0].content
    findings = json.loads((tmp_path / "out" / "findings.json").read_text())
    assert findings["segmentation"]["liver"]["file"] == "masks/labels.nii.gz"


def test_dicom_seg_reads_back_on_its_series(tmp_path: Path) -> None:
    hd = pytest.importorskip("highdicom", reason="highdicom is not installed")
    hu = asymmetric((6, 16, 16))
    volume = read_volume(dicom_series(tmp_path / "series", hu))
    left = volume.hu == 1000
    save_dicom_seg(volume, {"left lung": left, "something new": ~left}, tmp_path / "seg.dcm")
    seg = hd.seg.segread(tmp_path / "seg.dcm")
    assert [one.SegmentLabel for one in seg.SegmentSequence] == ["left lung", "something new"]
    assert (
        seg.get_segment_description(1).segmented_property_type.value == "39607008"
    )  # lung, with its side as a modifier
    kind = seg.SegmentSequence[0].SegmentedPropertyTypeCodeSequence[0]
    assert kind.SegmentedPropertyTypeModifierCodeSequence[0].CodeValue == "7771000"
    source = sorted(
        (pydicom.dcmread(file) for file in (tmp_path / "series").iterdir()), key=lambda one: one.ImagePositionPatient[2]
    )
    frames = seg.get_pixels_by_source_instance([one.SOPInstanceUID for one in source], segment_numbers=[1])
    assert np.array_equal(frames[..., 0].astype(bool), left)
    assert seg.SeriesInstanceUID != source[0].SeriesInstanceUID
    nib.save(as_nifti(hu, "RAS"), tmp_path / "scan.nii")
    with pytest.raises(CTInstructError, match="no DICOM series"):
        save_dicom_seg(read_volume(tmp_path / "scan.nii"), {"liver": left}, tmp_path / "no.dcm")


def test_dicom_seg_of_a_real_series(tmp_path: Path) -> None:
    hd = pytest.importorskip("highdicom", reason="highdicom is not installed")
    volume = read_volume(shared("data/body_dicom"))
    save_dicom_seg(volume, {"spine": volume.hu > 300}, tmp_path / "seg.dcm")
    assert hd.seg.segread(tmp_path / "seg.dcm").number_of_segments == 1


class Links(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href") and value and value.startswith(("http", "//")):
                self.outside.append(value)


def test_the_page_escapes_everything_and_needs_nothing_outside(tmp_path: Path, model) -> None:
    evil = "<script>alert(1)</script>"
    study = Study.open(asymmetric((8, 32, 32)), model, spacing=(2, 1, 1))
    study.volume.source.name = evil
    study.results.report = evil
    study.results.answers.append((evil, evil))
    study.results.diagnosis = {evil: 0.5}
    study.results.masks = {evil: study.volume.hu == 1000}
    study.volume.warnings.append(evil)
    study.save(tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script" not in page
    assert "Research use only" in page
    links = Links()
    links.feed(page)
    assert not links.outside
    assert links.tags.count("img") >= 5
    assert (tmp_path / "out" / "masks" / f"{file_name(evil)}.nii.gz").exists()


def test_patient_identifiers_stay_in_the_scan(tmp_path: Path, model) -> None:
    series = dicom_series(tmp_path / "study", asymmetric((6, 32, 32)))
    study = Study.open(series, model)
    study.segment("liver")
    study.save(tmp_path / "out")
    for file in (tmp_path / "out").rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            for secret in (b"Secret", b"SECRET", b"20200101", str(tmp_path).encode()):
                assert secret not in content, file


def test_an_unwritable_place_leaves_nothing_behind(tmp_path: Path, model) -> None:
    (tmp_path / "file").write_text("in the way")
    study = Study.open(asymmetric((8, 32, 32)), model, spacing=(2, 1, 1))
    with pytest.raises(CTInstructError, match="cannot be written"):
        study.save(tmp_path / "file" / "out")
    with pytest.raises(CTInstructError, match="output type"):
        study.save(tmp_path / "out", output_types=("jpeg",))
    study.results.masks = {"liver": study.volume.hu > 0}
    with pytest.raises(CTInstructError, match="no DICOM series"):
        study.save(tmp_path / "out", output_types=("dicom-seg",))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file"]


def test_the_page_shows_the_finding_and_says_in_words_what_is_seen(tmp_path: Path, model) -> None:
    nib.save(as_nifti(asymmetric((12, 40, 32)), "RAS"), tmp_path / "scan.nii.gz")
    study = Study.open(tmp_path / "scan.nii.gz", model)
    nodule, organ = np.zeros(study.volume.shape, bool), np.zeros(study.volume.shape, bool)
    nodule[8:10, 10:14, 20:24] = True
    nodule[8, 9:15, 19:25] = True  # largest in slice 9 from the feet
    organ[2:7, 4:30, 4:30] = True
    study.results.masks = {"liver": organ, "lung nodule": nodule}
    asked = {"report": True, "questions": ["Where?"], "structures": ["liver"], "diagnose": "ct_rate", "model": "tiny"}
    study.save(tmp_path / "out", asked=asked)
    page = (tmp_path / "out" / "report.html").read_text()
    captions = re.findall(r"<figcaption>(.*?)<br>", page)
    assert captions[0] == "Axial through the lung nodule, soft tissue window"
    assert captions[1].startswith("Coronal through the lung nodule")
    assert captions[4].startswith("lung nodule, where it is largest: slice 9 of 12")
    described = re.findall(r'<img alt="([^"]*)"', page)
    assert len(described) == len(captions)
    assert "outlined: lung nodule" in described[4]
    assert "outlined: liver" in described[5]
    for words in ("What was asked", "“Where?”", "masks of liver", "probabilities: ct rate"):
        assert words in page
    assert json.loads((tmp_path / "out" / "findings.json").read_text())["asked"] == asked
