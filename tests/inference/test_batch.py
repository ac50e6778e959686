"""Many scans in one run: the same answers from every engine, and nothing lost on the way."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import psutil
import pytest

from ctinstruct_hf import __version__
from ctinstruct_hf.errors import CTInstructError
from ctinstruct_hf.inference.batch import Outcome, Task, plan, predict_studies, write_table
from ctinstruct_hf.inference.predict import Request, find_scans
from ctinstruct_hf.inference.study import BUNDLED_MODEL

ASK = Request(questions=["Is there emphysema?"], structures=["liver"], diagnose="phantom")


@pytest.fixture
def scans(small_scan: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "scans"
    folder.mkdir()
    for name in ("a", "b", "c"):
        (folder / f"{name}.nii.gz").write_bytes(small_scan.read_bytes())
    (folder / "bad.nii.gz").write_bytes(b"broken")
    return folder


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def answers(output: Path) -> dict[str, dict[str, object]]:
    found = {}
    for file in sorted(output.glob("*/findings.json")):
        found[file.parent.name] = {**json.loads(file.read_text()), "date": None}  # of the run
    return found


def test_a_run_ends_with_a_table_and_goes_on_where_it_stopped(scans: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    first = predict_studies(find_scans([scans])[:2], output, ASK)
    assert [one.status for one in first] == ["done", "done"]
    told: list[tuple[int, int, str]] = []
    second = predict_studies(find_scans([scans]), output, ASK, tell=lambda *step: told.append(step))
    assert {one.study: one.status for one in second} == {"a": "kept", "b": "kept", "bad": "failed", "c": "done"}
    assert told[-1][:2] == (4, 4)
    rows = {row["study"]: row for row in table(output / "results.csv")}
    assert set(rows) == {"a", "b", "bad", "c"}
    findings = answers(output)["a"]
    assert float(rows["a"]["probability cardiomegaly"]) == findings["diagnosis"]["cardiomegaly"]
    assert float(rows["c"]["liver (ml)"]) == findings["segmentation"]["liver"]["volume_ml"]
    assert rows["a"]["Is there emphysema?"].lstrip("'") == findings["answers"][0]["answer"]
    (failure,) = table(output / "failures.csv")
    assert failure["study"] == "bad"
    assert "bad.nii.gz" in failure["error"]
    # another request is another answer
    third = predict_studies([scans / "a.nii.gz"], output, Request(structures=["spleen"]))
    assert third[0].status == "done"
    assert list(answers(output)["a"]["segmentation"]) == ["spleen"]
    assert predict_studies([scans / "a.nii.gz"], output, Request(structures=["spleen"]), restart=True)[0].status == "done"  # fmt: skip


@pytest.mark.parametrize("engine", ["local", pytest.param("ray", marks=pytest.mark.slow)])
def test_several_processes_write_what_one_does(scans: Path, tmp_path: Path, engine: str) -> None:
    if engine == "ray":
        pytest.importorskip("ray", reason="Ray is not installed")
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    predict_studies(find_scans([scans]), alone, ASK, devices=["cpu"])
    outcomes = predict_studies(find_scans([scans]), shared, ASK, workers=2, devices=["cpu"], engine=engine)
    assert {one.study: one.status for one in outcomes} == {"a": "done", "b": "done", "bad": "failed", "c": "done"}
    assert answers(shared) == answers(alone)
    for mask in alone.glob("*/masks/*.nii.gz"):
        assert (shared / mask.relative_to(alone)).read_bytes() == mask.read_bytes()


@pytest.mark.slow
def test_a_killed_worker_costs_its_scan_only(scans: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = [sys.executable, "-m", "ctinstruct_hf.cli", "predict", "-i", str(scans), "-o", str(output)]
    command += ["--segment", "liver", "--workers", "2", "--device", "cpu,cpu"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    victim = None
    deadline = time.monotonic() + 60
    while victim is None and time.monotonic() < deadline:
        time.sleep(0.05)
        children = psutil.Process(running.pid).children()
        workers = [one for one in children if "spawn_main" in " ".join(one.cmdline())]
        victim = workers[-1] if len(workers) == 2 else None
    assert victim is not None
    time.sleep(1)
    victim.send_signal(signal.SIGKILL)
    stdout, stderr = running.communicate(timeout=120)
    assert running.returncode == 2
    assert "2 done, 2 failed" in stdout, stdout + stderr
    killed = [row for row in table(output / "failures.csv") if "ended with code -9" in row["error"]]
    assert len(killed) == 1
    again = subprocess.run([*command[:-4]], capture_output=True, text=True, check=False, timeout=120)
    assert "1 done, 2 kept, 1 failed" in again.stdout, again.stderr
    assert not list(output.glob(".*"))


def test_results_of_another_scan_model_request_or_version_are_not_kept(small_scan: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(BUNDLED_MODEL, model)
    scan = tmp_path / "a.nii.gz"
    scan.write_bytes(small_scan.read_bytes())
    output = tmp_path / "out"

    def run(*structures: str) -> Outcome:
        request = Request(structures=list(structures))
        (outcome,) = predict_studies(find_scans([scan]), output, request, devices=["cpu"], model=str(model))
        return outcome

    assert (run("liver").status, run("liver").status) == ("done", "kept")
    os.utime(scan)
    os.utime(model / "model.safetensors")
    assert run("liver").status == "kept"  # the same contents
    other = nib.load(small_scan)
    turned = np.ascontiguousarray(np.asarray(other.dataobj)[::-1])
    nib.save(nib.Nifti1Image(turned, other.affine), scan)  # another patient under the same name
    found = run("liver")
    assert (found.status, found.changed) == ("done", "the scan")
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-2] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    found = run("liver")
    assert (found.status, found.changed) == ("done", "the model")
    findings = output / "a" / "findings.json"
    findings.write_text(
        findings.read_text().replace(f'"package_version": "{__version__}"', '"package_version": "0.0.1"')
    )
    found = run("liver")
    assert (found.status, found.changed) == ("done", "the package's version")
    found = run("spleen")
    assert (found.status, found.changed) == ("done", "structures")
    assert [file.name for file in (output / "a" / "masks").iterdir()] == ["spleen.nii.gz"]


def test_what_is_no_scan_is_listed_beside_the_results(scans: Path, tmp_path: Path) -> None:
    (scans / "letter.txt").write_text("Dear colleague")
    output = tmp_path / "out"
    predict_studies(find_scans([scans])[-1:], output, Request(structures=["liver"]))
    assert not (output / "skipped.csv").exists()
    found = find_scans([scans])
    del found[:]
    predict_studies(found, output, Request(structures=["liver"]))
    (row,) = table(output / "skipped.csv")
    assert (Path(row["path"]).name, row["reason"]) == ("letter.txt", "no scan in a format that can be read")


def test_scans_of_one_name_get_folders_of_their_own(tmp_path: Path) -> None:
    tasks = plan([Path("x/a.nii"), Path("y/a.nii.gz"), Path("y/b.mha")], tmp_path, Request(report=True), {})
    assert [Path(task.folder).name for task in tasks] == ["a", "a-2", "b"]


def test_the_table_holds_no_formulas(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    found = {
        "diagnosis": {},
        "segmentation": {},
        "answers": [{"question": "q", "answer": "=1+1"}],
        "report": None,
        "warnings": [],
    }
    (folder / "findings.json").write_text(json.dumps(found))
    task = Task("a.nii", str(folder), Request(report=True))
    write_table(tmp_path / "results.csv", [task], [Outcome("a", "done", 1.0)])
    assert table(tmp_path / "results.csv")[0]["q"] == "'=1+1"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"engine": "spark"}, "engine is 'spark'"),
        ({"workers": -1}, "workers is -1"),
        ({"workers": 1, "devices": ["cpu", "cpu"]}, "workers is 1: give at least 2, one a device"),
    ],
)
def test_bad_settings_are_one_sentence(tmp_path: Path, options: dict[str, object], told: str) -> None:
    with pytest.raises(CTInstructError, match=told):
        predict_studies([], tmp_path / "out", ASK, **options)  # type: ignore[arg-type]
