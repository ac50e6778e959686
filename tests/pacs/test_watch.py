"""`ctinstruct watch`: each study once, whatever ends the process, from folders, DICOMweb and DIMSE."""

from __future__ import annotations

import csv
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import yaml
from orthanc import MISSING, Orthanc, free_port, is_installed
from pydicom.uid import generate_uid
from scans import asymmetric, dicom_series
from servers import cutting

from ctinstruct_hf import CTInstructError
from ctinstruct_hf.pacs import dimse
from ctinstruct_hf.pacs.addresses import parse_address
from ctinstruct_hf.pacs.ledger import Ledger
from ctinstruct_hf.pacs.orders import Order, read_order
from ctinstruct_hf.pacs.watch import MOST_ATTEMPTS, watch

needs_orthanc = pytest.mark.skipif(not is_installed(), reason=MISSING)
needs_dimse = pytest.mark.skipif(
    shutil.which("storescu") is None, reason="DCMTK is not installed: scripts/install_pacs.sh"
)
HU = asymmetric((4, 32, 32))


def study(folder: Path, number: int, bad: bool = False, **tags: Any) -> str:
    """A CT study on disk; its StudyInstanceUID. A bad one has no pixels."""
    uid = f"1.2.3.{number}"
    series = dicom_series(folder, HU, StudyInstanceUID=uid, SeriesInstanceUID=f"{uid}.1", **tags)
    for file in series.iterdir() if bad else ():
        data = pydicom.dcmread(file)
        del data.PixelData
        data.save_as(file)
    return uid


def order(tmp_path: Path, model: Path, **changes: Any) -> Order:
    settings: dict[str, Any] = {
        "input": str(tmp_path / "in"),
        "output": str(tmp_path / "out"),
        "segment": ["liver"],
        "stable_seconds": 0.0,
        "poll_seconds": 0.05,
        "days": 0,
        "model": str(model),
    }
    return Order(**{**settings, **changes})


def states(folder: Path) -> dict[str, str]:
    ledger = Ledger(folder)
    try:
        return {one.source or one.name: one.state for one in ledger.entries()}
    finally:
        ledger.close()


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    server = Orthanc(tmp_path_factory.mktemp("orthanc"))
    yield server
    server.close()


def test_studies_of_a_folder_are_answered_once_and_a_bad_one_is_listed(tmp_path: Path, untrained: Path) -> None:
    study(tmp_path / "in" / "a", 1)
    study(tmp_path / "in" / "b", 2, bad=True)
    study(tmp_path / "in" / "c", 1)  # the same study in a second folder: a copy
    study(tmp_path / "in" / "d", 3, SeriesDescription="scout")
    (tmp_path / "in" / "notes.txt").write_text("no scan")
    mine = order(tmp_path, untrained, series_description="^$")
    lines: list[str] = []
    watch(mine, once=True, log=lines.append)
    found = states(tmp_path / "out")
    assert {name: found[name] for name in "abd"} == {"a": "done", "b": "failed", "d": "skipped"}
    assert (tmp_path / "out" / "study-000001" / "series-1" / "masks" / "liver.nii.gz").exists()
    rows = {row["source"]: row for row in csv.DictReader((tmp_path / "out" / "failures.csv").open())}
    assert rows["b"]["state"] == "failed"
    assert rows["b"]["error"]
    written = sorted((tmp_path / "out").rglob("findings.json"))
    before = [file.stat().st_mtime_ns for file in written]
    watch(mine, once=True, log=lines.append)
    assert [file.stat().st_mtime_ns for file in written] == before
    assert not any(text in "".join(lines) for text in ("1.2.3", "Secret", "SECRET"))


def test_a_study_that_still_grows_is_not_answered(tmp_path: Path, untrained: Path) -> None:
    from ctinstruct_hf.pacs.sources import FolderSource
    from ctinstruct_hf.pacs.watch import Watch

    study(tmp_path / "in" / "a", 1)
    mine = order(tmp_path, untrained, stable_seconds=0.3)
    ledger = Ledger(mine.folder)
    service = Watch(mine, FolderSource(tmp_path / "in", mine), ledger, lambda line: None)
    for number in range(3):
        assert not service.look()
        time.sleep(0.2)
        (tmp_path / "in" / "a" / f"more-{number}").write_bytes(b"x")
    assert not service.look()
    time.sleep(0.35)
    assert service.look() == 1
    ledger.close()


@needs_orthanc
def test_results_go_back_to_the_server_once_though_sending_breaks_first(
    tmp_path: Path, untrained: Path, orthanc: Orthanc
) -> None:
    uid = study(tmp_path / "files", 11, BodyPartExamined="CHEST")
    other = study(tmp_path / "head", 12, BodyPartExamined="HEAD")
    for name in ("files", "head"):
        orthanc.add(tmp_path / name)
    changes = {"input": f"dicomweb+{orthanc.web}", "body_part": "chest", "keep_study_uid": True}
    with cutting(orthanc.http, up=500) as port:
        mine = order(tmp_path, untrained, send=f"dicomweb+http://127.0.0.1:{port}/dicom-web", **changes)
        with pytest.raises(CTInstructError, match="results of 1 studies could not be sent: The connection"):
            watch(mine, once=True)
    assert not orthanc.instances("SEG", "SR")
    assert states(tmp_path / "out") == {uid: "sending", other: "skipped"}
    for _ in range(2):
        watch(order(tmp_path, untrained, send=f"dicomweb+{orthanc.web}", **changes), once=True)
        stored = orthanc.instances("SEG", "SR")
        assert sorted((one["Modality"], one["StudyInstanceUID"]) for one in stored) == [("SEG", uid), ("SR", uid)]
    assert states(tmp_path / "out")[uid] == "done"


@needs_dimse
def test_what_a_modality_sends_is_answered_and_sent_on(tmp_path: Path, untrained: Path) -> None:
    """storescu sends a study, `watch` answers it and stores its results at storescp."""
    study(tmp_path / "files", 21)
    there = tmp_path / "stored"
    there.mkdir()
    port, back = free_port(), free_port()
    receiver = subprocess.Popen(["storescp", "-od", there, "-aet", "ARCHIVE", str(back)], stderr=subprocess.PIPE)
    source = f"dimse://CTINSTRUCT@127.0.0.1:{port}"
    mine = order(tmp_path, untrained, input=source, send=f"dimse://ARCHIVE@127.0.0.1:{back}", stable_seconds=0.2)
    try:
        from ctinstruct_hf.pacs.watch import Watch, open_source

        ledger = Ledger(mine.folder)
        with open_source(mine) as listener:
            service = Watch(mine, listener, ledger, lambda line: None)
            files = sorted(map(str, (tmp_path / "files").iterdir()))
            for title, code in (("WRONG", False), ("CTINSTRUCT", True)):
                done = subprocess.run(
                    ["storescu", "-aec", title, "127.0.0.1", str(port), *files], capture_output=True, check=False
                )
                assert (done.returncode == 0) == code
            for _ in range(100):
                if service.look():
                    break
                time.sleep(0.1)
            service.look()
        assert [one.state for one in ledger.entries()] == ["done"]
        assert not any((mine.folder / "incoming").iterdir())
        ledger.close()
    finally:
        receiver.terminate()
        receiver.communicate()
    stored = [pydicom.dcmread(file) for file in there.iterdir()]
    assert sorted(one.Modality for one in stored) == ["SEG", "SR"]
    assert {one.StudyInstanceUID for one in stored} == {"1.2.3.21"}


@needs_dimse
def test_objects_arrive_bit_for_bit_over_dimse(tmp_path: Path) -> None:
    study(tmp_path / "files", 22)
    files = sorted((tmp_path / "files").iterdir())
    port = free_port()
    with dimse.listening(tmp_path / "got", parse_address(f"dimse://HERE@127.0.0.1:{port}")):
        dimse.store(files, parse_address(f"dimse://HERE@127.0.0.1:{port}"))
    sent = {one.SOPInstanceUID: one for one in map(pydicom.dcmread, files)}
    got = [pydicom.dcmread(file) for file in (tmp_path / "got").rglob("*.dcm")]
    assert len(got) == len(sent)
    assert all(one == sent[one.SOPInstanceUID] for one in got)
    assert "1.2.3.22" not in str(sorted((tmp_path / "got").iterdir()))


@pytest.mark.parametrize(("title", "sentence"), [("HERE", "cannot be reached"), ("OTHER", "does not accept the title")])
def test_an_entity_that_does_not_answer_or_refuses_is_one_sentence(tmp_path: Path, title: str, sentence: str) -> None:
    pytest.importorskip("pynetdicom", reason="pynetdicom is not installed")
    study(tmp_path / "files", 23)
    files, port = sorted((tmp_path / "files").iterdir()), free_port()
    address = parse_address(f"dimse://{title}@127.0.0.1:{port}")
    if title == "HERE":
        with pytest.raises(CTInstructError, match=sentence):
            dimse.store(files, address)
        return
    with dimse.listening(tmp_path / "got", parse_address(f"dimse://HERE@127.0.0.1:{port}")):
        with pytest.raises(CTInstructError, match=sentence):
            dimse.store(files, address)
        with pytest.raises(CTInstructError, match="cannot be listened on"), dimse.listening(tmp_path, address):
            pass


def test_a_study_that_ends_the_process_again_and_again_is_a_failure(tmp_path: Path, untrained: Path) -> None:
    study(tmp_path / "in" / "a", 1)
    mine = order(tmp_path, untrained)
    ledger = Ledger(mine.folder)
    from ctinstruct_hf.pacs.sources import FolderSource

    (one,) = FolderSource(tmp_path / "in", mine).studies()
    for _ in range(MOST_ATTEMPTS):
        ledger.begin(one.key, one.source)
    ledger.close()
    watch(mine, once=True)
    assert states(mine.folder) == {"a": "failed"}
    assert "ended 3 times" in (mine.folder / "failures.csv").read_text()


def test_a_source_that_cannot_be_asked_ends_a_single_pass_with_its_sentence(tmp_path: Path, untrained: Path) -> None:
    pytest.importorskip("dicomweb_client", reason="dicomweb-client is not installed")
    with pytest.raises(CTInstructError, match="cannot be reached"):
        watch(order(tmp_path, untrained, input=f"dicomweb+http://127.0.0.1:{free_port()}"), once=True)


def test_two_processes_do_not_share_a_ledger(tmp_path: Path) -> None:
    first = Ledger(tmp_path)
    with pytest.raises(CTInstructError, match="Another ctinstruct watch works"):
        Ledger(tmp_path)
    first.close()
    Ledger(tmp_path).close()


ORDERS = {
    "unknown: 1": "unknown keys: unknown",
    "report: maybe": "report: maybe, expected bool",
    "ask: 3": "ask: 3, expected list",
    "stable_seconds: soon": "expected float",
    "series_description: '('": "no regular expression",
    "output: ''": "has no output",
    "- a": "expected 'key: value' lines",
    "a: [": "no readable YAML",
}


@pytest.mark.parametrize("text", ORDERS)
def test_a_request_file_that_does_not_fit_is_one_sentence(tmp_path: Path, text: str) -> None:
    file = tmp_path / "request.yaml"
    file.write_text(
        f"{text}\n" if text.startswith(("-", "a")) and "ask" not in text else f"input: a\noutput: b\n{text}\n"
    )
    with pytest.raises(CTInstructError, match=ORDERS[text].replace("(", r"\(")):
        read_order(file, {})


def test_options_come_before_the_file(tmp_path: Path) -> None:
    file = tmp_path / "request.yaml"
    file.write_text("input: a\noutput: b\nask: Is there a nodule?\nsend: dicomweb+http://h/x\n")
    found = read_order(file, {"input": "c", "output": None})
    assert (found.input, found.output, found.ask) == ("c", "b", ["Is there a nodule?"])
    assert found.request().output_types == ("nifti", "dicom-seg", "dicom-sr")
    assert found.request().report is False


@pytest.mark.slow
@needs_orthanc
def test_fifty_studies_with_one_bad_in_ten_and_two_kills_are_each_answered_once(
    tmp_path: Path, untrained: Path
) -> None:
    server = Orthanc(tmp_path / "orthanc")
    good, bad = [], []
    for number in range(50):
        uid = generate_uid()
        folder = dicom_series(
            tmp_path / "files" / str(number), HU, StudyInstanceUID=uid, SeriesInstanceUID=generate_uid()
        )
        (bad if number % 10 == 3 else good).append(str(uid))
        for file in folder.iterdir() if number % 10 == 3 else ():
            data = pydicom.dcmread(file)
            del data.PixelData
            data.save_as(file)
    server.add(tmp_path / "files")
    request = tmp_path / "request.yaml"
    settings = {
        "input": f"dicomweb+{server.web}",
        "output": str(tmp_path / "out"),
        "send": f"dicomweb+{server.web}",
        "segment": ["liver"],
        "report": True,
        "stable_seconds": 0,
        "poll_seconds": 0.1,
        "days": 0,
        "keep_study_uid": True,
        "model": str(untrained),
    }
    request.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "ctinstruct_hf.cli", "watch", str(request), "--once"]
    try:
        for least in (10, 25):
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            while process.poll() is None and len(server.instances("SEG")) < least:
                time.sleep(0.5)
            time.sleep(float(np.random.default_rng(least).uniform(0, 1)))
            assert process.poll() is None
            process.send_signal(signal.SIGKILL)
            process.wait()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seg = [one["StudyInstanceUID"] for one in server.instances("SEG")]
        assert sorted(seg) == sorted(good)
        assert len(server.instances("SR")) == 2 * len(good)
        failures = list(csv.DictReader((tmp_path / "out" / "failures.csv").open()))
        assert sorted(row["source"] for row in failures) == sorted(bad)
        assert set(states(tmp_path / "out").values()) == {"done", "failed"}
    finally:
        server.close()
