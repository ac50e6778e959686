"""Unique strings in every text element of a DICOM series: none of them may come out anywhere."""

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pydicom
import pytest
from processes import WarmCommand
from pydicom.datadict import DicomDictionary
from running import Running
from scans import asymmetric, dicom_series

LENGTHS = {"PN": 64, "LO": 64, "SH": 16, "ST": 64, "LT": 64, "UT": 64, "UC": 64, "AE": 16}
MEANING = {"SpecificCharacterSet", "RescaleType"}  # these say how to read the pixels and the text
# what ties a segmentation to its patient and study in the standard (PS3.3, patient and general study modules)
NEEDED_IN_SEG = {
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyID", "StudyDate", "StudyTime", "AccessionNumber",
    "ReferringPhysicianName",
}  # fmt: skip


def planted(tag: int, kind: str) -> str:
    """A string that says where it was put, and would run as a script if a page let it."""
    name = f"PLANT{tag:08X}"
    return f"<script>{name}</script>" if LENGTHS[kind] > 30 else name


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six slices with something in every text element and date of the dictionary that is in use."""
    folder = dicom_series(tmp_path_factory.mktemp("private") / "study", asymmetric((6, 32, 32)))
    for file in folder.iterdir():
        data = pydicom.dcmread(file)
        for tag, (kind, _, _, retired, keyword) in DicomDictionary.items():
            if retired or keyword in MEANING or tag < 0x00080000 or not keyword:
                continue
            if kind in LENGTHS:
                data.add_new(tag, kind, planted(tag, kind))
        data.PatientBirthDate, data.StudyDate, data.SeriesDate, data.AcquisitionDate = "18730114", "18730115", "18730116", "18730117"  # fmt: skip
        data.PatientAge = "137Y"
        data.save_as(file)
    return folder


def leaks(content: bytes) -> set[str]:
    """What was planted and is in these bytes, or in the pictures within: in their base64 itself, four letters are chance."""
    content = re.sub(rb"base64,([0-9A-Za-z+/=]+)", lambda match: base64.b64decode(match[1]), content)
    found = {match.decode() for match in re.findall(rb"PLANT[0-9A-F]{8}", content)}
    return found | {match.decode() for match in re.findall(rb"1873011[4-7]|1873-01-1[4-7]|137Y", content)}


def test_enough_is_planted(series: Path) -> None:
    content = next(series.iterdir()).read_bytes()
    assert len(leaks(content)) > 500
    assert b"<script>PLANT00100010" in content
    assert b"<script>PLANT0008103E" in content  # SeriesDescription


def test_nothing_comes_out_of_a_prediction(series: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ctinstruct_hf.cli", "--debug", "predict", "-i", str(series), "-o", str(tmp_path / "out"),
               "--report", "--diagnose", "phantom", "--segment", "liver", "--ask", "Is there a nodule?",
               "--output-type", "nifti", "dicom-seg"]  # fmt: skip
    told = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONWARNINGS": "default"}, check=False)
    assert told.returncode == 0, told.stderr[-2000:]
    assert not leaks(told.stdout + told.stderr)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".json", ".html", ".txt", ".gz", ".dcm"}
    for path in files:
        if path.suffix != ".dcm":
            assert not leaks(path.read_bytes()), path
    seg = pydicom.dcmread(next(path for path in files if path.suffix == ".dcm"))
    copied = {element.keyword for element in seg.iterall() if element.VR not in ("OB", "OW") and leaks(str(element.value).encode())}  # fmt: skip
    assert {"PatientName", "PatientID"} <= copied
    assert copied <= NEEDED_IN_SEG, copied - NEEDED_IN_SEG


@pytest.mark.parametrize("broken", ["several series", "no pixels", "cut"])
def test_nothing_comes_out_of_an_error(warm: WarmCommand, series: Path, tmp_path: Path, broken: str) -> None:
    folder = tmp_path / "study"
    folder.mkdir()
    for number, file in enumerate(sorted(series.iterdir())):
        data = pydicom.dcmread(file)
        if broken == "several series" and number % 2:
            data.SeriesInstanceUID = "1.2.3.4.9"
        if broken == "no pixels":
            del data.PixelData
        data.save_as(folder / file.name)
        if broken == "cut":
            content = (folder / file.name).read_bytes()
            (folder / file.name).write_bytes(content[: len(content) - 500])
    told = warm("predict", "-i", folder, "-o", tmp_path / "out", "--report")
    if broken != "several series":
        assert told.returncode == 2
    # several series are listed by their descriptions, to choose from
    listed = {"PLANT0008103E"} if broken == "several series" else set()
    assert leaks((told.stdout + told.stderr).encode()) <= listed, told.stderr
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file():
            assert not leaks(path.read_bytes()), path


def test_nothing_comes_out_of_the_page(series: Path, untrained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:  # fmt: skip
    packed = tmp_path / "study.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for file in series.iterdir():
            archive.write(file, file.name)
    server = Running(str(untrained))
    try:
        study = server.open(packed)
        assert not leaks(server.client.get(f"/api/studies/{study}").content)
        for kind in ("ask", "report"):
            assert not leaks(server.ask(study, kind=kind, question="Is there a nodule?").content)
        for name in ("findings.json", "report.txt", "report.html"):
            got = server.client.get(f"/api/studies/{study}/results/{name}")
            assert got.status_code == 200
            assert not leaks(got.content), name
        assert not leaks(server.client.get(f"/api/studies/{study}/scan.nii").content)
    finally:
        server.close()
    assert not leaks(caplog.text.encode())


def test_code_in_a_models_folder_is_not_run(untrained: Path, tmp_path: Path, small_scan: Path) -> None:
    """A model somebody sends: its weights are read, its Python files are not."""
    folder, mark = tmp_path / "model", tmp_path / "it-ran"
    shutil.copytree(untrained, folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in folder.glob("*.py"):
        file.write_text(f"open({str(mark)!r}, 'w').close()\n")
    for arguments in (
        ["predict", "-i", str(small_scan), "-o", str(tmp_path / "out"), "--model", str(folder), "--segment", "liver"],
        ["evaluate", "--model", str(folder), "--data", "phantoms:trunk:900100-900101", "-o", str(tmp_path / "scores"), "--tasks", "question", "--limit", "1"],
        ["card", str(folder)],
    ):  # fmt: skip
        done = subprocess.run([sys.executable, "-m", "ctinstruct_hf.cli", *arguments], capture_output=True, text=True, input="y\n", check=False)  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        assert not mark.exists(), arguments
