"""Results on disk: masks in the source's geometry, label maps, DICOM SEG, the page, and nothing half-written."""

from __future__ import annotations

import csv
import datetime
import html.parser
import json
import re
import weakref
from pathlib import Path
from typing import Any

import jsonschema
import nibabel as nib
import numpy as np
import pydicom
import pytest
from repository import shared
from scans import as_nifti, asymmetric, dicom_series
from typer.testing import CliRunner

import ctinstruct_hf
from ctinstruct_hf import CTInstructError, Study, read_volume
from ctinstruct_hf.cli import app
from ctinstruct_hf.inference.batch import predict_studies
from ctinstruct_hf.inference.fingerprint import fingerprint
from ctinstruct_hf.inference.predict import Request, predict_study
from ctinstruct_hf.inference.study import load_model
from ctinstruct_hf.output import folder as folder_module
from ctinstruct_hf.output.colours import COLOURS
from ctinstruct_hf.output.dicom_seg import save_dicom_seg
from ctinstruct_hf.output.folder import file_name, file_names
from ctinstruct_hf.output.measure import axial_diameters, measure
from ctinstruct_hf.output.report import picture, plane_of

SCHEMA = json.loads((Path(folder_module.__file__).parent / "findings.schema.json").read_text())


@pytest.fixture(scope="module")
def model(untrained: Path):
    return load_model(str(untrained))


def findings_of(folder: Path) -> dict[str, Any]:
    """`findings.json`, which agrees with its schema."""
    findings = json.loads((folder / "findings.json").read_text())
    jsonschema.validate(findings, SCHEMA)
    return findings


def block(shape: tuple[int, int, int], *ranges: tuple[int, int]) -> np.ndarray:
    """A mask that is a box."""
    mask = np.zeros(shape, bool)
    mask[tuple(slice(*one) for one in ranges)] = True
    return mask


def every_text(folder: Path) -> str:
    return "\n".join((folder / name).read_text() for name in ("findings.json", "report.txt", "report.html"))


def test_label_maps_carry_their_table(tmp_path: Path, model) -> None:
    nib.save(as_nifti(asymmetric((8, 32, 32)), "RAS"), tmp_path / "scan.nii.gz")
    study = Study.open(tmp_path / "scan.nii.gz", model)
    half = np.zeros(study.volume.shape, bool)
    half[:4] = True
    study.results.masks = {"liver": half, "spleen": ~half}
    study.save(tmp_path / "out", multi_label=True)
    image = nib.load(tmp_path / "out" / "masks" / "labels.nii.gz")
    assert set(np.unique(image.dataobj)) == {1, 2}
    table = json.loads((tmp_path / "out" / "masks" / "labels.json").read_text())
    assert table == {"labels": {"liver": 1, "spleen": 2}, "colours": {"liver": COLOURS[0], "spleen": COLOURS[1]}}
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


def test_findings_name_the_model_the_version_and_the_day_and_agree_with_their_schema(
    tmp_path: Path, model, untrained: Path
) -> None:
    study = Study.open(dicom_series(tmp_path / "ct", asymmetric((6, 32, 32))), model)
    study.results.report, study.results.diagnosis = "Nothing.", {"emphysema": 0.25}
    study.results.answers.append(("Where?", "There."))
    study.results.masks = {"liver": study.volume.hu == 1000, "nothing": study.volume.hu > 5000}
    study.save(tmp_path / "out", output_types=("nifti", "dicom-seg"), asked={"report": True})
    findings = findings_of(tmp_path / "out")
    assert findings["model_fingerprint"] == fingerprint(untrained)
    assert findings["package_version"] == ctinstruct_hf.__version__
    day = datetime.datetime.fromisoformat(findings["date"])
    assert abs(datetime.datetime.now(datetime.UTC) - day) < datetime.timedelta(minutes=5)
    assert findings["failures"] == []
    assert "series_uid" not in findings
    assert "1.2.3.4.5" not in every_text(tmp_path / "out")
    study.save(tmp_path / "out", keep_series_uid=True)
    assert findings_of(tmp_path / "out")["series_uid"] == "1.2.3.4.5"
    array = Study.open(asymmetric((6, 32, 32)), model, spacing=(2, 1, 1))
    array.save(tmp_path / "array", keep_series_uid=True)
    assert findings_of(tmp_path / "array")["series_uid"] is None


@pytest.mark.parametrize("failing", ["nifti", "dicom-seg"])
@pytest.mark.parametrize("error", [ValueError("Secret^Name 20200101"), CTInstructError("ct has no such thing.")])
def test_an_output_type_that_cannot_be_written_is_listed_and_the_rest_is_there(
    tmp_path: Path, model, monkeypatch: pytest.MonkeyPatch, failing: str, error: Exception
) -> None:
    def broken(volume: Any, masks: Any, path: Path, multi_label: bool) -> Any:
        path.write_bytes(b"half")
        raise error

    place = folder_module._WRITERS[failing][1]
    monkeypatch.setitem(folder_module._WRITERS, failing, (broken, place))
    study = Study.open(dicom_series(tmp_path / "ct", asymmetric((6, 32, 32))), model)
    study.results.report = "Nothing."
    study.results.masks = {"liver": study.volume.hu == 1000}
    study.save(tmp_path / "out", output_types=("nifti", "dicom-seg"))
    findings = findings_of(tmp_path / "out")
    ((told),) = findings["failures"]
    assert told["output_type"] == failing
    assert study.results.failures == {failing: told["error"]}
    assert any(failing in note for note in findings["warnings"])
    assert not (tmp_path / "out" / place).exists()
    other = {"nifti": "masks.dcm", "dicom-seg": "masks/liver.nii.gz"}[failing]
    assert findings["segmentation"]["liver"]["file"] == other
    assert (tmp_path / "out" / other).exists()
    assert "Nothing." in (tmp_path / "out" / "report.txt").read_text()
    assert "Secret" not in every_text(tmp_path / "out")


NAMES = [
    "Liver",
    "liver",
    "left lung",
    "left_lung",
    "left-lung",
    "肝臓",
    "脾臓",
    "???",
    "!!!",
    "a" * 300,
    "a" * 301,
    "labels",
]


@pytest.mark.parametrize("multi_label", [False, True])
def test_no_name_writes_over_the_file_of_another(tmp_path: Path, model, multi_label: bool) -> None:
    """Each entry of the findings leads to a file that holds just its voxels."""
    study = Study.open(asymmetric((8, 16, 16)), model, spacing=(2, 1, 1))
    shape = study.volume.shape
    study.results.masks = {name: block(shape, (0, 8), (0, 9), (0, number + 1)) for number, name in enumerate(NAMES)}
    study.save(tmp_path / "out", multi_label=multi_label)
    segmentation = findings_of(tmp_path / "out")["segmentation"]
    assert list(segmentation) == NAMES
    assert len({one["file"] for one in segmentation.values()}) == len(NAMES)
    for number, (name, numbers) in enumerate(segmentation.items()):
        assert int((np.asarray(nib.load(tmp_path / "out" / numbers["file"]).dataobj) > 0).sum()) == 72 * (number + 1), (
            name
        )
        assert numbers["voxels"] == 72 * (number + 1)
    assert len(set(file_names(NAMES).values())) == len(NAMES)


def test_names_that_differ_by_case_only_are_one_structure(model, tmp_path: Path) -> None:
    study = Study.open(asymmetric((8, 32, 32)), model, spacing=(2, 1, 1))
    masks = study.segment(["Liver", "liver", "LIVER"])
    assert np.array_equal(masks["Liver"], masks["LIVER"])
    study.segment("lIVER")
    assert list(study.results.masks) == ["lIVER"]


def test_overlapping_structures_of_a_label_map_have_files_of_their_own(tmp_path: Path, model) -> None:
    study = Study.open(asymmetric((8, 16, 16)), model, spacing=(2, 1, 1))
    shape = study.volume.shape
    study.results.masks = {
        "lungs": block(shape, (1, 7), (2, 9), (2, 14)),
        "right lung": block(shape, (1, 7), (2, 9), (2, 8)),
        "heart": block(shape, (1, 7), (9, 12), (2, 8)),
        "touching": block(shape, (6, 8), (8, 10), (2, 3)),
    }
    study.save(tmp_path / "out", multi_label=True)
    findings = findings_of(tmp_path / "out")
    table = json.loads((tmp_path / "out" / "masks" / "labels.json").read_text())["labels"]
    assert table == {"lungs": 1, "heart": 2}
    image = nib.load(tmp_path / "out" / "masks" / "labels.nii.gz")
    assert b"right lung" not in image.header.extensions[0].content
    for name, numbers in findings["segmentation"].items():
        values = np.asarray(nib.load(tmp_path / "out" / numbers["file"]).dataobj)
        assert int((values == table.get(name, 1)).sum()) == numbers["voxels"] == int(study.results.masks[name].sum())
    assert {numbers["file"] for numbers in findings["segmentation"].values()} == {
        "masks/labels.nii.gz",
        "masks/right_lung.nii.gz",
        "masks/touching.nii.gz",
    }
    told = [note for note in findings["warnings"] if "overlap" in note]
    assert [note.split(" overlaps")[0] for note in told] == ["right lung", "touching"]


CUTS = [
    (((0, 3), (2, 5), (2, 5)), ["feet"]),
    (((5, 8), (2, 5), (2, 5)), ["head"]),
    (((2, 5), (0, 3), (2, 5)), ["front"]),
    (((2, 5), (7, 10), (2, 5)), ["back"]),
    (((2, 5), (2, 5), (0, 3)), ["right"]),
    (((2, 5), (2, 5), (9, 12)), ["left"]),
    (((0, 8), (2, 5), (2, 5)), ["head", "feet"]),
    (((2, 5), (2, 5), (2, 5)), []),
]


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SAR", "PIL"])
@pytest.mark.parametrize(("ranges", "sides"), CUTS)
def test_a_structure_at_the_edge_of_the_scan_is_said_to_be_cut_off_there(ranges, sides: list[str], codes: str) -> None:
    volume = read_volume(as_nifti(asymmetric((8, 10, 12)), codes))
    assert measure(volume, block(volume.shape, *ranges))["cut_off"] == sides


def test_cut_off_structures_stand_in_every_result(tmp_path: Path, model) -> None:
    study = Study.open(asymmetric((8, 16, 16)), model, spacing=(2, 1, 1))
    whole, cut = block(study.volume.shape, (2, 4), (2, 4), (2, 4)), block(study.volume.shape, (0, 8), (2, 4), (2, 4))
    study.results.masks = {"spleen": whole, "spine": cut}
    study.save(tmp_path / "out")
    told = "Cut off by the edge of the scan: spine (head, feet)."
    assert any(note.startswith(told) for note in findings_of(tmp_path / "out")["warnings"])
    assert told in (tmp_path / "out" / "report.txt").read_text()
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<td>head, feet</td>" in page
    assert told in page


def test_special_tokens_reach_no_result(tmp_path: Path, model) -> None:
    study = Study.open(asymmetric((8, 16, 16)), model, spacing=(2, 1, 1))
    study.results.report = "The liver <SEG> is <disease_confidence>.<|im_end|>"
    study.results.answers.append(("Where is it?", "It is <SEG>."))
    study.save(tmp_path / "out")
    text = every_text(tmp_path / "out").replace("&lt;", "<").replace("&gt;", ">")
    for token in ("<SEG>", "<disease_confidence>", "<|im_end|>"):
        assert token not in text
    findings = findings_of(tmp_path / "out")
    assert findings["report"] == "The liver [mask] is unknown."
    assert findings["answers"] == [{"question": "Where is it?", "answer": "It is [mask]."}]
    assert (
        study.processor.write_out("a <disease_confidence>, b <disease_confidence> <SEG>", [0.5])
        == "a 0.50, b unknown [mask]"
    )


@pytest.fixture
def unreferenceable(tmp_path: Path) -> Path:
    """A series whose slices have no SOPInstanceUID, so that nothing can refer to them."""
    series = dicom_series(tmp_path / "scans" / "nameless", asymmetric((6, 32, 32)))
    for file in series.iterdir():
        data = pydicom.dcmread(file)
        del data.SOPInstanceUID, data.file_meta.MediaStorageSOPInstanceUID
        data.save_as(file, enforce_file_format=False)
    return series


def test_the_command_line_writes_the_rest_and_ends_with_3(
    tmp_path: Path, unreferenceable: Path, untrained: Path
) -> None:
    arguments = ["predict", "-i", str(unreferenceable), "-o", str(tmp_path / "out"), "--model", str(untrained), "--segment", "liver", "-ot", "nifti", "-ot", "dicom-seg"]  # fmt: skip
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 3, done.output
    (failure,) = findings_of(tmp_path / "out")["failures"]
    assert failure["output_type"] == "dicom-seg"
    assert "has no SOPInstanceUID" in failure["error"]
    assert (tmp_path / "out" / "masks" / "liver.nii.gz").exists()
    assert (tmp_path / "out" / "report.html").exists()


def test_a_run_over_many_scans_lists_what_could_not_be_written(
    tmp_path: Path, unreferenceable: Path, untrained: Path
) -> None:
    good = dicom_series(tmp_path / "scans" / "whole", asymmetric((6, 32, 32)))
    request = Request(structures=["liver"], output_types=("nifti", "dicom-seg"))
    outcomes = predict_studies([unreferenceable, good], tmp_path / "out", request, model=str(untrained))
    assert [one.status for one in outcomes] == ["incomplete", "done"]
    rows = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))
    assert [row["status"] for row in rows] == ["incomplete", "done"]
    assert "liver cut off at" in rows[0]
    (failure,) = csv.DictReader((tmp_path / "out" / "failures.csv").open())
    assert failure["study"] == "nameless"
    again = predict_studies([unreferenceable, good], tmp_path / "out", request, model=str(untrained))
    assert [one.status for one in again] == ["incomplete", "kept"]


@pytest.mark.parametrize(
    ("types", "told"), [(("nifti", "dicom-seg"), "no DICOM series"), (("nifti", "jpeg"), "output type jpeg")]
)
def test_what_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, small_scan: Path, untrained: Path, types: tuple[str, ...], told: str
) -> None:
    steps: list[str] = []
    request = Request(structures=["liver"], output_types=types)
    with pytest.raises(CTInstructError, match=told):
        predict_study(small_scan, tmp_path / "out", request, model=str(untrained), tell=steps.append)
    assert steps == ["reading"]
    assert not (tmp_path / "out").exists()


PLANES = {"axial": (2, "Axial"), "coronal": (1, "Coronal"), "sagittal": (0, "Sagittal")}


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("codes", ["RAS", "LPI", "ASR"])
def test_pictures_are_named_by_their_plane_face_one_way_and_keep_the_aspect(plane: str, codes: str) -> None:
    """A bright corner toward head, front and right is at the upper left of every picture, of slices and of volumes."""
    hu = np.full((12, 16, 20), -1000, np.int16)
    hu[-6:, :6, :6] = 300
    image = as_nifti(hu, "RAS", spacing=(5.0, 2.0, 1.0))
    axis, title = PLANES[plane]
    width, height = {"axial": (20, 32), "coronal": (20, 60), "sagittal": (32, 60)}[plane]  # mm
    one = [slice(None)] * 3
    one[axis] = slice(-3, -2)  # within the bright corner
    for scan in (image, image.slicer[tuple(one)]):
        turn = nib.orientations.ornt_transform(
            nib.orientations.io_orientation(scan.affine), nib.orientations.axcodes2ornt(codes)
        )
        volume = read_volume(scan.as_reoriented(turn))
        across = 0 if volume.shape[0] == 1 else 2 - axis
        assert plane_of(volume, across) == title
        index = 0 if volume.shape[across] == 1 else {0: 9, 1: 2, 2: 2}[across]
        shown = np.asarray(picture(volume, [], across, index, "soft tissue"))[..., 0]
        assert shown.shape[1] / shown.shape[0] == pytest.approx(width / height, rel=0.02)
        rows, columns = shown.shape
        assert shown[rows // 8, columns // 8] == 255
        assert shown[-rows // 8, columns // 8] == shown[rows // 8, -columns // 8] == 0


def test_a_single_coronal_slice_is_captioned_coronal(tmp_path: Path, model) -> None:
    scan = as_nifti(asymmetric((20, 1, 24)), "RAS")
    study = Study.open(scan, model)
    study.results.masks = {"liver": study.volume.hu > 0}
    study.save(tmp_path / "out")
    captions = re.findall(r"<figcaption>(.*?)<br>", (tmp_path / "out" / "report.html").read_text())
    assert captions[0].startswith("Coronal through")
    assert not any("Axial" in caption or "from the feet" in caption for caption in captions)


def test_pictures_hold_no_more_than_the_planes_they_show() -> None:
    """Masks that are unpacked when asked for are not all unpacked at once; the page is the same."""
    from ctinstruct_hf.app.limits import Limits
    from ctinstruct_hf.app.masks import PackedMasks
    from ctinstruct_hf.output.report import pictures
    from ctinstruct_hf.phantoms import make_phantom

    patient = make_phantom(2, shape=(24, 48, 48))
    masks = {**{name: mask for name, mask in patient.masks.items() if name != "body"}, "none": patient.masks["body"] & False}  # fmt: skip
    alive: list[weakref.ref[np.ndarray]] = []
    most = 0

    class Counting(PackedMasks):
        def __getitem__(self, name: str) -> np.ndarray:
            nonlocal most
            mask = super().__getitem__(name).copy()
            alive.append(weakref.ref(mask))
            most = max(most, sum(one() is not None for one in alive))
            return mask

    packed = Counting(Limits())
    packed.update(masks)
    assert pictures(patient.volume, packed, ["nodule"]) == pictures(patient.volume, masks, ["nodule"])
    assert most <= 2


def test_the_page_draws_diameters_and_names_label_values_and_unknown_structures(tmp_path: Path, model) -> None:
    study = Study.open(asymmetric((12, 40, 32)), model, spacing=(2, 1, 1))
    masks = {name: np.zeros(study.volume.shape, bool) for name in ("brain", "lung nodule", "liver")}
    masks["brain"][2:4, 4:9, 4:9] = masks["lung nodule"][6, 10:20, 10:14] = masks["liver"][9, 4:9, 4:9] = True
    study.results.masks, study.results.unknown = masks, ["brain"]
    study.save(tmp_path / "out", multi_label=True)
    page = (tmp_path / "out" / "report.html").read_text()
    longest, across = axial_diameters(masks["lung nodule"], study.volume.spacing)
    assert f"lung nodule, where it is largest: slice 7 of 12 from the feet, {longest:.0f} x {across:.0f} mm" in page
    assert "brain (unknown to the model)" in page
    assert page.index("<h2>Pictures</h2>") < page.index("<h2>Structures</h2>")
    values = json.loads((tmp_path / "out" / "masks" / "labels.json").read_text())["labels"]
    assert {name: f'{name}</th><td class="number">{value}</td>' in page for name, value in values.items()} == {
        "brain": False,  # its name is followed by the remark
        "lung nodule": True,
        "liver": True,
    }
    found = json.loads((tmp_path / "out" / "findings.json").read_text())["segmentation"]
    assert {name: numbers["known"] for name, numbers in found.items()} == {
        "brain": False,
        "lung nodule": True,
        "liver": True,
    }
    plain, drawn = (
        np.asarray(picture(study.volume, [], 0, 6, "lung", lines)) for lines in ((), [((10, 10), (19, 10))])
    )
    rows, columns, _ = np.nonzero(plain != drawn)
    scale = plain.shape[0] / 40
    assert (rows.min(), rows.max()) == pytest.approx((10.5 * scale, 19.5 * scale), abs=3)
    assert columns.mean() == pytest.approx(10.5 * scale, abs=3)
