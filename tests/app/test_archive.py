"""Studies of a real Orthanc, opened from the page: searched, listed and fetched, and nothing of who they are told."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from orthanc import MISSING, Orthanc, free_port, is_installed
from pages import BROWSER_OPTIONS, CHROMIUM
from running import Running
from scans import asymmetric, dicom_series
from typer.testing import CliRunner

from ctinstruct_hf import CTInstructError
from ctinstruct_hf.cli import app as command

pytest.importorskip("dicomweb_client", reason="dicomweb-client is not installed")
needs_orthanc = pytest.mark.skipif(not is_installed(), reason=MISSING)
HU = asymmetric((6, 32, 32))
IDENTIFIERS = ("SECRET", "Secret", "1.2.3.4", "correct horse")


@pytest.fixture(scope="module")
def server(untrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server for an archive that asks for a password, with a CT study of two series and an MR study."""
    folder = tmp_path_factory.mktemp("orthanc")
    patch = pytest.MonkeyPatch()
    patch.setenv("CTINSTRUCT_DICOMWEB_USER", "reader")
    patch.setenv("CTINSTRUCT_DICOMWEB_PASSWORD", "correct horse")
    tags = {"StudyDescription": "<b>chest</b>", "StudyDate": "20200131"}
    dicom_series(folder / "files" / "a", HU, SeriesDescription="thin", BodyPartExamined="CHEST", **tags)
    dicom_series(
        folder / "files" / "b", HU[:4], SeriesDescription="thick", SeriesInstanceUID="1.2.3.4.7", SeriesNumber=2, **tags
    )
    dicom_series(folder / "files" / "mr", HU, Modality="MR", StudyInstanceUID="1.2.3.9", SeriesInstanceUID="1.2.3.9.1")
    archive = Orthanc(folder / "server", users={"reader": "correct horse"})
    archive.add(folder / "files")
    one = Running(str(untrained), pacs=f"dicomweb+{archive.web}")
    yield one
    one.close()
    archive.close()
    patch.undo()


def post(server: Running, path: str, **words: Any) -> Any:
    return server.client.post(f"/api/{path}", json=words)


@needs_orthanc
def test_a_study_is_found_by_its_date_its_series_are_listed_and_one_is_opened(
    server: Running, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    assert server.client.get("/api/model").json()["pacs"] is True
    found = post(server, "pacs/studies", **{"from": "2020-01-31", "to": "2020-02-01"})
    (study,) = found.json()["studies"]
    assert (study["uid"], study["date"], study["description"]) == ("1.2.3.4", "2020-01-31", "<b>chest</b>")
    assert post(server, "pacs/studies", **{"from": "0999-01-01", "to": "2020-02-01"}).json() == found.json()
    listed = post(server, "pacs/series", study="1.2.3.4")
    rows = {one["description"]: one for one in listed.json()["series"]}
    assert {name: (one["number"], one["images"], one["body_part"]) for name, one in rows.items()} == {
        "thin": (1, 6, "CHEST"),
        "thick": (2, 4, ""),
    }
    assert not any(text in found.text + listed.text for text in ("SECRET", "Secret"))
    opened = post(server, "studies", pacs="1.2.3.4", series=rows["thin"]["uid"])
    assert opened.status_code == 201, opened.text
    assert (opened.json()["shape"], opened.json()["dicom"]) == ([6, 32, 32], True)
    one = server.engine.find(opened.json()["study"])
    assert np.array_equal(one.study.volume.hu, HU)
    assert one.source is not None
    assert len(list(one.source.rglob("*.dcm"))) == 6  # for the DICOM SEG
    server.client.delete(f"/api/studies/{opened.json()['study']}")
    assert not one.source.exists()
    assert not any(text in opened.text + caplog.text for text in IDENTIFIERS)


@needs_orthanc
def test_without_a_series_one_of_several_is_chosen_from_what_was_fetched(server: Running) -> None:
    choice = post(server, "studies", pacs="1.2.3.4")
    assert choice.status_code == 300
    assert {one["description"] for one in choice.json()["series"]} == {"thin", "thick"}
    opened = post(server, "studies", upload=choice.json()["upload"], series="1.2.3.4.7")
    assert opened.json()["shape"] == [4, 32, 32]


@needs_orthanc
def test_a_patient_is_searched_for_by_the_whole_id_only_and_never_named(server: Running) -> None:
    found = post(server, "pacs/studies", patient="SECRET-ID")
    assert [one["uid"] for one in found.json()["studies"]] == ["1.2.3.4"]
    assert "SECRET" not in found.text
    assert post(server, "pacs/studies", patient="OTHER").json() == {"studies": []}
    assert post(server, "pacs/studies", patient="SECRET-ID", to="2019-12-31").json() == {"studies": []}
    for pattern in ("*", "SECRET*", "SECRET-I?", "A\\SECRET-ID", "x" * 65, 3):
        refused = post(server, "pacs/studies", patient=pattern)
        assert (refused.status_code, "one whole PatientID" in refused.json()["error"]) == (400, True)


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "nothing to search for": ("pacs/studies", {"patient": "  "}, "Give dates or a patient's ID"),
    "no date": ("pacs/studies", {"from": "31.1.2020"}, "from must be a date"),
    "a range of dates in one": ("pacs/studies", {"to": "20200101-20210101"}, "to must be a date"),
    "a number": ("pacs/studies", {"to": 20200101}, "to must be a date"),
    "dates the wrong way": ("pacs/studies", {"from": "2021-01-01", "to": "2020-01-01"}, "from is later than to"),
    "an address of its own": ("pacs/studies", {"from": "2020-01-01", "address": "http://127.0.0.1"}, "no field"),
    "no study": ("pacs/series", {}, "by their UIDs"),
    "an address as a study": ("pacs/series", {"study": "http://127.0.0.1:1/studies/1"}, "by their UIDs"),
    "a path as a study": ("studies", {"pacs": "1.2.3.4/../../system"}, "by their UIDs"),
    "a path as a series": ("studies", {"pacs": "1.2.3.4", "series": "1.2/metadata"}, "by their UIDs"),
    "a study that is not there": ("studies", {"pacs": "1.9.9"}, "The archive has no such study"),
    "a series that is not there": ("studies", {"pacs": "1.2.3.4", "series": "1.9"}, "The archive has no such series"),
    "a study without CT": ("studies", {"pacs": "1.2.3.9"}, "The archive: the study has no CT series"),
    "a list without CT": ("pacs/series", {"study": "1.2.3.9"}, "The study has no CT series"),
}


@needs_orthanc
@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_be_searched_or_opened_is_one_sentence_and_leaves_nothing(server: Running, wrong: str) -> None:
    path, words, sentence = WRONG[wrong]
    answer = post(server, path, **words)
    assert (answer.status_code, sentence in answer.json()["error"]) == (400, True), answer.text
    assert "\n" not in answer.json()["error"]
    assert "127.0.0.1:" not in answer.text
    assert not server.engine.uploads.open


@needs_orthanc
def test_a_study_that_is_larger_than_the_server_takes_is_not_kept(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(server.engine.root.iterdir())
    monkeypatch.setattr(server.engine.limits, "upload_bytes", 8000)
    answer = post(server, "studies", pacs="1.2.3.4", series="1.2.3.4.5")
    assert (answer.status_code, "may have" in answer.json()["error"]) == (400, True)
    assert not server.engine.uploads.open
    assert set(server.engine.root.iterdir()) == before


@needs_orthanc
def test_an_archive_that_refuses_is_one_sentence_without_its_address(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CTINSTRUCT_DICOMWEB_PASSWORD", "battery staple")
    answer = post(server, "pacs/studies", to="2020-12-31")
    assert answer.json()["error"].startswith("The archive refuses the request (401)")
    assert "battery" not in answer.text


def test_nothing_is_searched_where_the_operator_named_no_archive(untrained: Path) -> None:
    one = Running(str(untrained))
    try:
        assert one.client.get("/api/model").json()["pacs"] is False
        for path in ("pacs/studies", "pacs/series"):
            assert post(one, path, study="1.2.3", pacs="dicomweb+http://127.0.0.1/x").status_code == 404
        refused = post(one, "studies", pacs="1.2.3.4")
        assert (refused.status_code, "'pacs' is no field" in refused.json()["error"]) == (400, True)
    finally:
        one.close()


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("http://host/dicom-web", "expected dicomweb"),
        ("dimse://TITLE@host:104", "expected dicomweb"),
        ("dicomweb+https://host/studies/1.2.3", "expected dicomweb"),
        ("dicomweb+https://user:secret@host/dicom-web", "user or password"),
    ],
)
def test_an_address_that_is_no_archive_is_refused_before_a_model_is_loaded(address: str, sentence: str) -> None:
    done = CliRunner().invoke(command, ["app", "--no-browser", "--pacs", address, "--model", "none"])
    assert isinstance(done.exception, CTInstructError)
    assert sentence in str(done.exception)
    assert "secret" not in str(done.exception)


@needs_orthanc
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_the_page_finds_a_study_and_opens_one_of_its_series(server: Running) -> None:
    from playwright.sync_api import expect, sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=BROWSER_OPTIONS)
        page = browser.new_page()
        page.goto(server.address)
        expect(page.locator("body[data-ready]")).to_be_attached()
        expect(page.locator("#pacs-patient")).to_be_hidden()  # until it is asked for
        page.get_by_label("Study date from").fill("2021-01-01")
        page.get_by_role("button", name="Search").click()
        expect(page.locator("#error")).to_have_text("No CT study was found.")
        page.get_by_label("Study date from").fill("2020-01-01")
        page.get_by_label("to", exact=True).fill("2020-12-31")
        page.get_by_role("button", name="Search").click()
        expect(page.locator("#pacs-studies button")).to_have_text("2020-01-31, <b>chest</b>, 10 images")
        page.locator("#pacs-studies button").click()
        expect(page.locator("#pacs-studies ul button")).to_have_count(2)
        page.get_by_role("button", name="Open series 2, thick, 4 images").click()
        expect(page.locator("#canvas[data-ready]")).to_be_visible(timeout=30_000)
        expect(page.locator("#facts")).to_contain_text("32 × 32 × 4 voxels")
        assert "SECRET" not in page.content()
        page.locator("#other").click()
        page.get_by_text("Search by patient ID").click()
        page.get_by_label("Patient ID", exact=True).fill("OTHER")
        page.get_by_role("button", name="Search").click()
        expect(page.locator("#error")).to_have_text("No CT study was found.")
        browser.close()


def test_an_archive_that_is_down_does_not_keep_the_server_from_serving(untrained: Path) -> None:
    one = Running(str(untrained), pacs=f"dicomweb+http://127.0.0.1:{free_port()}/dicom-web")
    try:
        answer = post(one, "pacs/studies", to="2020-12-31")
        assert answer.json()["error"] == "The archive cannot be reached: check the address, and that it runs."
    finally:
        one.close()
