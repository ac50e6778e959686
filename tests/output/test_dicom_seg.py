"""DICOM SEG: every voxel on the frame it belongs to, whatever the series is like, and nothing of the patient in an error."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from scans import asymmetric, dicom_series, enhanced

from ctinstruct_hf import CTInstructError, read_volume
from ctinstruct_hf.output import dicom_seg
from ctinstruct_hf.output.colours import rgb
from ctinstruct_hf.output.dicom_seg import CODES, SERIES_DESCRIPTION, save_dicom_seg

hd = pytest.importorskip("highdicom", reason="highdicom is not installed")
SHAPE = (8, 12, 10)


def reorder(data: Dataset, order: list[int]) -> Dataset:
    """An enhanced image with its frames in another order; a number twice repeats a frame."""
    pixels = data.pixel_array[order]
    groups = [data.PerFrameFunctionalGroupsSequence[index] for index in order]
    data.PerFrameFunctionalGroupsSequence = copy.deepcopy(groups)
    data.NumberOfFrames, data.PixelData = len(order), np.ascontiguousarray(pixels).tobytes()
    return data


def masks_of(volume: Any) -> dict[str, np.ndarray]:
    """Two overlapping masks without any symmetry, one that is in some slices only, one that is empty."""
    depth, height, width = np.indices(volume.shape)
    return {
        "liver": depth + 2 * height + width > 20,
        "right lung": (height > depth) & (width < 7),
        "lung nodule": (depth == 2) & (height == 3) & (width == 1),
        "spleen": np.zeros(volume.shape, bool),
    }


def frames_by_place(path: Path) -> dict[tuple[int, float], tuple[np.ndarray, str, int | None]]:
    """(segment, z) -> pixels, referenced instance and frame, read without highdicom."""
    seg = pydicom.dcmread(path)
    pixels = seg.pixel_array.reshape(-1, seg.Rows, seg.Columns)
    found = {}
    for frame, group in zip(pixels, seg.PerFrameFunctionalGroupsSequence, strict=True):
        number = int(group.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
        reference = group.DerivationImageSequence[0].SourceImageSequence[0]
        z = float(group.PlanePositionSequence[0].ImagePositionPatient[2])
        numbered = reference.get("ReferencedFrameNumber")
        found[number, z] = frame > 0, str(reference.ReferencedSOPInstanceUID), numbered and int(numbered)
    return found


def check_frames(volume: Any, path: Path, files: list[Path]) -> None:
    """Each mask equals the frames written at its places, and each reference is the image that lies there."""
    masks, found = masks_of(volume), frames_by_place(path)
    sources = {str(one.SOPInstanceUID): one for one in map(pydicom.dcmread, files)}
    for number, mask in enumerate(masks.values(), start=1):
        for k in range(len(mask)):
            z = float(volume.affine[2, 3] + k * volume.affine[2, 2])
            written = found.pop((number, z), None)
            if written is None:
                assert not mask[k].any()
                continue
            pixels, instance, frame = written
            assert np.array_equal(pixels, mask[k])
            source = sources[instance]
            if frame is not None:
                source = source.PerFrameFunctionalGroupsSequence[frame - 1].PlanePositionSequence[0]
            assert float(source.ImagePositionPatient[2]) == z
    assert not found


ORDERS = {
    "ascending": [0, 1, 2, 3, 4, 5, 6, 7],
    "descending": [7, 6, 5, 4, 3, 2, 1, 0],
    "shuffled": [3, 0, 6, 1, 7, 2, 5, 4],
    "repeated": [0, 1, 2, 3, 3, 4, 5, 6, 7],
}


@pytest.mark.parametrize("order", ORDERS)
def test_frames_of_an_enhanced_image_are_found_in_any_order(tmp_path: Path, order: str) -> None:
    file = enhanced(asymmetric(SHAPE), tmp_path / "ct.dcm")
    reorder(pydicom.dcmread(file), ORDERS[order]).save_as(file)
    volume = read_volume(file)
    save_dicom_seg(volume, masks_of(volume), tmp_path / "seg.dcm")
    check_frames(volume, tmp_path / "seg.dcm", [file])


def test_an_enhanced_series_may_lie_in_two_files(tmp_path: Path) -> None:
    folder = tmp_path / "ct"
    folder.mkdir()
    hu = asymmetric(SHAPE)
    for name, part in (("a", [0, 2, 4, 6]), ("b", [7, 5, 3, 1])):
        file = enhanced(hu, folder / name)
        reorder(pydicom.dcmread(file), part).save_as(file)
    volume = read_volume(folder)
    assert volume.shape == SHAPE
    save_dicom_seg(volume, masks_of(volume), tmp_path / "seg.dcm")
    check_frames(volume, tmp_path / "seg.dcm", sorted(folder.iterdir()))
    seg = pydicom.dcmread(tmp_path / "seg.dcm")
    assert len(seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence) == 2


@pytest.mark.parametrize("overlap", [True, False])
def test_slices_in_files_of_their_own_and_any_tilt_of_their_orientation(tmp_path: Path, overlap: bool) -> None:
    folder = dicom_series(tmp_path / "ct", asymmetric(SHAPE))
    file = sorted(folder.iterdir())[3]
    data = pydicom.dcmread(file)
    data.ImageOrientationPatient = [1, 0, 0.0000004, 0, 1, 0]  # as scanners round
    data.save_as(file)
    volume = read_volume(folder)
    masks = masks_of(volume)
    if not overlap:
        masks["right lung"] &= ~masks["liver"]
        masks["lung nodule"] &= ~(masks["liver"] | masks["right lung"])
    save_dicom_seg(volume, masks, tmp_path / "seg.dcm")
    found = frames_by_place(tmp_path / "seg.dcm")
    for number, mask in enumerate(masks.values(), start=1):
        written = {z: one[0] for (segment, z), one in found.items() if segment == number}
        assert len(written) == int(mask.any(axis=(1, 2)).sum())
        for z, pixels in written.items():
            assert np.array_equal(pixels, mask[round((z - volume.affine[2, 3]) / volume.affine[2, 2])])


def series(folder: Path, source: str) -> Any:
    """A scan of slices in files of their own that do not lie on a grid, or one that does."""
    changes: dict[str, Any] = {
        "plain": {},
        "tilted": {"step": (0.0, 0.4, 2.0)},
        "uneven": {"positions": [np.array([-30.0, -40.0, z]) for z in (0, 2, 4, 7, 9, 11, 13, 15)]},
    }
    return read_volume(dicom_series(folder / "ct", asymmetric(SHAPE), **changes[source]))


def in_file(volume: Any, masks: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The masks on the scan's own slices: bool [slice, row, column]."""
    return {name: volume.to_source(mask).get_fdata().transpose(2, 1, 0) > 0 for name, mask in masks.items()}


def on_top(masks: dict[str, np.ndarray]) -> np.ndarray:
    """The number of the last mask in each voxel."""
    labels = np.zeros(next(iter(masks.values())).shape, int)
    for number, mask in enumerate(masks.values(), start=1):
        labels[mask] = number
    return labels


@pytest.mark.parametrize("label_map", [False, True])
@pytest.mark.parametrize("source", ["plain", "tilted", "uneven"])
def test_every_frame_lies_on_the_slice_of_the_source_that_it_refers_to(
    tmp_path: Path, source: str, label_map: bool
) -> None:
    volume = series(tmp_path, source)
    masks = masks_of(volume)
    save_dicom_seg(volume, masks, tmp_path / "seg.dcm", label_map=label_map)
    seg, wanted = pydicom.dcmread(tmp_path / "seg.dcm"), in_file(volume, masks)
    images = [pydicom.dcmread(file, stop_before_pixels=True) for file in volume.source.dicom_files]
    instances = [image.SOPInstanceUID for image in images]
    found = []
    for frame, group in zip(seg.pixel_array, seg.PerFrameFunctionalGroupsSequence, strict=True):
        reference = group.DerivationImageSequence[0].SourceImageSequence[0]
        k = instances.index(reference.ReferencedSOPInstanceUID)
        assert group.PlanePositionSequence[0].ImagePositionPatient == images[k].ImagePositionPatient
        if label_map:
            assert np.array_equal(frame, on_top(wanted)[k])
            found.append(k)
        else:
            number = group.SegmentIdentificationSequence[0].ReferencedSegmentNumber
            assert np.array_equal(frame, list(wanted.values())[number - 1][k])
            found.append((number, k))
    shown = [
        (number, k) for number, mask in enumerate(wanted.values(), start=1) for k in np.flatnonzero(mask.any((1, 2)))
    ]
    assert found == (sorted({k for _, k in shown}) if label_map else shown)


def test_a_label_map_is_read_back_by_highdicom_and_says_what_others_cover(tmp_path: Path) -> None:
    volume = series(tmp_path, "plain")
    masks = masks_of(volume)
    (note,) = save_dicom_seg(volume, masks, tmp_path / "seg.dcm", label_map=True, seed="asked")
    assert note == "The DICOM label map holds one structure a voxel: later ones cover voxels of liver, right lung."
    found = hd.seg.segread(tmp_path / "seg.dcm")
    assert found.segmentation_type == hd.seg.SegmentationTypeValues.LABELMAP
    assert [found.get_segment_description(number).segment_label for number in (1, 2, 3, 4)] == list(masks)
    instances = [pydicom.dcmread(file, stop_before_pixels=True).SOPInstanceUID for file in volume.source.dicom_files]
    options: dict[str, Any] = {"combine_segments": True, "ignore_spatial_locations": True}
    labels = found.get_pixels_by_source_instance(instances, assert_missing_frames_are_empty=True, **options)
    assert np.array_equal(labels, on_top(in_file(volume, masks)))
    save_dicom_seg(volume, masks, tmp_path / "binary.dcm", seed="asked")
    assert hd.seg.segread(tmp_path / "binary.dcm").SOPInstanceUID != found.SOPInstanceUID
    assert not save_dicom_seg(volume, {"liver": masks["liver"]}, tmp_path / "one.dcm", label_map=True)


@pytest.mark.parametrize(("count", "bits"), [(255, 8), (256, 16)])
def test_a_label_map_holds_as_many_structures_as_there_are(tmp_path: Path, count: int, bits: int) -> None:
    volume = read_volume(dicom_series(tmp_path / "ct", asymmetric((3, 12, 10))))
    numbers = np.arange(volume.hu.size).reshape(volume.hu.shape) + 1
    masks = {f"structure {number}": numbers == number for number in range(1, count + 1)}
    assert not save_dicom_seg(volume, masks, tmp_path / "seg.dcm", label_map=True)
    seg = pydicom.dcmread(tmp_path / "seg.dcm")
    assert seg.BitsAllocated == bits
    assert seg.pixel_array.max() == count
    assert len(np.unique(seg.pixel_array)) == count + 1


DCMQI = shutil.which("segimage2itkimage") or Path(sys.executable).with_name("segimage2itkimage")


@pytest.mark.skipif(not Path(DCMQI).exists(), reason="dcmqi is not installed: pip install dcmqi")
@pytest.mark.parametrize("label_map", [False, True])
@pytest.mark.parametrize("source", ["plain", "tilted", "uneven"])
def test_dcmqi_reads_voxels_names_codes_and_colours_without_a_warning(
    tmp_path: Path, source: str, label_map: bool
) -> None:
    nrrd = pytest.importorskip("nrrd", reason="pynrrd is not installed")
    volume = series(tmp_path, source)
    masks = masks_of(volume)
    save_dicom_seg(volume, masks, tmp_path / "seg.dcm", label_map=label_map)
    command = [DCMQI, "--inputDICOM", tmp_path / "seg.dcm", "--outputDirectory", tmp_path, "--prefix", "read"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not [line for line in (done.stdout + done.stderr).splitlines() if line.startswith(("W:", "E:"))]
    layers = [nrrd.read(str(file)) for file in sorted(tmp_path.glob("read-*.nrrd"))]
    wanted = in_file(volume, masks)
    if label_map:
        wanted = {name: on_top(wanted) == number for number, name in enumerate(wanted, start=1)}
    for number, mask in enumerate(wanted.values(), start=1):
        found = np.any([layer == number for layer, _ in layers], axis=0).transpose(2, 1, 0)
        assert found.sum() == mask.sum()
        if source == "plain":
            assert np.array_equal(found, mask)
    assert layers[0][1]["space origin"].tolist() == pydicom.dcmread(volume.source.dicom_files[0]).ImagePositionPatient
    groups = json.loads((tmp_path / "read-meta.json").read_text())["segmentAttributes"]
    described = {one["labelID"]: one for group in groups for one in group}
    assert [described[number]["SegmentLabel"] for number in (1, 2, 3, 4)] == list(masks)
    assert [tuple(described[number + 1]["recommendedDisplayRGBValue"]) for number in range(4)] == [
        rgb(number) for number in range(4)
    ]
    assert described[1]["SegmentedPropertyTypeCodeSequence"]["CodeValue"] == "10200004"
    assert described[2]["SegmentedPropertyTypeModifierCodeSequence"]["CodeMeaning"] == "Right"


TEXTS = {
    "Japanese": (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎"),
    "Korean": (["", "ISO 2022 IR 149"], "Hong^Gildong=洪^吉洞=홍^길동"),
    "Latin": ("ISO_IR 100", "Müller^Jörg"),
    "Unicode": ("ISO_IR 192", "Müller^Jörg=山田^太郎"),
    "empty": ("", "Secret^Name"),
    "absent": (None, "Secret^Name"),
}


@pytest.mark.parametrize("charset", TEXTS)
def test_the_patients_name_stays_readable_in_any_charset(tmp_path: Path, charset: str) -> None:
    sets, name = TEXTS[charset]
    series = dicom_series(tmp_path / "ct", asymmetric((3, 8, 8)), SpecificCharacterSet=sets, PatientName=name)
    if sets == "":
        for file in series.iterdir():
            data = pydicom.dcmread(file)
            data.SpecificCharacterSet = None
            data.save_as(file)
    volume = read_volume(series)
    notes = save_dicom_seg(volume, {"Größe": volume.hu > 0}, tmp_path / "seg.dcm")
    seg = pydicom.dcmread(tmp_path / "seg.dcm")
    assert str(seg.PatientName) == name
    assert seg.SegmentSequence[0].SegmentLabel == "Größe"
    assert not notes


# element: what the file says -> what the SEG says, and whether that is noted
REPAIRS = [
    ("PatientSex", "X", "", True),
    ("PatientSex", "U", "", True),
    ("PatientSex", "f", "F", False),
    ("StudyTime", "12:34:56", "123456", False),
    ("StudyTime", "9 o'clock", "", True),
    ("StudyDate", "2020.01.31", "20200131", False),
    ("PatientBirthDate", "19500000", "", True),
    ("PatientBirthDate", "19500131", "19500131", False),
]


@pytest.mark.parametrize(("element", "given", "written", "noted"), REPAIRS)
def test_what_is_not_valid_is_repaired_or_left_empty_and_noted(
    tmp_path: Path, element: str, given: str, written: str, noted: bool
) -> None:
    series = dicom_series(tmp_path / "ct", asymmetric((2, 8, 8)))
    for file in series.iterdir():
        data = pydicom.dcmread(file)
        data[element]._value = given
        data.save_as(file)
    volume = read_volume(series)
    notes = save_dicom_seg(volume, {"liver": volume.hu > 0}, tmp_path / "seg.dcm")
    assert str(pydicom.dcmread(tmp_path / "seg.dcm")[element].value or "") == written
    assert [element in note for note in notes] == [True] * noted
    assert not any(given in note.split() for note in notes)


@pytest.mark.parametrize("keyword", ["StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"])
@pytest.mark.parametrize("value", [None, ""])
def test_an_absent_uid_becomes_one_that_is_derived_from_the_files(
    tmp_path: Path, keyword: str, value: str | None
) -> None:
    series = dicom_series(tmp_path / "ct", asymmetric((3, 8, 8)))
    for file in series.iterdir():
        data = pydicom.dcmread(file)
        if value is None:
            del data[keyword]
        else:
            data[keyword].value = value
        data.save_as(file)
    volume = read_volume(series)
    found = []
    for name in ("a.dcm", "b.dcm"):
        (note,) = save_dicom_seg(volume, {"liver": volume.hu > 0}, tmp_path / name)
        assert keyword in note
        seg = pydicom.dcmread(tmp_path / name)
        source = seg.ReferencedSeriesSequence[0] if keyword == "SeriesInstanceUID" else seg
        found.append(source[keyword].value)
    assert found[0] == found[1]
    assert pydicom.uid.UID(found[0]).is_valid
    assert str(found[0])


def test_segments_have_codes_sides_colours_and_a_description(tmp_path: Path) -> None:
    volume = read_volume(dicom_series(tmp_path / "ct", asymmetric((3, 8, 8))))
    names = ["right lung", "Left_Kidney", "lungs", "kidneys", "muscle", "liver", "something new", "a\\b"]
    save_dicom_seg(volume, dict.fromkeys(names, volume.hu > 0), tmp_path / "seg.dcm")
    seg = pydicom.dcmread(tmp_path / "seg.dcm")
    assert seg.SeriesDescription == SERIES_DESCRIPTION
    told = []
    for segment in seg.SegmentSequence:
        (kind,) = segment.SegmentedPropertyTypeCodeSequence
        side = [one.CodeValue for one in kind.get("SegmentedPropertyTypeModifierCodeSequence", [])]
        told.append((kind.CodeValue, kind.CodingSchemeDesignator, *side))
    assert told[:6] == [
        ("39607008", "SCT", "24028007"),
        ("64033007", "SCT", "7771000"),
        ("39607008", "SCT", "51440002"),
        ("64033007", "SCT", "51440002"),
        ("91727004", "SCT"),
        ("10200004", "SCT"),
    ]
    assert {one[1] for one in told[6:]} == {"99CTINSTRUCT"}
    assert len(set(told[6:])) == 2
    # muscle is a tissue, not an anatomical structure
    assert seg.SegmentSequence[4].SegmentedPropertyCategoryCodeSequence[0].CodeValue == "85756007"
    colours = [tuple(one.RecommendedDisplayCIELabValue) for one in seg.SegmentSequence]
    assert len(set(colours)) == len(names)
    assert [one.SegmentLabel for one in seg.SegmentSequence][-1] == "a b"
    assert all(len(code) == 3 for code in CODES.values())


def test_an_error_of_a_library_does_not_quote_the_patient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volume = read_volume(dicom_series(tmp_path / "ct", asymmetric((2, 8, 8))))

    def refuse(*_: Any) -> None:
        raise ValueError("Secret^Name 19500131")

    monkeypatch.setattr(dicom_seg, "_dataset", refuse)
    with pytest.raises(CTInstructError, match=r"^ct cannot be written as DICOM SEG \(ValueError\)\.$") as caught:
        save_dicom_seg(volume, {"liver": volume.hu > 0}, tmp_path / "seg.dcm")
    assert caught.value.__suppress_context__  # not in a traceback either
