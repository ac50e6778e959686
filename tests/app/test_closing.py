"""A closed study leaves nothing, whatever still runs; and what a study may hold while it is open."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from running import Running
from scans import asymmetric, dicom_series

from ctinstruct_hf.app.limits import Limits
from ctinstruct_hf.app.masks import Full, PackedMasks

ABSOLUTE = re.compile(r"(?<![\w.<])/(?:tmp|var|home|root|private|work)\b")


@pytest.fixture(scope="module")
def server(untrained: Path) -> Iterator[Running]:
    one = Running(str(untrained), structures=3, waiting=6)
    yield one
    one.close()
    assert not one.engine.root.exists()


def wait_until(true: Any) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("file", ["findings.json", "report.txt", "report.html", "masks.dcm"])
def test_results_asked_for_while_a_job_runs_leave_nothing_of_a_closed_study(
    server: Running, tmp_path: Path, file: str
) -> None:
    series = dicom_series(tmp_path / "series", asymmetric((6, 32, 32)))
    upload = server.client.post("/api/uploads").json()["upload"]
    for slice_ in series.iterdir():
        server.client.put(f"/api/uploads/{upload}", params={"name": slice_.name}, content=slice_.read_bytes())
    study = server.client.post("/api/studies", json={"upload": upload}).json()["study"]
    server.ask(study, kind="segment", structures=["liver"])
    one = server.engine.studies[study]
    with ThreadPoolExecutor(3) as clients:
        one.lock.acquire()  # as a job does while it runs
        asked = [clients.submit(server.client.get, f"/api/studies/{study}/results/{file}") for _ in range(2)]
        asked.append(clients.submit(server.ask, study, kind="segment", structures=["spleen"]))
        wait_until(lambda: one.users == 3)
        assert server.client.delete(f"/api/studies/{study}").status_code == 204
        assert not list(server.engine.root.iterdir())  # at once
        one.folder.mkdir()  # what the job writes at its end
        (one.folder / "late").write_text("a patient's")
        one.lock.release()
        answers = [one.result() for one in asked]
    assert [answer.status_code for answer in answers[:2]] == [404, 404]
    assert answers[2].json()["status"] == "cancelled"
    assert not any(ABSOLUTE.search(answer.text) for answer in answers)
    wait_until(lambda: not list(server.engine.root.iterdir()))


def test_closing_while_results_are_written_answers_without_paths(server: Running, small_scan: Path) -> None:
    """The folder goes at any moment of the writing."""
    for pause in (0.0, 0.05):
        study = server.open(small_scan)
        server.ask(study, kind="segment", structures=["liver"])
        with ThreadPoolExecutor(1) as clients:
            asked = [clients.submit(server.client.get, f"/api/studies/{study}/results/findings.json")]
            time.sleep(pause)
            server.client.delete(f"/api/studies/{study}")
            answers = [one.result() for one in asked]
        for answer in answers:
            assert answer.status_code in (200, 404)
            assert not ABSOLUTE.search(answer.text), answer.text
    wait_until(lambda: not list(server.engine.root.iterdir()))


def test_a_download_that_began_is_sent_whole_though_the_study_is_closed(server: Running, small_scan: Path) -> None:
    study = server.open(small_scan)
    with server.client.stream("GET", f"/api/studies/{study}/scan.nii") as answer:
        server.client.delete(f"/api/studies/{study}")
        assert len(answer.read()) == int(answer.headers["content-length"])
    assert server.client.get(f"/api/studies/{study}/scan.nii").status_code == 404


def test_a_full_disk_is_a_sentence_without_paths(server: Running, small_scan: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    study = server.open(small_scan)
    server.engine.studies[study].folder.chmod(0o500)
    monkeypatch.setattr("tempfile.mkdtemp", lambda **options: (_ for _ in ()).throw(OSError(28, "No space left on device", str(options["dir"]))))  # fmt: skip
    answer = server.client.get(f"/api/studies/{study}/results/findings.json")
    monkeypatch.undo()
    assert answer.status_code == 400
    assert "No space left on device" in answer.json()["error"]
    assert not ABSOLUTE.search(answer.text)
    assert "study-" not in answer.text
    server.client.delete(f"/api/studies/{study}")


def test_a_study_has_so_many_masks_over_all_requests(server: Running, small_scan: Path) -> None:
    study = server.open(small_scan)
    first = server.ask(study, kind="segment", structures=[f"thing {number}" for number in range(2)])
    assert len(first.json()["result"]["masks"]) == 2
    more = server.ask(study, kind="segment", structures=["thing 0", "thing 7", "thing 8"])
    assert more.status_code == 400
    assert "may have 3 masks and this one has 2" in more.json()["error"]
    again = server.ask(study, kind="segment", structures=["thing 0", "thing 7"])  # the first is there already
    assert set(again.json()["result"]["masks"]) == {"thing 0", "thing 7"}
    assert len(list((server.engine.studies[study].folder / "masks").iterdir())) == 3
    server.client.delete(f"/api/studies/{study}")


def test_the_bytes_of_all_masks_are_bounded_and_the_rest_is_named(server: Running, small_scan: Path) -> None:
    study = server.open(small_scan)
    masks = server.engine.studies[study].study.results.masks
    masks.limits = Limits(mask_bytes=1)
    failed = server.ask(study, kind="segment", structures=["liver"]).json()
    assert failed["status"] == "failed"
    assert "MiB" in failed["error"]
    masks.limits = Limits()
    server.ask(study, kind="segment", structures=["liver"])
    masks.limits = Limits(mask_bytes=masks.bytes + 3)
    result = server.ask(study, kind="segment", structures=["liver", "spleen"]).json()["result"]
    assert set(result["masks"]) == {"liver"}
    assert "1 of 2 structures are not marked" in result["warnings"][-1]
    server.client.delete(f"/api/studies/{study}")


def test_packed_masks_are_the_masks() -> None:
    """Sixty masks of a chest of 31 million voxels take 1.9 GB as they are."""
    random = np.random.default_rng(0)
    shape = (37, 41, 43)
    packed = PackedMasks(Limits(structures=70))
    masks = {"noise": random.random(shape) > 0.5, "none": np.zeros(shape, bool), "all": np.ones(shape, bool)}
    packed.update(masks)
    assert list(packed) == list(masks)
    for name, mask in packed.items():
        assert mask.dtype == bool
        assert np.array_equal(mask, masks[name])
    chest = np.zeros((120, 512, 512), bool)
    chest[40:80, 100:300, 100:300] = True
    before = psutil.Process().memory_info().rss
    packed.update({f"structure {number}": chest for number in range(60)})
    assert packed.bytes < chest.nbytes / 4
    assert psutil.Process().memory_info().rss - before < 4 * chest.nbytes
    assert np.array_equal(packed["structure 59"], chest)
    with pytest.raises(Full, match="may have 70 masks and this one has 63: ask for 7 or fewer"):
        packed.check([f"other {number}" for number in range(8)])


def test_names_that_are_not_known_come_with_the_nearest(server: Running, small_scan: Path) -> None:
    study = server.open(small_scan)
    result = server.ask(study, kind="segment", structures=["Liver", "livr"]).json()["result"]
    assert set(result["masks"]) == {"Liver", "livr"}
    assert any("livr" in note and "liver" in note for note in result["warnings"])
    assert not any("Liver" in note for note in result["warnings"])
    findings = server.client.get(f"/api/studies/{study}/results/findings.json").json()
    assert set(findings["segmentation"]) == {"Liver", "livr"}
    server.client.delete(f"/api/studies/{study}")


def test_jobs_that_ended_are_not_kept_for_ever(server: Running, small_scan: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr("ctinstruct_hf.app.engine._KEPT_JOBS", 2)
    study = server.open(small_scan)
    for _ in range(5):
        server.ask(study, kind="diagnose", diseases="phantom")
    assert len(server.engine.jobs) <= 3
    server.client.delete(f"/api/studies/{study}")


def test_downloads_that_wait_for_a_job_leave_threads_for_others(server: Running, small_scan: Path) -> None:
    study = server.open(small_scan)
    one = server.engine.studies[study]
    answers: list[int] = []

    def get() -> None:
        answers.append(server.client.get(f"/api/studies/{study}/results/report.txt").status_code)

    with one.lock:
        clients = [threading.Thread(target=get) for _ in range(20)]
        for client in clients:
            client.start()
        wait_until(lambda: one.users == 4 and len(answers) == 14)  # the others are told to come again
        other = server.open(small_scan)
        assert server.client.delete(f"/api/studies/{other}").status_code == 204
    for client in clients:
        client.join()
    assert set(answers) == {200, 503}
    server.client.delete(f"/api/studies/{study}")
