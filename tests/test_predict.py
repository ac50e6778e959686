"""The main job as a user runs it: real processes, real scans."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from bad_scans import bad_files
from processes import WarmCommand
from pydicom.uid import MRImageStorage
from repository import shared
from scans import asymmetric, dicom_series

from ctinstruct_hf import CTInstructConfig, CTInstructVisionModel


def run(*arguments: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ctinstruct_hf.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def test_predict_writes_everything_on_the_scans_own_grid(small_scan: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("predict", "-i", small_scan, "-o", out, "--report", "--ask", "Is there a nodule?", "--segment", "liver,left lung", "--diagnose", "all")  # fmt: skip
    assert done.returncode == 0, done.stderr
    findings = json.loads((out / "findings.json").read_text())
    assert findings["source"] == "scan.nii.gz"
    assert findings["research_use_only"] is True
    assert findings["model"] == "ctinstruct-tiny"
    assert isinstance(findings["report"], str)
    assert findings["answers"][0]["question"] == "Is there a nodule?"
    assert {"cardiomegaly", "lung nodule", "kidney stone"} <= set(findings["diagnosis"])
    assert any("made-up scans" in note for note in findings["warnings"])
    assert all(0 <= value <= 1 for value in findings["diagnosis"].values())
    source = nib.load(small_scan)
    for name, numbers in findings["segmentation"].items():
        mask = nib.load(out / numbers["file"])
        assert mask.shape == source.shape, name
        assert np.array_equal(mask.affine, source.affine)
        assert int(np.asarray(mask.dataobj).sum()) == numbers["voxels"]
    assert set(findings["segmentation"]) == {"liver", "left lung"}
    assert "Research use only" in (out / "report.txt").read_text()
    assert "Research use only" in (out / "report.html").read_text()
    assert "Research use only" in done.stderr


@pytest.mark.parametrize("scan", ["abdomen/ct.nii.gz", "body_dicom"])
def test_real_scans_end_in_under_a_minute_with_masks_in_place(scan: str, tmp_path: Path) -> None:
    path, out = shared(f"data/{scan}"), tmp_path / "out"
    start = time.monotonic()
    done = run(
        "predict",
        "-i",
        path,
        "-o",
        out,
        "--report",
        "--segment",
        "liver,spine",
        "--diagnose",
        "phantom",
        "--ask",
        "What is seen?",
    )
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 60
    if path.is_dir():
        reader = SimpleITK.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(path)))
        theirs = reader.Execute()
        shape, affine = theirs.GetSize(), np.eye(4)
        affine[:3, :3] = np.reshape(theirs.GetDirection(), (3, 3)) * theirs.GetSpacing()
        affine[:3, 3] = theirs.GetOrigin()
        affine = np.diag([-1, -1, 1, 1]) @ affine
    else:
        shape, affine = nib.load(path).shape, nib.load(path).affine
    masks = sorted((out / "masks").iterdir())
    assert [file.name for file in masks] == ["liver.nii.gz", "spine.nii.gz"]
    for file in masks:
        assert nib.load(file).shape == shape
        assert np.allclose(nib.load(file).affine, affine, atol=1e-4)


def test_masks_as_nifti_and_dicom_seg_in_one_go(tmp_path: Path) -> None:
    pytest.importorskip("highdicom", reason="highdicom is not installed")
    series = dicom_series(tmp_path / "series", asymmetric((6, 32, 32)))
    done = run(
        "predict", "-i", series, "-o", tmp_path / "out", "--segment", "liver", "--output-type", "nifti", "dicom-seg"
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "masks.dcm").exists()
    assert (tmp_path / "out" / "masks" / "liver.nii.gz").exists()


def test_bad_input_is_one_sentence_and_leaves_nothing_behind(warm: WarmCommand, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    out = tmp_path / "results" / "out"
    for number, (name, (path, _)) in enumerate(bad_files(source).items()):
        done = (warm if number else run)("predict", "-i", path, "-o", out)  # imports say nothing, either
        assert done.returncode == 2, name
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert done.stderr.startswith("ctinstruct: ")
        assert "Traceback" not in done.stderr
        assert not out.exists(), name
    assert not list(tmp_path.glob("**/.out*"))


def test_one_of_the_ct_series_of_a_study_is_chosen(tmp_path: Path) -> None:
    study = tmp_path / "study"
    hu = asymmetric((6, 32, 32))
    dicom_series(study / "a", hu, SeriesInstanceUID="1.2.9.1", SeriesNumber=2, SeriesDescription="Lung [thin]")
    dicom_series(study / "b", hu[:4], SeriesInstanceUID="1.2.9.2", SeriesNumber=3, SeriesDescription="Soft tissue")
    dicom_series(
        study / "c",
        hu,
        SeriesInstanceUID="1.2.9.3",
        Modality="MR",
        SOPClassUID=MRImageStorage,
        SeriesDescription="Head",
    )
    done = run("predict", "-i", study, "-o", tmp_path / "out", "--segment", "liver")
    assert done.returncode == 2
    assert "holds 2 CT series: choose by --series" in done.stderr
    assert "Lung [thin]" in done.stderr
    assert "Soft tissue" in done.stderr
    assert "Left out: c: MR" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    done = run("predict", "-i", study, "-o", tmp_path / "out", "--segment", "LIVER", "--series", "soft")
    assert done.returncode == 0, done.stderr
    findings = json.loads((tmp_path / "out" / "findings.json").read_text())
    assert list(findings["segmentation"]) == ["LIVER"]
    assert findings["asked"]["series"] == "soft"
    mask = nib.load(tmp_path / "out" / findings["segmentation"]["LIVER"]["file"])
    assert mask.shape == (32, 32, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--diagnose", "nothing known"], "no head for nothing known"),
        (["--model", "/nowhere/at/all"], "neither a folder nor a name on the Hub"),
        (["--device", "cuda:7"], "cannot be used"),
        (["--device", "cpu,cpu"], "names 2 devices for one scan"),
        (["--names", "/nowhere/names.yaml"], "names.yaml cannot be read"),
        (["--dtype", "float7"], "use float32"),
        (["--spacing", "1,2"], "three numbers"),
        (["--output-type", "jpeg", "--segment", "liver"], "output type jpeg"),
    ],
)
def test_bad_options_are_one_sentence(
    warm: WarmCommand, small_scan: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    done = warm("predict", "-i", small_scan, "-o", tmp_path / "out", *options)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_of_scans_goes_on_after_a_bad_one(small_scan: Path, tmp_path: Path) -> None:
    folder = tmp_path / "scans"
    folder.mkdir()
    (folder / "a.nii.gz").write_bytes(small_scan.read_bytes())
    (folder / "b.nii.gz").write_bytes(b"broken")
    (folder / "c.nii.gz").write_bytes(small_scan.read_bytes())
    done = run("predict", "-i", folder, "-o", tmp_path / "out", "--segment", "liver", "--ml")
    assert done.returncode == 2
    assert "1 of 3 scans failed" in done.stderr
    assert "b.nii.gz" in done.stderr
    assert sorted(one.name for one in (tmp_path / "out").iterdir()) == ["a", "c", "failures.csv", "results.csv"]
    assert (tmp_path / "out" / "a" / "masks" / "labels.nii.gz").exists()


def test_the_demo_needs_no_network(tmp_path: Path) -> None:
    done = run("demo", "-o", tmp_path / "demo")
    assert done.returncode == 0, done.stderr
    page = tmp_path / "demo" / "results" / "report.html"
    assert str(page) in done.stdout
    assert page.read_text().count("<img") > 5


def test_help_is_quick_and_needs_neither_torch_nor_transformers() -> None:
    """Of the command as of the module that torchrun starts, of a verb as of all; processor time, since others compute too."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert "predict" in run("--help").stdout
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.75  # 0.5 on two quiet cores
    for program in (["-m", "ctinstruct_hf.cli"], [str(Path(sys.executable).with_name("ctinstruct"))]):
        for verb in ([], ["predict"], ["data", "prepare"]):
            command = [sys.executable, "-X", "importtime", *program, *verb, "--help"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            loaded = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
            assert "ctinstruct_hf.cli" in loaded
            assert not loaded & {"torch", "transformers", "numpy"}, (program, verb)


LOAD = """
import sys, threading, time
import torch
from ctinstruct_hf import CTInstructConfig, CTInstructVisionModel, CTInstructVisionModel

def own():  # memory of this process alone: pages of the weights' file are not in it
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024

CTInstructVisionModel.from_pretrained(sys.argv[2])  # whatever loading needs once
before, most, loading = own(), 0, True
def watch():
    global most
    while loading:
        most = max(most, own())
        time.sleep(0.001)
watcher = threading.Thread(target=watch)
watcher.start()
model = CTInstructVisionModel.from_pretrained(sys.argv[1])
loading = False
watcher.join()
print(max(most, own()) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_weights_are_mapped_not_copied(tmp_path: Path) -> None:
    """Loading a tower of some 200 MB takes a small part of that in memory of its own."""
    for name, width in (("large", 1024), ("small", 32)):
        config = CTInstructConfig.preset("tiny").vision_config
        config.bottleneck_planes = [width // 16, width // 8, width // 4, width // 2]
        CTInstructVisionModel(config).save_pretrained(tmp_path / name)
    size = (tmp_path / "large" / "model.safetensors").stat().st_size
    assert size > 50e6, size
    command = [sys.executable, "-c", LOAD, str(tmp_path / "large"), str(tmp_path / "small")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 0.3 * size
