"""Which DICOM images make a scan, which series is read, and what is never read."""

from __future__ import annotations

import gzip
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.uid import DeflatedExplicitVRLittleEndian
from scans import asymmetric, dicom_series, dicom_slice, enhanced, save

from ctinstruct_hf import CTInstructError, list_series, read_volume

MARKS: dict[str, tuple[Any, Any]] = {
    "ConvolutionKernel": ("B30f", "B70f"),
    "AcquisitionNumber": (1, 2),
    "TemporalPositionIdentifier": (1, 2),
    "FrameOfReferenceUID": ("1.2.3.4.6", "1.2.3.4.7"),
    "PatientID": ("A", "B"),
    "SeriesNumber": (1, 2),
    "KVP": (80, 140),
}


def places(count: int, start: float = 0.0, step: float = 2.0) -> list[np.ndarray]:
    return [np.array([0.0, 0.0, start + step * k]) for k in range(count)]


def two_stacks(folder: Path, start: float, mark: str | None, count: int = 12) -> tuple[Path, np.ndarray, np.ndarray]:
    """Twelve slices, and `count` others under the same SeriesInstanceUID from `start` on."""
    first, second = asymmetric((12, 8, 8)), asymmetric((count, 8, 8)) + np.int16(300)
    values = MARKS[mark] if mark else (None, None)
    dicom_series(folder / "b", first, positions=places(12), **({mark: values[0]} if mark else {}))
    dicom_series(folder / "a", second, positions=places(count, start), **({mark: values[1]} if mark else {}))
    return folder, first, second


@pytest.mark.parametrize("start", [0.0, 0.01, 1.0, 12.0], ids=lambda mm: f"from {mm} mm")
@pytest.mark.parametrize("mark", MARKS)
def test_two_stacks_under_one_series_uid_are_never_mixed(mark: str, start: float, tmp_path: Path) -> None:
    folder, first, second = two_stacks(tmp_path, start, mark)
    with pytest.raises(CTInstructError, match="2 CT series"):
        read_volume(folder)
    stacks = list_series(folder)
    assert len({one.uid for one in stacks}) == 2
    read = [read_volume(folder, series=one.uid).hu for one in stacks]
    assert sorted(int(hu.max()) for hu in read) == [1000, 1300]
    assert all(np.array_equal(hu, first if hu.max() == 1000 else second) for hu in read)


@pytest.mark.parametrize(
    "mark", ["ConvolutionKernel", "FrameOfReferenceUID", "PatientID", "TemporalPositionIdentifier"]
)
def test_what_differs_in_kernel_phase_frame_or_patient_is_not_stacked_either(mark: str, tmp_path: Path) -> None:
    folder, first, _ = two_stacks(tmp_path, 24.0, mark)
    with pytest.raises(CTInstructError, match="2 CT series"):
        read_volume(folder)
    assert any(np.array_equal(read_volume(folder, series=one.uid).hu, first) for one in list_series(folder))


def test_acquisitions_behind_each_other_are_one_scan(tmp_path: Path) -> None:
    folder, first, second = two_stacks(tmp_path, 24.0, "AcquisitionNumber")
    volume = read_volume(folder)
    assert np.array_equal(volume.hu, np.concatenate([first, second]))
    assert any("2 acquisitions" in note for note in volume.warnings)


@pytest.mark.parametrize(("start", "count"), [(0.0, 12), (0.0, 11), (0.0, 5), (0.01, 12), (0.3, 12), (12.0, 12)])
def test_stacks_that_nothing_tells_apart_are_refused(start: float, count: int, tmp_path: Path) -> None:
    folder, _, _ = two_stacks(tmp_path, start, None, count)
    with pytest.raises(CTInstructError, match="nothing in their headers tells them apart"):
        read_volume(folder)


@pytest.mark.parametrize("mark", ["temporal", "stack"])
def test_phases_and_stacks_of_an_enhanced_file_are_scans_of_their_own(mark: str, tmp_path: Path) -> None:
    import pydicom

    hu = np.concatenate([asymmetric((6, 8, 9)), asymmetric((6, 8, 9)) + np.int16(300)])
    data = pydicom.dcmread(enhanced(hu, tmp_path / "e.dcm"))
    for index, group in enumerate(data.PerFrameFunctionalGroupsSequence):
        k = 11 - index  # the frames go from the head down
        content = pydicom.Dataset()
        if mark == "temporal":
            content.TemporalPositionIndex = 1 + k // 6
        else:
            content.StackID = str(1 + k // 6)
        group.FrameContentSequence = [content]
        group.PlanePositionSequence[0].ImagePositionPatient = [
            0.0,
            0.0,
            2.0 * (k % 6 + (0 if mark == "temporal" else k // 6 * 60)),
        ]
    data.save_as(tmp_path / "e.dcm")
    with pytest.raises(CTInstructError, match=rf"2 CT series.*{mark}.* 1.*{mark}.* 2"):
        read_volume(tmp_path / "e.dcm")
    assert np.array_equal(read_volume(tmp_path / "e.dcm", series=list_series(tmp_path)[1].uid).hu, hu[6:])


def test_copies_in_two_folders_are_read_once(tmp_path: Path) -> None:
    hu = asymmetric((6, 8, 8))
    for file in dicom_series(tmp_path / "study" / "a", hu).iterdir():
        copy = tmp_path / "study" / "backup" / file.name
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(file.read_bytes())
    volume = read_volume(tmp_path / "study")
    assert np.array_equal(volume.hu, hu)
    assert any("6 images lie there twice" in note for note in volume.warnings)


def test_rounding_in_orientation_and_spacing_loses_no_slice(tmp_path: Path) -> None:
    hu = asymmetric((12, 8, 8))
    folder = dicom_series(
        tmp_path / "a",
        hu,
        PixelSpacing=[[0.78125 + 1e-6 * (k % 2)] * 2 for k in range(12)],
    )
    import pydicom

    for number, file in enumerate(sorted(folder.iterdir())):
        data = pydicom.dcmread(file)
        a = 0.7065 + (1e-6 if number % 2 else -1e-6)
        b = np.sqrt(1 - a * a)
        data.ImageOrientationPatient = [float(f"{v:.8f}") for v in (a, b, 0, -b, a, 0)]
        data.save_as(file)
    volume = read_volume(folder)
    assert volume.hu.size == hu.size
    assert volume.warnings == []


@pytest.mark.parametrize(("tag", "word"), [("ImagePositionPatient", "position"), ("ImageOrientationPatient", "orientation")])  # fmt: skip
def test_a_slice_without_place_is_left_out_by_name_and_a_series_of_such_is_refused(
    tag: str, word: str, tmp_path: Path
) -> None:
    import pydicom

    hu = asymmetric((8, 8, 8))
    folder = dicom_series(tmp_path / "a", hu)
    files = sorted(folder.iterdir())
    for number, file in enumerate(files):
        data = pydicom.dcmread(file)
        delattr(data, tag)
        data.save_as(file)
        if number == 0:
            volume = read_volume(folder)
            assert volume.source.shape == (8, 8, 7)
            assert any(word in note and file.name in note for note in volume.warnings)
    with pytest.raises(CTInstructError, match=f"no slice {word}"):
        read_volume(folder)
    assert any(f"no {word}" in note for note in read_volume(files[0]).warnings)  # a single image needs no order


@pytest.mark.parametrize("bare", ["all", "some", "without meta header"])
def test_files_without_preamble_are_read_like_the_others(bare: str, tmp_path: Path) -> None:
    import pydicom

    hu = asymmetric((6, 8, 8))
    folder = dicom_series(tmp_path / "a", hu)
    for number, file in enumerate(sorted(folder.iterdir())):
        if bare == "without meta header":
            data = pydicom.dcmread(file)
            del data.file_meta
            data.save_as(file, implicit_vr=True, little_endian=True, enforce_file_format=False)
        elif bare == "all" or number > 3:
            file.write_bytes(file.read_bytes()[132:])
    volume = read_volume(folder)
    assert np.array_equal(volume.hu, hu)
    pytest.importorskip("highdicom")
    from ctinstruct_hf.output.dicom_seg import save_dicom_seg

    save_dicom_seg(volume, {"liver": hu == 1000}, tmp_path / "seg.dcm")
    assert pydicom.dcmread(tmp_path / "seg.dcm").NumberOfFrames == 2


@pytest.mark.parametrize("stray", [[0.0, 0.0, 10_000.0], [0.0, 0.0, -300.0], [5_000.0, 0.0, 16.0]])
def test_a_stray_slice_is_left_out_by_name_and_allocates_nothing(stray: list[float], tmp_path: Path) -> None:
    hu = asymmetric((8, 8, 8))
    folder = dicom_series(tmp_path / "a", hu, positions=places(8))
    save(dicom_slice(np.ascontiguousarray(hu[0]), ImagePositionPatient=stray), folder / "stray")
    volume = read_volume(folder, max_bytes=10_000)
    assert np.array_equal(volume.hu, hu)
    assert any("stray" in note for note in volume.warnings)


def test_two_stacks_far_apart_ask_which(tmp_path: Path) -> None:
    hu = asymmetric((16, 8, 8))
    folder = dicom_series(tmp_path / "a", hu, positions=[*places(8), *places(8, 138.0)])
    with pytest.raises(CTInstructError, match=r"2 CT series.*0 to 14 mm.*138 to 152 mm"):
        read_volume(folder)
    assert np.array_equal(read_volume(folder, series="138 to").hu, hu[8:])


def test_the_size_is_checked_after_resampling_too(tmp_path: Path) -> None:
    hu = asymmetric((8, 8, 8))
    gap = [*places(4), *places(4, 19.0)]
    folder = dicom_series(tmp_path / "a", hu, positions=gap)
    assert read_volume(folder).shape[0] == 13
    with pytest.raises(CTInstructError, match=r"13 x 8 x 8.*pass max_bytes"):
        read_volume(folder, max_bytes=2_000)


def test_a_deflated_file_inflates_no_further_than_allowed(tmp_path: Path) -> None:
    hu = asymmetric((1, 64, 64))
    data = dicom_slice(np.ascontiguousarray(hu[0]))
    data.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    path = save(data, tmp_path / "deflated")
    assert np.array_equal(read_volume(path).hu, hu)
    packed = zlib.compressobj(wbits=-15)
    raw = path.read_bytes()
    meta = raw[: 132 + 12 + int.from_bytes(raw[140:144], "little")]
    path.write_bytes(meta + packed.compress(bytes(50 * 2**20)) + packed.flush())
    with pytest.raises(CTInstructError, match="inflates to more"):
        read_volume(path, max_bytes=2**20)


def test_images_that_are_no_ct_slices_do_not_refuse_the_series(tmp_path: Path) -> None:
    hu = asymmetric((8, 8, 8))
    folder = dicom_series(tmp_path / "a", hu)
    save(dicom_slice(hu[0], SamplesPerPixel=3, PhotometricInterpretation="RGB"), folder / "colour")
    save(dicom_slice(hu[0], ImageOrientationPatient=[1, 0, 0, 0, 0, -1]), folder / "unmarked_scout")
    volume = read_volume(folder)
    assert np.array_equal(volume.hu, hu)
    assert any("colour" in note for note in volume.warnings)
    assert any("unmarked_scout" in note for note in volume.warnings)


def test_half_of_a_series_on_another_grid_asks_which(tmp_path: Path) -> None:
    hu = asymmetric((6, 8, 8))
    dicom_series(tmp_path / "a", hu)
    dicom_series(tmp_path / "b", np.repeat(np.repeat(hu, 2, 1), 2, 2), PixelSpacing=[0.75, 0.5])
    with pytest.raises(CTInstructError, match=r"2 CT series.*16 x 16 pixels.*8 x 8 pixels"):
        read_volume(tmp_path)


def test_dicomdir_and_packed_files_say_what_to_do(tmp_path: Path) -> None:
    hu = asymmetric((3, 8, 8))
    folder = dicom_series(tmp_path / "a", hu)
    index = dicom_slice(hu[0], SOPClassUID="1.2.840.10008.1.3.10", Modality=None)
    save(index, folder / "DICOMDIR")
    assert np.array_equal(read_volume(folder).hu, hu)
    with pytest.raises(CTInstructError, match=r"DICOMDIR is the index.*give the folder"):
        read_volume(folder / "DICOMDIR")
    (tmp_path / "packed").mkdir()
    for file in folder.iterdir():
        (tmp_path / "packed" / f"{file.name}.dcm.gz").write_bytes(gzip.compress(file.read_bytes()))
    with pytest.raises(CTInstructError, match="packed by gzip: unpack it first"):
        read_volume(tmp_path / "packed")


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    hu = asymmetric((4, 8, 8))
    folder = dicom_series(tmp_path / "given", hu)
    elsewhere = dicom_series(tmp_path / "elsewhere", hu, SeriesInstanceUID="1.2.9")
    (folder / "one").symlink_to(elsewhere / "IM0000")
    (folder / "all").symlink_to(elsewhere)
    (folder / "inside").symlink_to(folder / "IM0000")
    found = list_series(folder)
    assert [one.slices for one in found] == [4]
    assert sorted(one.name for one in found.skipped) == ["all", "one"]
    volume = read_volume(folder)
    assert np.array_equal(volume.hu, hu)
    assert any("link out of the folder" in note for note in volume.warnings)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """patient/study/series as an archive exports it: three CT series, a scout, PT, MR and a dose report."""
    root = tmp_path_factory.mktemp("export")
    folder, hu = root / "patient" / "study", asymmetric((12, 8, 8))
    made: list[dict[str, Any]] = [
        {"SeriesNumber": 2, "SeriesDescription": "Thorax 5.0 B30f", "hu": hu[::5], "step": (0.0, 0.0, 10.0)},
        {"SeriesNumber": 3, "SeriesDescription": "Thorax 2.0 B70f", "hu": hu},
        {"SeriesNumber": 5, "SeriesDescription": "Abdomen", "hu": hu[:6], "step": (0.0, 0.0, 1.0)},
        {"SeriesNumber": 7, "SeriesDescription": "WB", "Modality": "PT", "hu": hu[:3]},
        {"SeriesNumber": 8, "SeriesDescription": "T1", "Modality": "MR", "hu": hu[:2]},
        {"SeriesNumber": 9, "Modality": "SR", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.88.67", "hu": hu[:1]},
        {"SeriesNumber": 1, "ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"], "hu": hu[:1]},
    ]
    for tags in made:
        number = tags["SeriesNumber"]
        dicom_series(folder / f"series{number}", tags.pop("hu"), SeriesInstanceUID=f"1.2.{number}", **tags)
    (folder / "notes.txt").write_text("not DICOM")
    return root


def test_list_series_finds_ct_at_any_depth_and_names_the_rest(study: Path) -> None:
    found = list_series(study)
    assert [(one.uid, one.number, one.description, one.modality, one.slices) for one in found] == [
        ("1.2.2", 2, "Thorax 5.0 B30f", "CT", 3),
        ("1.2.3", 3, "Thorax 2.0 B70f", "CT", 12),
        ("1.2.5", 5, "Abdomen", "CT", 6),
    ]
    assert [one.spacing for one in found] == [(10.0, 1.5, 1.0), (2.0, 1.5, 1.0), (1.0, 1.5, 1.0)]
    assert [len(one.files) for one in found] == [3, 12, 6]
    assert {(one.name, one.modality, len(one.files)) for one in found.skipped} == {
        ("PT 7 WB", "PT", 3),
        ("MR 8 T1", "MR", 2),
        ("dose report or other SR 9", "dose report or other SR", 1),
        ("scout 1", "scout", 1),
    }
    file = found[2].files[0]
    assert [one.slices for one in list_series(file)] == [1]
    assert list_series(study / "patient" / "study" / "notes.txt") == []


def test_list_series_of_a_zip_is_that_of_its_folder(study: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "study.zip", "w") as archive:
        for file in study.rglob("*"):
            archive.write(file, file.relative_to(study))
    found = list_series(tmp_path / "study.zip")
    assert [str(one) for one in found] == [str(one) for one in list_series(study)]
    assert all(one.files == [tmp_path / "study.zip"] for one in found)
    assert len(found.skipped) == 4
    assert read_volume(tmp_path / "study.zip", series="abdomen").shape == (6, 8, 8)
    with pytest.raises(CTInstructError, match="GiB allowed"):
        list_series(tmp_path / "study.zip", max_bytes=1000)


@pytest.mark.parametrize(("series", "number"), [("1.2.3", 3), (5, 5), ("5", 5), ("b70F", 3), ("abdomen", 5), ("Largest", 3), ("thinnest", 5)])  # fmt: skip
def test_a_series_is_chosen_by_uid_number_description_or_size(series: str | int, number: int, study: Path) -> None:
    wanted = next(one for one in list_series(study) if one.number == number)
    volume = read_volume(study, series=series)
    assert volume.source.dicom_files == wanted.files
    assert any("3 PT" in note and "1 scout" in note for note in volume.warnings)


@pytest.mark.parametrize(
    ("series", "message"),
    [
        (
            None,
            r"3 CT series, name one as series=: 1\.2\.2 \(number 2, 'Thorax 5.0 B30f', 3 slices every 10 mm\), 1\.2\.3",
        ),
        ("thorax", r"2 CT series that fit series=thorax, name one: 1\.2\.2.*1\.2\.3"),
        ("7", r"no CT series 7; it has 1\.2\.2"),
        ("all", "'all' means several"),
    ],
)
def test_an_unclear_choice_lists_what_there_is(series: str | None, message: str, study: Path) -> None:
    with pytest.raises(CTInstructError, match=message):
        read_volume(study, series=series)


def test_no_listing_names_the_patient(tmp_path: Path) -> None:
    folder, _, _ = two_stacks(tmp_path, 0.0, "PatientID")
    found = list_series(folder)
    with pytest.raises(CTInstructError) as error:
        read_volume(folder)
    shown = f"{found} {found.skipped} {[one.images for one in found]} {error.value}"
    assert "Secret" not in shown
    assert "SECRET" not in shown
    assert [one.description for one in found] == ["(patient 1)", "(patient 2)"]


def test_a_broken_member_of_a_zip_is_named_and_its_index_is_not(tmp_path: Path) -> None:
    hu = asymmetric((4, 8, 8))
    folder = dicom_series(tmp_path / "a", hu)
    save(dicom_slice(hu[0], SOPClassUID="1.2.840.10008.1.3.10", Modality=None), folder / "DICOMDIR")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for file in folder.iterdir():
            archive.write(file, f"disc/{file.name}")
        archive.writestr("disc/BROKEN 1", (folder / "IM0000").read_bytes()[:200])
    volume = read_volume(tmp_path / "a.zip")
    assert np.array_equal(volume.hu, hu)
    assert len(volume.warnings) == 1
    assert "BROKEN_1" in volume.warnings[0]
