"""The HTTP interface as a real server with real clients."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import nibabel as nib
import numpy as np
import psutil
import pytest
from running import Running
from scans import asymmetric, dicom_series

from ctinstruct_hf import Study
from ctinstruct_hf.app.engine import remove_left_over, safe_name


@pytest.fixture
def start(untrained: Path) -> Iterator[Any]:
    servers: list[Running] = []

    def run(**options: Any) -> Running:
        servers.append(Running(str(untrained), **options))
        return servers[-1]

    yield run
    for one in servers:
        one.close()
        assert not one.engine.root.exists()


def test_names_of_the_user_are_known_on_the_page(start: Any, small_scan: Path) -> None:
    server = start(names={"liver": ["Leber"]})
    study = server.open(small_scan)
    told = server.ask(study, kind="segment", structures=["LEBER", "Lebr"]).json()["result"]
    assert list(told["masks"]) == ["LEBER", "Lebr"]
    assert told["warnings"] == ["'Lebr' is asked as written: did you mean liver?"]


def test_a_study_is_opened_asked_and_taken_away(start: Any, small_scan: Path, untrained: Path) -> None:
    server = start()
    opened = server.client.post("/api/studies", params={"name": "scan.nii.gz"}, content=small_scan.read_bytes()).json()
    assert opened["shape"] == [24, 48, 48]
    study = opened["study"]
    scan = nib.Nifti1Image.from_bytes(server.client.get(f"/api/studies/{study}/scan.nii").content)
    assert np.array_equal(np.asarray(scan.dataobj), np.asarray(nib.load(small_scan).dataobj))
    assert np.allclose(scan.affine, nib.load(small_scan).affine)
    plain = Study.open(small_scan, str(untrained), device="cpu")
    answer = server.ask(study, question="Is there a nodule?").json()
    assert answer["status"] == "done"
    assert answer["result"]["answer"] == plain.ask("Is there a nodule?", max_new_tokens=12)
    assert server.ask(study, kind="report").json()["result"]["report"] == plain.report(max_new_tokens=12)
    told = server.ask(study, kind="diagnose", diseases="phantom").json()["result"]["diagnosis"]
    assert told == pytest.approx(plain.diagnose("phantom"), abs=1e-5)
    marked = server.ask(study, kind="segment", structures=["liver", "spleen"]).json()["result"]["masks"]
    for name, numbers in marked.items():
        content = server.client.get(f"/api/studies/{study}/masks/{numbers['file']}").content
        import gzip

        mask = nib.Nifti1Image.from_bytes(gzip.decompress(content))
        expected = plain.volume.to_source(plain.segment(name))
        assert np.array_equal(np.asarray(mask.dataobj), np.asarray(expected.dataobj))
        assert np.allclose(mask.affine, scan.affine)
        if numbers["voxels"]:
            voxel = np.linalg.inv(mask.affine) @ [*numbers["place_mm"], 1]
            assert all(-0.5 <= place <= size for place, size in zip(voxel, mask.shape, strict=False))
    findings = server.client.get(f"/api/studies/{study}/results/findings.json").json()
    assert set(findings["segmentation"]) == {"liver", "spleen"}
    assert findings["answers"][0]["question"] == "Is there a nodule?"
    assert "Research use only" in server.client.get(f"/api/studies/{study}/results/report.txt").text
    assert server.client.get(f"/api/studies/{study}/results/report.html").headers["content-disposition"].startswith("attachment")  # fmt: skip
    assert server.client.delete(f"/api/studies/{study}").status_code == 204
    assert server.client.get(f"/api/studies/{study}").status_code == 404


def test_dicom_comes_as_files_or_zip_and_leaves_as_dicom_seg(start: Any, tmp_path: Path) -> None:
    pytest.importorskip("highdicom", reason="highdicom is not installed")
    server = start()
    series = dicom_series(tmp_path / "series", asymmetric((6, 32, 32)))
    upload = server.client.post("/api/uploads").json()["upload"]
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for file in sorted(series.iterdir()):
            name = f"somewhere/{file.name}"
            assert server.client.put(f"/api/uploads/{upload}", params={"name": name}, content=file.read_bytes()).status_code == 201  # fmt: skip
            archive.write(file, name)
    opened = server.client.post("/api/studies", json={"upload": upload}).json()
    assert opened["dicom"] is True
    study = opened["study"]
    assert server.client.get(f"/api/studies/{study}/results/masks.dcm").status_code == 400
    server.ask(study, kind="segment", structures=["liver"])
    seg = server.client.get(f"/api/studies/{study}/results/masks.dcm")
    assert seg.status_code == 200
    import pydicom

    assert pydicom.dcmread(io.BytesIO(seg.content)).Modality == "SEG"
    other = server.client.post("/api/studies", params={"name": "a.zip"}, content=packed.getvalue())
    assert other.json()["shape"] == opened["shape"]
    server.client.delete(f"/api/studies/{study}")
    assert not list(server.engine.root.glob("upload-*"))


def test_questions_of_many_clients_are_batched_and_each_is_answered_as_if_alone(
    start: Any, small_scan: Path, untrained: Path
) -> None:
    server = start()
    study = server.open(small_scan)
    questions = [f"Is there a {name}?" for name in ("nodule", "stone", "effusion of the right pleura", "cyst")]
    plain = Study.open(small_scan, str(untrained), device="cpu")
    alone = {question: str(plain.ask(question, max_new_tokens=12)) for question in questions}
    sizes: list[int] = []
    results = server.engine._results
    server.engine._results = lambda jobs, one: sizes.append(len(jobs)) or results(jobs, one)
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda question: server.ask(study, question=question).json(), questions * 2))
    for question, answer in zip(questions * 2, answers, strict=True):
        assert answer["result"]["answer"] == alone[question]
    assert max(sizes) > 1


def test_overload_is_refused_and_a_client_that_leaves_frees_its_work(start: Any, small_scan: Path) -> None:
    server = start(waiting=2, new_tokens=4000, idle_job=1.0)
    study = server.open(small_scan)
    ask = {"kind": "report"}
    jobs = [server.client.post(f"/api/studies/{study}/jobs", json=ask).json()["job"]]
    while server.client.get(f"/api/jobs/{jobs[0]}").json()["status"] != "running":
        time.sleep(0.02)
    jobs += [server.client.post(f"/api/studies/{study}/jobs", json=ask).json()["job"] for _ in range(2)]
    refused = server.client.post(f"/api/studies/{study}/jobs", json=ask)
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) > 0
    assert "try again later" in refused.json()["error"]
    assert server.client.get(f"/api/jobs/{jobs[2]}").json()["ahead"] == 2
    assert server.client.delete(f"/api/jobs/{jobs[2]}").json()["status"] == "cancelled"
    server.client.delete(f"/api/jobs/{jobs[0]}")
    deadline = time.monotonic() + 20
    while server.engine.current or server.engine.line:  # nobody asks about the second job any more
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert server.engine.jobs[jobs[1]].status == "cancelled"
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.address}/api/studies/{study}/jobs", params={"wait": True}, json=ask, timeout=0.5)
    deadline = time.monotonic() + 20
    while server.engine.current or server.engine.line:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert list(server.engine.jobs.values())[-1].status == "cancelled"
    assert server.engine.studies[study].study.results.report is None


def test_studies_and_uploads_are_limited_and_removed(start: Any, small_scan: Path) -> None:
    server = start(studies=2, upload_bytes=100_000, upload_files=2)
    first = server.open(small_scan)
    server.open(small_scan)
    server.open(small_scan)  # the first makes room
    assert server.client.get(f"/api/studies/{first}").status_code == 404
    assert len(list(server.engine.root.iterdir())) == 2
    upload = server.client.post("/api/uploads").json()["upload"]
    large = server.client.put(f"/api/uploads/{upload}", params={"name": "a.nii"}, content=b"0" * 100_001)
    assert large.status_code == 400
    assert "GiB" in large.json()["error"]
    # a body of unknown length
    large = server.client.put(f"/api/uploads/{upload}", params={"name": "a.nii"}, content=iter([b"0" * 60_000] * 2))
    assert large.status_code == 400
    for name in ("x", "y"):
        assert server.client.put(f"/api/uploads/{upload}", params={"name": name}, content=b"0").status_code == 201
    assert "2 files" in server.client.put(f"/api/uploads/{upload}", params={"name": "z"}, content=b"0").json()["error"]
    server.engine.sweep_once(time.monotonic() + 10_000)
    assert not list(server.engine.root.iterdir())
    assert server.client.get(f"/api/jobs/{'x' * 16}").status_code == 404


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("scan.nii.gz", b"broken", "scan.nii.gz"),
        ("note.txt", b"hello", "note.txt"),
        ("a.zip", b"PK\x03\x04 and nothing", "a.zip"),
        ("empty.nii", b"", "empty.nii"),
    ],
)
def test_a_bad_file_is_one_sentence_and_leaves_nothing(start: Any, name: str, content: bytes, told: str) -> None:
    server = start()
    answer = server.client.post("/api/studies", params={"name": name}, content=content)
    assert answer.status_code == 400
    assert told in answer.json()["error"]
    assert str(server.engine.root) not in answer.text
    assert not list(server.engine.root.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        {"kind": "sing"},
        {"kind": "ask"},
        {"kind": "ask", "question": "x" * 3000},
        {"kind": "ask", "question": 7},
        {"kind": "segment", "structures": "liver"},
        {"kind": "segment", "structures": []},
        {"kind": "segment", "structures": ["x" * 200]},
        {"kind": "diagnose", "diseases": ["nothing known"]},
        {"kind": {"a": 1}},
    ],
)
def test_what_cannot_be_asked_is_refused(start: Any, small_scan: Path, words: dict[str, Any]) -> None:
    server = start()
    study = server.open(small_scan)
    answer = server.client.post(f"/api/studies/{study}/jobs", json=words)
    assert answer.status_code == 400
    assert answer.json()["error"]


def test_other_sites_and_paths_get_nothing(start: Any, small_scan: Path) -> None:
    server = start()
    study = server.open(small_scan)
    page = server.client.get("/")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "access-control-allow-origin" not in page.headers
    assert server.client.get("/", headers={"host": "evil.example"}).status_code == 400
    foreign = server.client.post("/api/uploads", headers={"origin": "http://evil.example"})
    assert foreign.status_code == 403
    assert "access-control-allow-origin" not in foreign.headers
    assert server.client.post("/api/uploads", headers={"origin": server.address}).status_code == 201
    port = int(server.address.rpartition(":")[2])
    for path in (
        "/static/../server.py",
        "/static/..%2fserver.py",
        "/static/%2e%2e/server.py",
        "/static/",
        "/static",
        f"/api/studies/{study}/masks/..%2fscan.nii",
        f"/api/studies/{study}/masks/../scan.nii/..",
        f"/api/studies/{study}/results/..%2f..%2fetc%2fpasswd",
        "/api/studies",
        "/etc/passwd",
    ):
        with socket.create_connection(("127.0.0.1", port)) as raw:  # a client that does not tidy paths
            raw.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
            reply = b""
            while part := raw.recv(65536):
                reply += part
        assert reply.split()[1] in (b"404", b"405", b"400"), path
    upload = server.client.post("/api/uploads").json()["upload"]
    kept = server.client.put(f"/api/uploads/{upload}", params={"name": "../../x/.hidden"}, content=b"0").json()["file"]
    assert kept == "hidden"


def test_names_of_files_are_made_harmless() -> None:
    assert safe_name("a/b\\..\\c.nii.gz") == "c.nii.gz"
    assert safe_name("...") == "scan"
    assert safe_name("Müller <b>.dcm") == "Müller_b_.dcm"
    assert len(safe_name("x" * 500)) == 100


def test_the_command_serves_and_cleans_up_after_a_killed_one(tmp_path: Path, untrained: Path) -> None:
    command = [sys.executable, "-m", "ctinstruct_hf.cli", "app", "--api", "--port", "0", "--model", str(untrained)]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}

    def run() -> tuple[subprocess.Popen[str], str]:
        running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert running.stdout is not None
        return running, running.stdout.readline().split()[-1]

    first, address = run()
    assert httpx.get(f"{address}/model").json()["trained"] is False
    assert httpx.get(address.removesuffix("/api")).status_code == 404  # no page
    assert [one.stat().st_mode & 0o777 for one in tmp_path.glob("ctinstruct-app-*")] == [0o700]
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert len(list(tmp_path.glob("ctinstruct-app-*"))) == 1
    second, address = run()
    assert httpx.get(f"{address}/model").status_code == 200
    assert len(list(tmp_path.glob("ctinstruct-app-*"))) == 1
    second.send_signal(signal.SIGINT)
    second.wait(timeout=30)
    assert not list(tmp_path.glob("ctinstruct-app-*"))


def test_a_port_in_use_is_one_sentence(untrained: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "ctinstruct_hf.cli", "app", "--port", port, "--model", str(untrained)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert port in done.stderr


def test_folders_of_others_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in (f"ctinstruct-app-{os.getpid()}-x", "ctinstruct-app-notes", "other"):
        (tmp_path / name).mkdir()
    remove_left_over()
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.slow
def test_memory_stays_flat_over_two_hundred_requests(start: Any, small_scan: Path) -> None:
    """Two clients, each opening, asking, marking and closing."""
    server = start(new_tokens=6)

    def visit(number: int) -> int:
        with httpx.Client(base_url=server.address, timeout=120) as client:
            opened = client.post("/api/studies", params={"name": "a.nii.gz"}, content=small_scan.read_bytes())
            study = opened.json()["study"]
            codes = [opened.status_code]
            for words in (
                {"kind": "ask", "question": f"Number {number}?"},
                {"kind": "segment", "structures": ["liver"]},
            ):
                codes.append(client.post(f"/api/studies/{study}/jobs", params={"wait": True}, json=words).status_code)
            codes.append(client.get(f"/api/studies/{study}/results/findings.json").status_code)
            codes.append(client.delete(f"/api/studies/{study}").status_code)
            assert codes == [201, 200, 200, 200, 204]
            return len(codes)

    process = psutil.Process()
    with ThreadPoolExecutor(2) as clients:
        sum(clients.map(visit, range(15)))  # caches fill
        before = process.memory_info().rss
        requests = sum(clients.map(visit, range(15, 55)))
    assert requests == 200
    grown = process.memory_info().rss / before - 1
    print(f"memory after 200 requests: {grown:+.1%} of {before / 2**20:.0f} MB")
    assert grown < 0.05
    assert not list(server.engine.root.iterdir())
