"""Uploads as clients really send them: as forms, under odd names, slowly, and cut off."""

from __future__ import annotations

import gzip
import io
import logging
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import nibabel as nib
import numpy as np
import pytest
import requests
import uvicorn
from running import Running
from scans import asymmetric, dicom_series
from typer.testing import CliRunner

from ctinstruct_hf import cli
from ctinstruct_hf.app import uploads
from ctinstruct_hf.app.engine import Engine, Limits, remove_left_over, safe_name
from ctinstruct_hf.app.server import create_app, listen


@pytest.fixture(scope="module")
def server(untrained: Path) -> Iterator[Running]:
    one = Running(str(untrained), uploads=6, idle_upload=0.4, idle_job=0.2)
    yield one
    one.close()
    assert not one.engine.root.exists()


@pytest.fixture(autouse=True)
def no_uploads(request: pytest.FixtureRequest) -> None:
    if "server" in request.fixturenames:
        engine = request.getfixturevalue("server").engine
        for name in list(engine.uploads.open):
            engine.uploads.drop(name)


def opened(server: Running, answer: Any, name: str) -> None:
    assert answer.status_code == 201, answer.text
    assert answer.json()["shape"] == [24, 48, 48]
    assert answer.json()["name"] == name
    server.client.delete(f"/api/studies/{answer.json()['study']}")


@pytest.mark.parametrize("params", [{}, {"name": "other.nii.gz"}])
@pytest.mark.parametrize("name", ["scan.nii.gz", "胸部 CT.nii.gz", "грудь.nii.gz", 'a "b"; c.nii.gz'])
def test_a_form_opens_a_study_like_a_body(server: Running, small_scan: Path, name: str, params: dict[str, str]) -> None:
    content = small_scan.read_bytes()
    kept = {'a "b"; c.nii.gz': "a_22b_22_ c.nii.gz"}.get(name, name)
    address = f"{server.address}/api/studies"
    answer = requests.post(address, params=params, files={"scan": (name, content), "note": (None, "x")}, timeout=60)
    assert answer.status_code == 201, answer.text
    assert answer.json()["name"] in (kept, "a_b_ c.nii.gz")
    opened(server, server.client.post("/api/studies", params=params, files={"file": (name, content)}), answer.json()["name"])  # fmt: skip
    server.client.delete(f"/api/studies/{answer.json()['study']}")


def test_curl_sends_forms_and_bodies(server: Running, small_scan: Path) -> None:
    for options, address in (
        (["-F", f"file=@{small_scan}"], "api/studies"),
        (["-F", f"file=@{small_scan}"], "api/studies?name=x.nii.gz"),
        (["--data-binary", f"@{small_scan}"], "api/studies?name=scan.nii.gz"),
    ):
        done = subprocess.run(["curl", "-s", *options, f"{server.address}/{address}"], capture_output=True, text=True, check=True)  # fmt: skip
        assert '"name":"scan.nii.gz"' in done.stdout
        server.engine.close_study(next(iter(server.engine.studies)))


def test_several_files_come_in_one_form(server: Running, tmp_path: Path) -> None:
    header = b"ObjectType = Image\nNDims = 3\nDimSize = 8 8 4\nElementSpacing = 1 1 1\nElementType = MET_SHORT\nElementDataFile = a.raw\n"  # fmt: skip
    files = [("f", ("a.mhd", header)), ("f", ("a.raw", np.arange(256, dtype="<i2").tobytes()))]
    upload = server.client.post("/api/uploads").json()["upload"]
    assert server.client.put(f"/api/uploads/{upload}", files=files).json()["files"] == ["a.mhd", "a.raw"]
    for answer in (
        server.client.post("/api/studies", json={"upload": upload}),
        server.client.post("/api/studies", files=files),
    ):
        assert answer.json()["shape"] == [4, 8, 8]
        server.client.delete(f"/api/studies/{answer.json()['study']}")


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("multipart/form-data", b"x"),
        ("multipart/form-data; boundary=b", b"no form at all"),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="f"; filename="a.nii"\r\n\r\nx',
        ),
        ("multipart/form-data; boundary=b", b'--b\r\nContent-Disposition: form-data; name="f"\r\n\r\n' + b"x" * 20_000),
        ("multipart/form-data; boundary=b", b"--b\r\nA: " + b"x" * 20_000),
        ("multipart/form-data; boundary=b", b"--b--\r\n"),
        ("application/octet-stream", b"\x1f\x8b"),
        ("application/x-www-form-urlencoded", b"0" * (2**20 + 1)),
        ("application/json", b"[" * 200_000),
        ("application/json", b'{"a":' * 100_000),
        ("application/json", b'{"upload": "\\ud800"}'),
        ("application/json", b"1" * 10_000),
        ("application/json", b"\xff\xfe"),
    ],
)
def test_a_body_that_is_nothing_is_one_sentence(
    server: Running, caplog: pytest.LogCaptureFixture, content_type: str, body: bytes
) -> None:
    with caplog.at_level(logging.WARNING):
        answer = server.client.post("/api/studies", content=body, headers={"content-type": content_type})
    assert answer.status_code == 400
    assert set(answer.json()) == {"error"}
    assert not caplog.records
    assert not list(server.engine.root.iterdir())


@pytest.mark.parametrize(
    "path", ["/api/uploads/x?name=a", "/api/jobs/x", "/api/nothing", "/api/studies/x/jobs?wait=perhaps"]
)
@pytest.mark.parametrize("method", ["GET", "PUT", "POST", "DELETE", "PATCH"])
def test_every_refusal_is_a_sentence(server: Running, method: str, path: str) -> None:
    answer = server.client.request(method, path)
    assert 400 <= answer.status_code < 500
    assert isinstance(answer.json()["error"], str)


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("scan.nii (1).gz", "scan.nii (1).gz"),
        ("胸部CT.nii.gz", "胸部CT.nii.gz"),
        ("सीटी स्कैन.dcm", "सीटी स्कैन.dcm"),
        ("الصدر.nii", "الصدر.nii"),
        ("cafe\u0301.nii", "café.nii"),
        ("scan.nii.gz ", "scan.nii.gz"),
        ("C:\\data\\scan.nii", "scan.nii"),
        ("a\u202egnp.exe", "a_gnp.exe"),
        ("a\r\nb\0c", "a_b_c"),
        (" . ", "scan"),
        ("x" * 300 + ".nii.gz", "x" * 93 + ".nii.gz"),
    ],
)
def test_names_keep_their_letters_and_lose_what_harms(sent: str, kept: str) -> None:
    assert safe_name(sent) == kept
    assert len(safe_name("胸" * 300 + sent).encode()) <= 200


@pytest.mark.parametrize("name", ["scan.nii (1).gz", "scan", "scan.nii.gz.download", "胸部", "..."])
def test_the_name_of_a_scan_does_not_matter(server: Running, small_scan: Path, name: str) -> None:
    opened(server, server.client.post("/api/studies", params={"name": name}, content=small_scan.read_bytes()), safe_name(name))  # fmt: skip


def test_head_is_get_without_a_body(server: Running, small_scan: Path) -> None:
    study = server.open(small_scan)
    server.ask(study, kind="segment", structures=["liver"])
    for path in ("/", "/static/app.js", "/api/model", f"/api/studies/{study}", f"/api/studies/{study}/scan.nii", f"/api/studies/{study}/results/report.txt", f"/api/studies/{study}/masks/liver.nii.gz"):  # fmt: skip
        head, get = server.client.head(path), server.client.get(path)
        assert head.status_code == get.status_code == 200
        assert head.headers["content-length"] == get.headers["content-length"] == str(len(get.content))
        assert head.content == b""
    assert server.client.head("/api/jobs/x").status_code == 404
    assert server.client.head("/api/uploads").status_code == 405
    server.client.delete(f"/api/studies/{study}")


def test_sockets_send_at_once() -> None:
    """asyncio sets TCP_NODELAY on sockets that say they are TCP, and accepted ones say what the listening one does."""
    for host in ("127.0.0.1", "::1"):
        with listen(host, 0) as listener:
            assert listener.proto == socket.IPPROTO_TCP


def slow(content: bytes, pause: float) -> Iterator[bytes]:
    step = max(1, len(content) // 8)
    for start in range(0, len(content), step):
        yield content[start : start + step]
        time.sleep(pause)


def test_an_upload_lasts_as_long_as_it_arrives(server: Running, small_scan: Path) -> None:
    """Eight parts at 0.2 s take four times what an upload may be idle."""
    content = small_scan.read_bytes()
    answer = server.client.post("/api/studies", params={"name": "scan.nii.gz"}, content=slow(content, 0.2))
    opened(server, answer, "scan.nii.gz")
    upload = server.client.post("/api/uploads").json()["upload"]
    for name in ("a", "b"):
        server.client.put(f"/api/uploads/{upload}", params={"name": name}, content=slow(content, 0.1))
    assert len(server.engine.uploads.open) == 1
    time.sleep(1.6)  # nothing arrives
    assert server.client.put(f"/api/uploads/{upload}", params={"name": "c"}, content=b"0").status_code == 404
    assert not list(server.engine.root.iterdir())


def test_a_body_that_stops_arriving_is_given_up(server: Running) -> None:
    answer = server.client.post("/api/studies", params={"name": "a"}, content=slow(b"0" * 16, 0.7))
    assert answer.status_code == 400
    assert "Nothing arrived" in answer.json()["error"]
    assert not list(server.engine.root.iterdir())


def test_slow_uploads_do_not_block_others(server: Running, small_scan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "_GRACE", 0.3)
    stop = threading.Event()

    def trickle() -> Iterator[bytes]:
        while not stop.is_set():
            yield b"0"
            time.sleep(0.1)

    def send(_: int) -> int:
        with httpx.Client(base_url=server.address, timeout=60) as client:
            return client.post("/api/studies", params={"name": "a.nii"}, content=trickle()).status_code

    with ThreadPoolExecutor(6) as clients:
        slow_ones = [clients.submit(send, number) for number in range(6)]
        deadline = time.monotonic() + 20
        while len(server.engine.uploads.open) < 6:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.4)
        for _ in range(3):
            opened(server, server.client.post("/api/studies", params={"name": "a.nii.gz"}, content=small_scan.read_bytes()), "a.nii.gz")  # fmt: skip
        stop.set()
        assert {one.result() for one in slow_ones} <= {400, 404}
    assert not list(server.engine.root.iterdir())


def test_a_client_that_leaves_is_no_error(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    port = int(server.address.rpartition(":")[2])
    form = b'--b\r\nContent-Disposition: form-data; name="f"; filename="a.nii"\r\n\r\nx'
    with caplog.at_level(logging.WARNING):
        for path, kind, body in (
            ("/api/studies?name=a.nii", "application/octet-stream", b"0" * 50),
            ("/api/studies", "multipart/form-data; boundary=b", form),
            ("/api/studies", "application/json", b'{"up'),
        ):
            with socket.create_connection(("127.0.0.1", port)) as raw:
                raw.sendall(f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {kind}\r\nContent-Length: 999\r\n\r\n".encode() + body)  # fmt: skip
                time.sleep(0.1)
        time.sleep(0.3)
    assert not caplog.records
    assert not list(server.engine.root.iterdir())


def test_receiving_a_file_does_not_list_the_folder(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    upload = server.client.post("/api/uploads").json()["upload"]
    folder = server.engine.uploads.open[upload].folder
    listed: list[Any] = []
    for function in ("listdir", "scandir"):
        real = getattr(os, function)
        monkeypatch.setattr(os, function, lambda path=".", real=real: listed.append(path) or real(path))
    names = [server.client.put(f"/api/uploads/{upload}", params={"name": name}, content=b"0").json()["file"] for name in ("IM1", "IM1", "im1", "IM2")]  # fmt: skip
    assert len({name.lower() for name in names}) == 4
    assert folder not in listed
    assert server.engine.uploads.open[upload].bytes == 4


def test_a_small_file_may_not_become_a_large_scan(server: Running) -> None:
    image = nib.Nifti1Image(np.zeros((1, 1, 1), np.int16), np.eye(4))
    image.header.set_data_shape((1024, 1024, 512))
    content = gzip.compress(image.header.binaryblock + b"\0" * 4 + b"\0" * 2**20)
    answer = server.client.post("/api/studies", params={"name": "scan.nii.gz"}, content=content)
    assert answer.status_code == 400
    assert "scan.nii.gz would unpack to 1.0 GiB" in answer.json()["error"]
    assert "max_bytes" not in answer.json()["error"]


@pytest.mark.parametrize("begun", ["app", "predict"])
def test_folders_of_killed_processes_are_removed(begun: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a server and of a zip being read, by the process's number, which in a container is each time the same."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / "elsewhere").mkdir()
    kept = {f"ctinstruct-zip-{os.getpid()}-a", "ctinstruct-notes", f"ctinstruct-app-{os.getppid()}-b", "elsewhere"}
    for name in {
        *kept,
        f"ctinstruct-zip-{gone.pid}-c",
        f"ctinstruct-image-{gone.pid}-g",
        f"ctinstruct-app-{gone.pid}-d",
        f"ctinstruct-app-{os.getpid()}-e",
    }:
        (tmp_path / name).mkdir(exist_ok=True)
    os.utime(tmp_path / f"ctinstruct-app-{os.getpid()}-e", (0, 0))
    (tmp_path / f"ctinstruct-zip-{gone.pid}-f").symlink_to(tmp_path / "elsewhere")
    if begun == "app":
        remove_left_over()
    else:
        assert CliRunner().invoke(cli.app, ["predict", "-i", "missing", "-o", str(tmp_path / "out")]).exit_code
    assert {one.name for one in tmp_path.iterdir() if not one.is_symlink()} == kept


def test_the_default_limits_suit_a_tab_that_is_hidden_for_minutes(untrained: Path) -> None:
    """Browsers run the timers of a hidden tab once a minute, or not at all."""
    engine = Engine(str(untrained), "cpu", limits=Limits())
    try:
        engine.uploads.new()
        from ctinstruct_hf.app.jobs import Job

        engine.jobs["x"] = job = Job("report", "study", {})
        engine.sweep_once(time.monotonic() + 600)
        assert not job.cancelled.is_set()
    finally:
        engine.close()


@pytest.fixture
def two_series(tmp_path: Path) -> list[Path]:
    """A chest twice, thick and thin, and a scout."""
    for number, depth, step, description in ((2, 5, 4.0, "Chest soft"), (3, 9, 1.0, "Chest lung")):
        dicom_series(tmp_path / str(number), asymmetric((depth, 32, 32)), step=(0, 0, step), SeriesInstanceUID=f"1.2.{number}", SeriesNumber=number, SeriesDescription=description)  # fmt: skip
    dicom_series(tmp_path / "1", asymmetric((1, 32, 32)), SeriesInstanceUID="1.2.1", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])  # fmt: skip
    return sorted(tmp_path.rglob("IM*"))


@pytest.mark.parametrize(("series", "depth"), [("1.2.3", 9), ("2", 5), ("lung", 9), ("largest", 9), ("thinnest", 9)])
def test_one_of_several_series_is_chosen(server: Running, two_series: list[Path], series: str, depth: int) -> None:
    files = [("f", (file.name, file.read_bytes())) for file in two_series]
    answer = server.client.post("/api/studies", files=files)
    assert answer.status_code == 300
    assert [(one["uid"], one["number"], one["description"], one["slices"], one["spacing"]) for one in answer.json()["series"]] == [
        ("1.2.2", 2, "Chest soft", 5, [4.0, 1.5, 1.0]),
        ("1.2.3", 3, "Chest lung", 9, [1.0, 1.5, 1.0]),
    ]  # fmt: skip
    assert "upload-" not in answer.json()["error"]
    upload = answer.json()["upload"]
    for wrong in ("nothing", "all"):
        refused = server.client.post("/api/studies", json={"upload": upload, "series": wrong})
        assert refused.status_code in (300, 400)
        assert "study" not in refused.json()
    answer = server.client.post("/api/studies", json={"upload": upload, "series": series})
    assert answer.status_code == 201, answer.text
    assert answer.json()["shape"][0] == depth
    server.client.delete(f"/api/studies/{answer.json()['study']}")
    for form in ({"params": {"series": series}}, {"data": {"series": series}}):
        answer = server.client.post("/api/studies", files=files, **form)
        assert answer.json()["shape"][0] == depth
        server.client.delete(f"/api/studies/{answer.json()['study']}")
    assert not list(server.engine.root.iterdir())


@pytest.mark.parametrize(
    ("path", "words", "known"),
    [
        ("/api/studies", {"sample": 1, "serie": "2"}, "upload, sample, series"),
        ("/api/studies/x/jobs", {"kind": "segment", "structure": ["liver"]}, "kind, structures"),
        ("/api/studies/x/jobs", {"kind": "report", "question": "Why?"}, "kind"),
    ],
)
def test_fields_without_effect_are_refused(server: Running, path: str, words: dict[str, Any], known: str) -> None:
    answer = server.client.post(path, json=words)
    assert answer.status_code == 400
    assert answer.json()["error"].endswith(f"it takes {known}.")


def test_a_body_that_is_no_http_is_no_error_of_the_server(server: Running, capfd: pytest.CaptureFixture[str]) -> None:
    host, port = server.address.removeprefix("http://").split(":")
    for _ in range(3):
        with socket.create_connection((host, int(port))) as client:
            client.sendall(b"PUT /api/uploads/x?name=a HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n")  # fmt: skip
            client.settimeout(10)
            assert client.recv(100).startswith(b"HTTP/1.1 4")
    assert server.client.get("/api/model").status_code == 200
    assert "Traceback" not in capfd.readouterr().err


def test_listing_the_series_of_a_zip_unpacks_no_more_than_reading_it(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("scan.nii", bytes(300 * 2**20))
    written: list[int] = []
    monkeypatch.setattr(zipfile.ZipExtFile, "read", lambda self, size=-1: written.append(size) or b"")
    answer = server.client.post("/api/studies", params={"name": "scan.zip"}, content=packed.getvalue())
    assert answer.status_code == 400
    assert "would unpack" in answer.json()["error"]
    assert not written


@pytest.mark.slow
def test_a_folder_of_500_slices_is_sent_in_a_third_of_the_time_of_a_socket_without_its_protocol(
    untrained: Path,
) -> None:
    """Requests on one connection: without TCP_NODELAY the answer to each waits for the client's acknowledgement."""

    def seconds(address: str) -> float:
        with httpx.Client(base_url=address, timeout=60) as client:
            upload = client.post("/api/uploads").json()["upload"]
            start = time.monotonic()
            for number in range(500):
                answer = client.put(f"/api/uploads/{upload}", params={"name": f"IM{number:04d}"}, content=bytes(8192))
                assert answer.status_code == 201
            return time.monotonic() - start

    server = Running(str(untrained))
    plain = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    plain.bind(("127.0.0.1", 0))
    plain.listen(128)
    other = uvicorn.Server(uvicorn.Config(create_app(server.engine), log_level="error", lifespan="off"))
    thread = threading.Thread(target=other.run, kwargs={"sockets": [plain]}, daemon=True)
    thread.start()
    while not other.started:
        time.sleep(0.02)
    without = seconds(f"http://127.0.0.1:{plain.getsockname()[1]}")
    other.should_exit = True
    thread.join(timeout=30)
    within = seconds(server.address)
    server.close()
    assert within < without / 3
