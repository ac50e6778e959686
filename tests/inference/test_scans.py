"""One walk finds every scan below the inputs and says what it leaves out."""

from __future__ import annotations

import gzip
import os
import shutil
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from pydicom.uid import MRImageStorage
from scans import asymmetric, dicom_series

from ctinstruct_hf.errors import CTInstructError
from ctinstruct_hf.inference.scans import Scan, Scans, find_scans
from ctinstruct_hf.processing.volume import read_volume
from ctinstruct_hf.threads import choose_threads, cores, threads_by_load

HU = asymmetric((4, 12, 14))


def found(scans: Scans) -> dict[str, str | None]:
    return {scan.name: scan.series for scan in scans}


def left_out(scans: Scans) -> dict[str, str]:
    return {path.name: reason for path, reason in scans.skipped}


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A study folder as an archive writes it: two CT series, a scout, and an MR series."""
    folder = tmp_path / "archive" / "patient" / "study"
    tags = {"StudyInstanceUID": "1.2.9", "FrameOfReferenceUID": "1.2.9.9"}
    dicom_series(folder / "thin", HU, SeriesInstanceUID="1.2.9.1", SeriesNumber=2, SeriesDescription="Lung thin 1.0", SliceThickness=2.0, **tags)  # fmt: skip
    dicom_series(folder / "thick", HU[:3], step=(0, 0, 5.0), SeriesInstanceUID="1.2.9.2", SeriesNumber=3, SeriesDescription="Soft tissue", **tags)  # fmt: skip
    dicom_series(folder / "mr", HU, SeriesInstanceUID="1.2.9.3", SeriesNumber=5, Modality="MR", SOPClassUID=MRImageStorage, SeriesDescription="Head", **tags)  # fmt: skip
    return folder


def test_volume_files_and_series_are_found_at_any_depth(study: Path) -> None:
    root = study.parents[1]
    np.save(root / "top.npy", HU)
    (root / "other" / "deep").mkdir(parents=True)
    np.save(root / "other" / "deep" / "volume.npy", HU)
    (root / "other" / "deep" / "volume.json").write_text('{"spacing": [2, 1, 1]}')
    (root / "other" / "letter.pdf").write_bytes(b"%PDF-1.4")
    scans = find_scans([root])
    assert found(scans) == {
        "top": None,
        "other-deep-volume": None,
        "patient-study-thin": "1.2.9.1",
        "patient-study-thick": "1.2.9.2",
    }
    assert {scan.name: len(scan.files) for scan in scans}["other-deep-volume"] == 2
    reasons = left_out(scans)
    assert reasons["letter.pdf"] == "no scan in a format that can be read"
    assert any("MR" in reason for reason in reasons.values())
    assert len(reasons) == 2
    for scan in scans:
        assert read_volume(scan.path, series=scan.series, spacing=(2, 1, 1)).hu.shape[1:] == HU.shape[1:]


def test_volume_files_are_found_by_their_first_bytes_whatever_their_names(study: Path, tmp_path: Path) -> None:
    folder = tmp_path / "downloads"
    folder.mkdir()
    image = nib.Nifti1Image(HU, np.diag([1.0, 1.0, 2.0, 1.0]))
    nib.save(image, folder / "a.nii.gz")
    for name in ("scan.nii (1).gz", "b.download"):
        shutil.copy(folder / "a.nii.gz", folder / name)
    nib.save(image, tmp_path / "plain.nii")
    shutil.copy(tmp_path / "plain.nii", folder / "plain")
    nib.save(nib.Nifti1Pair(HU, image.affine), folder / "pair.img")
    stored = sitk.GetImageFromArray(HU)
    for suffix in ("mha", "nrrd"):
        sitk.WriteImage(stored, str(tmp_path / f"x.{suffix}"))
        shutil.copy(tmp_path / f"x.{suffix}", folder / f"{suffix}.bin")
    shutil.make_archive(str(tmp_path / "packed"), "zip", study / "thin")
    shutil.move(tmp_path / "packed.zip", folder / "packed.part")
    with zipfile.ZipFile(folder / "slides.pptx", "w") as archive:
        archive.writestr("slide.xml", "<a/>")
    with gzip.open(folder / "mha.gz", "wb") as packed:
        packed.write((tmp_path / "x.mha").read_bytes())
    (folder / "notes.txt").write_text("ObjectType is written here, too")
    scans = find_scans([folder])
    names = {"a.nii.gz", "scan.nii (1).gz", "b.download", "plain", "pair.hdr", "mha.bin", "nrrd.bin", "packed.part"}
    assert {scan.path.name for scan in scans} == names
    assert {file.name for scan in scans if scan.path.name == "pair.hdr" for file in scan.files} == {
        "pair.hdr",
        "pair.img",
    }
    assert left_out(scans) == {
        "slides.pptx": "no scan in a format that can be read",
        "notes.txt": "no scan in a format that can be read",
        "mha.gz": "packed by gzip: unpack it first",
    }
    assert all(read_volume(scan.path).hu.size == HU.size for scan in scans)


@pytest.mark.parametrize(
    ("series", "uids"),
    [
        (None, {"1.2.9.1", "1.2.9.2"}),
        ("all", {"1.2.9.1", "1.2.9.2"}),
        ("1.2.9.2", {"1.2.9.2"}),
        ("3", {"1.2.9.2"}),
        ("lung THIN", {"1.2.9.1"}),
        ("largest", {"1.2.9.1"}),
        ("thinnest", {"1.2.9.1"}),
    ],
)
def test_series_are_chosen_by_study(study: Path, series: str | None, uids: set[str]) -> None:
    for root in (study.parents[1], study):
        scans = find_scans([root], series)
        assert {scan.series for scan in scans} == uids
        assert scans.is_one_study([root])
    assert len(scans) + sum("takes another" in reason for _, reason in scans.skipped) == 2


def test_a_series_that_no_study_has_is_refused_with_the_list(study: Path) -> None:
    with pytest.raises(CTInstructError, match=r"no series fits --series bone: ") as refused:
        find_scans([study], "bone")
    assert "Lung thin 1.0" in str(refused.value)
    assert "Soft tissue" in str(refused.value)


def test_series_of_one_folder_have_names_of_their_own(study: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, file in enumerate(sorted(study.rglob("IM*"))):
        shutil.copy(file, flat / f"I{number}")
    assert found(find_scans([flat])) == {"flat-2": "1.2.9.1", "flat-3": "1.2.9.2"}
    archive = shutil.make_archive(str(tmp_path / "study"), "zip", flat)
    zipped = find_scans([Path(archive)])
    assert found(zipped) == {"study-2": "1.2.9.1", "study-3": "1.2.9.2"}
    assert zipped.is_one_study([Path(archive)])
    assert read_volume(zipped[1].path, series=zipped[1].series).hu.shape[0] >= 3


def test_scans_under_one_uid_in_two_folders_are_two_patients(tmp_path: Path) -> None:
    for patient in ("a", "b"):
        dicom_series(tmp_path / "all" / "sub" / patient, HU, PatientID=patient, PatientName=patient)
    scans = find_scans([tmp_path / "all"])
    assert [scan.name for scan in scans] == ["sub-a", "sub-b"]
    same = dicom_series(tmp_path / "same" / "a", HU).parent
    dicom_series(same / "b", HU)
    assert not find_scans([same]).is_one_study([same])
    assert len(find_scans([same], "largest")) == 2
    for scan in scans:
        assert read_volume(scan.path, series=scan.series).hu.shape == HU.shape


def test_results_of_an_earlier_run_and_links_out_are_no_scans(study: Path, tmp_path: Path) -> None:
    root = study.parents[1]
    (root / "out" / "masks").mkdir(parents=True)
    (root / "out" / "findings.json").write_text("{}")
    np.save(root / "out" / "masks" / "liver.npy", HU)
    np.save(tmp_path / "outside.npy", HU)
    (root / "link.npy").symlink_to(tmp_path / "outside.npy")
    (root / "folder").symlink_to(tmp_path, target_is_directory=True)
    scans = find_scans([root])
    assert len(scans) == 2
    reasons = left_out(scans)
    assert reasons["out"] == "results of an earlier run"
    assert reasons["link.npy"] == "a link out of the folder"
    assert "not followed" in reasons["folder"]


def test_a_fingerprint_follows_the_contents_not_the_times(study: Path, tmp_path: Path) -> None:
    scan = Scan(study / "thin")
    copy = Scan(Path(shutil.copytree(study / "thin", tmp_path / "copy")))
    before = scan.fingerprint()
    assert before == copy.fingerprint()
    file = sorted((tmp_path / "copy").iterdir())[0]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert copy.fingerprint() != before
    assert Scan(study, "1.2.9.1").fingerprint() != Scan(study, "1.2.9.2").fingerprint()
    before, times = copy.fingerprint(), file.stat()
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert copy.fingerprint() != before


@pytest.mark.parametrize(
    ("count", "load", "workers", "threads"),
    [(16, 0.2, 1, 16), (16, 5.0, 1, 11), (16, 40.0, 1, 8), (2, 9.0, 1, 2), (1, 3.0, 1, 1), (16, 0.0, 4, 4), (2, 0.0, 8, 1)],
)  # fmt: skip
def test_threads_leave_the_cores_that_others_use(count: int, load: float, workers: int, threads: int) -> None:
    assert threads_by_load(count, load, workers) == threads


def test_threads_wait_without_spinning_unless_the_user_wants_otherwise(tmp_path: Path) -> None:
    chosen: dict[str, str] = {}
    threads = choose_threads(environment=chosen, asked="")
    assert chosen == {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0", "OMP_NUM_THREADS": str(threads)}
    wanted = {"OMP_WAIT_POLICY": "ACTIVE"}
    assert choose_threads(2, wanted, asked="3") == 3
    assert wanted["OMP_WAIT_POLICY"] == "ACTIVE"
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    assert cores(tmp_path) == 1
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cores(tmp_path) == cores(tmp_path / "none")
