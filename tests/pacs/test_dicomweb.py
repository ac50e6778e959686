"""DICOMweb with a real Orthanc: studies in, results back, and one sentence for whatever goes wrong."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from orthanc import MISSING, Orthanc, free_port, is_installed
from scans import asymmetric, dicom_series
from servers import answering, cutting
from typer.testing import CliRunner

from ctinstruct_hf import CTInstructError, read_volume
from ctinstruct_hf.cli import app
from ctinstruct_hf.output.dicom_seg import save_dicom_seg
from ctinstruct_hf.pacs import dicomweb
from ctinstruct_hf.pacs.addresses import Address, parse_address

pytest.importorskip("dicomweb_client", reason="dicomweb-client is not installed")
needs_orthanc = pytest.mark.skipif(not is_installed(), reason=MISSING)
PASSWORD = "correct horse"


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    """A server that asks for a password, with a CT study of two series (1.2.3.4) and an MR study (1.2.3.9)."""
    folder = tmp_path_factory.mktemp("orthanc")
    hu = asymmetric((6, 32, 32))
    dicom_series(folder / "files" / "a", hu, SeriesDescription="thin", BodyPartExamined="CHEST")
    dicom_series(
        folder / "files" / "b", hu[:4], SeriesDescription="thick", SeriesInstanceUID="1.2.3.4.7", SeriesNumber=2
    )
    dicom_series(folder / "files" / "mr", hu, Modality="MR", StudyInstanceUID="1.2.3.9", SeriesInstanceUID="1.2.3.9.1")
    server = Orthanc(folder / "server", users={"reader": PASSWORD})
    server.add(folder / "files")
    yield server
    server.close()


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CTINSTRUCT_DICOMWEB_USER", "reader")
    monkeypatch.setenv("CTINSTRUCT_DICOMWEB_PASSWORD", PASSWORD)


def predict(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["predict", *map(str, arguments)])


@needs_orthanc
def test_a_study_is_fetched_answered_and_its_results_are_stored_once_however_often(
    tmp_path: Path, orthanc: Orthanc, untrained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    source = f"dicomweb+{orthanc.web}/studies/1.2.3.4/series/1.2.3.4.5"
    asked = ("--report", "--segment", "liver", "--model", untrained, "--send", f"dicomweb+{orthanc.web}")
    for folder in ("first", "second"):
        done = predict("-i", source, "-o", tmp_path / folder, *asked)
        assert done.exit_code == 0, done.output
        assert PASSWORD not in done.output
        found = orthanc.instances("SEG", "SR")
        assert sorted(one["Modality"] for one in found) == ["SEG", "SR", "SR"]
    assert {one["StudyInstanceUID"] for one in found} == {"1.2.3.4"}
    assert not list((tmp_path / "temporary").iterdir())
    written = (tmp_path / "first" / "findings.json").read_text()
    assert not any(text in written for text in ("1.2.3.4", "Secret", "SECRET", PASSWORD))
    assert '"liver"' in written
    assert (tmp_path / "first" / "masks" / "liver.nii.gz").exists()


@needs_orthanc
def test_what_is_fetched_is_the_series_voxel_for_voxel(tmp_path: Path, orthanc: Orthanc) -> None:
    address = parse_address(f"dicomweb+{orthanc.web}/studies/1.2.3.4")
    found = dicomweb.fetch_study(address, tmp_path / "all")
    assert sorted(one.description for one in found) == ["thick", "thin"]
    assert len(list((tmp_path / "all").iterdir())) == 2
    assert not [file for file in (tmp_path / "all").rglob("*") if "1.2." in str(file.relative_to(tmp_path))]
    dicomweb.fetch_study(address, tmp_path / "one", wanted=lambda series: series.body_part == "CHEST")
    assert np.array_equal(read_volume(tmp_path / "one").hu, asymmetric((6, 32, 32)))


@needs_orthanc
def test_a_search_finds_ct_studies_by_date_or_patient_and_asks_for_one_of_them(orthanc: Orthanc) -> None:
    address = parse_address(f"dicomweb+{orthanc.web}")
    (study,) = dicomweb.search_studies(address, dates="20191231-20200101")
    assert (study.uid, study.date, study.modalities[0]) == ("1.2.3.4", "20200101", "CT")
    assert dicomweb.search_studies(address, dates="20210101-20211231") == []
    assert [one.uid for one in dicomweb.search_studies(address, patient="SECRET-ID")] == ["1.2.3.4"]
    assert dicomweb.search_studies(address, patient="OTHER") == []
    with pytest.raises(CTInstructError, match="dates or a patient"):
        dicomweb.search_studies(address)


def objects(folder: Path, count: int = 3) -> list[Path]:
    """Segmentations of a study of their own, of some size."""
    volume = read_volume(dicom_series(folder / "source", asymmetric((6, 64, 64)), StudyInstanceUID="1.2.3.5"))
    files = []
    for number in range(count):
        files.append(folder / f"{number}.dcm")
        save_dicom_seg(volume, {"liver": volume.hu > number}, files[-1], seed=str(number))
    return files


@needs_orthanc
@pytest.mark.parametrize("share", [0.2, 0.7, 0.98])
def test_a_connection_that_breaks_while_sending_leaves_nothing_and_sending_again_completes_it(
    tmp_path: Path, orthanc: Orthanc, share: float
) -> None:
    files = objects(tmp_path)
    before = len(orthanc.get("/instances"))
    most = int(share * sum(file.stat().st_size for file in files))
    with cutting(orthanc.http, up=most) as port:
        broken = parse_address(f"dicomweb+http://127.0.0.1:{port}/dicom-web")
        with pytest.raises(CTInstructError, match="broke while 3 objects were sent"):
            dicomweb.store(files, broken)
    assert len(orthanc.get("/instances")) == before
    if share == 0.98:
        for _ in range(2):
            dicomweb.store(files, parse_address(f"dicomweb+{orthanc.web}"))
            assert len(orthanc.get("/instances")) == before + len(files)


@needs_orthanc
def test_an_answer_that_is_lost_after_storing_is_harmless(tmp_path: Path, orthanc: Orthanc) -> None:
    files = objects(tmp_path)
    with cutting(orthanc.http, down=10) as port:
        broken = parse_address(f"dicomweb+http://127.0.0.1:{port}/dicom-web")
        with pytest.raises(CTInstructError, match="broke"):
            dicomweb.store(files, broken)
    stored = len(orthanc.get("/instances"))
    dicomweb.store(files, parse_address(f"dicomweb+{orthanc.web}"))
    assert len(orthanc.get("/instances")) == stored


@needs_orthanc
def test_a_study_that_breaks_off_is_not_answered(tmp_path: Path, orthanc: Orthanc) -> None:
    with cutting(orthanc.http, down=9000) as port:  # the list of series passes, the images do not
        source = f"dicomweb+http://127.0.0.1:{port}/dicom-web/studies/1.2.3.4/series/1.2.3.4.5"
        done = predict("-i", source, "-o", tmp_path / "out")
    assert isinstance(done.exception, CTInstructError)
    assert "broke" in str(done.exception)
    assert not (tmp_path / "out").exists()


WRONG = {
    "study": ("/studies/1.9.9", "no such study"),
    "series": ("/studies/1.2.3.4/series/1.9.9", "no such series"),
    "no CT": ("/studies/1.2.3.9", r"no CT series \(it has MR\)"),
    "no study": ("", "names no study"),
}


@needs_orthanc
@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_not_there_is_one_sentence_without_uids(tmp_path: Path, orthanc: Orthanc, wrong: str) -> None:
    path, sentence = WRONG[wrong]
    with pytest.raises(CTInstructError, match=sentence) as caught:
        dicomweb.fetch_study(parse_address(f"dicomweb+{orthanc.web}{path}"), tmp_path)
    assert "\n" not in str(caught.value)
    assert "1.9.9" not in str(caught.value)


@needs_orthanc
@pytest.mark.parametrize("change", ["absent", "wrong"])
def test_a_refusal_says_which_variables_to_set_and_not_what_is_in_them(
    orthanc: Orthanc, change: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    if change == "absent":
        monkeypatch.delenv("CTINSTRUCT_DICOMWEB_USER")
    else:
        monkeypatch.setenv("CTINSTRUCT_DICOMWEB_PASSWORD", "battery staple")
    with pytest.raises(CTInstructError, match=r"refuses the request \(401\): set CTINSTRUCT_DICOMWEB_TOKEN") as caught:
        dicomweb.list_series(parse_address(f"dicomweb+{orthanc.web}/studies/1.2.3.4"))
    assert "battery staple" not in str(caught.value) + caplog.text
    assert "1.2.3.4" not in caplog.text


def test_an_unreachable_server_is_one_sentence() -> None:
    address = parse_address(f"dicomweb+http://127.0.0.1:{free_port()}/dicom-web/studies/1.2.3")
    with pytest.raises(CTInstructError, match="cannot be reached: check the address"):
        dicomweb.list_series(address)


LIES: dict[str, tuple[bytes, str]] = {
    "a page": (b"<html>Log in</html>", "text/html"),
    "an empty page": (b"", "text/html; charset=utf-8"),
    "a page called JSON": (b"<html>Log in</html>", "application/dicom+json"),
    "JSON of another form": (b'{"studies": 3}', "application/dicom+json"),
    "a list of numbers": (b"[1, 2]", "application/dicom+json"),
    "a number": (b"3", "application/json"),
}
ASKED: dict[str, Callable[[Address, list[Path]], object]] = {
    "search": lambda address, files: dicomweb.search_studies(address, dates="20200101"),
    "list": lambda address, files: dicomweb.list_series(address),
    "fetch": lambda address, files: dicomweb.fetch_study(address, files[0].parent / "fetched"),
    "store": lambda address, files: dicomweb.store(files, address),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return sorted(dicom_series(tmp_path_factory.mktemp("images"), asymmetric((2, 8, 8))).iterdir())


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("lie", LIES)
def test_a_server_that_lies_about_its_content_is_one_sentence(lie: str, asked: str, images: list[Path]) -> None:
    with answering(*LIES[lie]) as (url, _), pytest.raises(CTInstructError, match="something else than DICOM") as caught:
        ASKED[asked](parse_address(f"dicomweb+{url}/studies/1.2.3"), images)
    assert not any(text in str(caught.value) for text in ("Log in", "1.2.3", "\n"))


def test_no_answer_is_no_study_and_nothing_stored(images: list[Path]) -> None:
    with answering(b"", "application/dicom+json") as (url, _):
        address = parse_address(f"dicomweb+{url}/studies/1.2.3")
        assert dicomweb.search_studies(address, dates="20200101") == []
        with pytest.raises(CTInstructError, match="no such study"):
            dicomweb.list_series(address)
        with pytest.raises(CTInstructError, match="confirmed 0 of 2 objects"):
            dicomweb.store(images, address)


STATUS = {
    401: "set CTINSTRUCT_DICOMWEB_TOKEN",
    403: "set CTINSTRUCT_DICOMWEB_TOKEN",
    404: "Check the",
    503: "try again",
}


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("status", STATUS)
def test_a_server_that_refuses_is_one_sentence_whatever_was_asked(status: int, asked: str, images: list[Path]) -> None:
    with (
        answering(b"<html>1.2.3</html>", "text/html", status) as (url, _),
        pytest.raises(CTInstructError, match=rf"{status}.*{STATUS[status]}") as caught,
    ):
        ASKED[asked](parse_address(f"dicomweb+{url}/studies/1.2.3"), images)
    assert not any(text in str(caught.value) for text in ("1.2.3", "\n"))


def test_images_that_are_none_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    series = dicomweb.FoundSeries("1.2.3.4", 1, "", "CT", "", 2)
    monkeypatch.setattr(dicomweb, "list_series", lambda address: [series])
    body = b"--b\r\nContent-Type: application/dicom\r\n\r\nno image\r\n--b--\r\n"
    for content_type in ("multipart/related; type=application/dicom; boundary=b", "application/dicom", "text/html"):
        with (
            answering(body, content_type) as (url, _),
            pytest.raises(CTInstructError, match="something else than DICOM"),
        ):
            dicomweb.fetch_study(parse_address(f"dicomweb+{url}/studies/1.2.3"), tmp_path / content_type[:9])


def test_a_token_is_sent_and_files_of_this_machine_do_not_replace_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login other password other\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for token, wanted in (("abc", "Bearer abc"), ("", "Basic cmVhZGVyOmNvcnJlY3QgaG9yc2U=")):
        monkeypatch.setenv("CTINSTRUCT_DICOMWEB_TOKEN", token)
        with answering(b"[]", "application/dicom+json") as (url, seen), pytest.raises(CTInstructError):
            dicomweb.list_series(parse_address(f"dicomweb+{url}/studies/1.2.3"))
        assert [one["Authorization"] for one in seen] == [wanted]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_a_certificate_of_an_unknown_authority_is_refused_until_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "server.pem"
    names = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    make = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-keyout",
        file,
        "-out",
        tmp_path / "c",
    ]
    subprocess.run([*make, *names], check=True, capture_output=True)
    file.write_bytes(file.read_bytes() + (tmp_path / "c").read_bytes())
    with answering(b"[]", "application/dicom+json", certificate=file) as (url, seen):
        address = parse_address(f"dicomweb+{url}/studies/1.2.3")
        with pytest.raises(CTInstructError, match="certificate that is not trusted: set REQUESTS_CA_BUNDLE"):
            dicomweb.list_series(address)
        assert not seen
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "c"))
        with pytest.raises(CTInstructError, match="no such study"):
            dicomweb.list_series(address)


ADDRESSES = {
    "dicomweb+http://user:secret@host/studies/1.2": "user or password",
    "dicomweb+http:///studies/1.2": "names no host",
    "dicomweb+http://host:port/studies/1.2": "no address",
    "dicomweb+http://host/studies/abc": "no UID after",
    "dicomweb+http://host/studies/1.2?token=secret": "has a query",
    "dimse://host:104": "dimse://TITLE@host:port",
    "dimse://TITLE@host": "dimse://TITLE@host:port",
    "dimse://ATITLETHATISTOOLONG@host:104": "at most 16 letters",
}


@pytest.mark.parametrize("text", ADDRESSES)
def test_an_address_that_is_none_is_refused_without_quoting_secrets(text: str) -> None:
    with pytest.raises(CTInstructError, match=ADDRESSES[text]) as caught:
        parse_address(text)
    assert "secret" not in str(caught.value)


def test_an_address_has_its_parts() -> None:
    found = parse_address("dicomweb+https://Host:8443/a/b/studies/1.2.3/series/1.2.3.4/")
    assert (found.base, found.study, found.series) == ("https://Host:8443/a/b", "1.2.3", "1.2.3.4")
    assert parse_address("dicomweb+http://h/studies").base == "http://h"
    found = parse_address("dimse://ORTHANC@h:4242")
    assert (found.title, found.host, found.port) == ("ORTHANC", "h", 4242)


def test_nothing_is_sent_where_there_is_no_object(tmp_path: Path) -> None:
    from ctinstruct_hf.pacs.transfer import result_files, send

    with pytest.raises(CTInstructError, match="Nothing was sent"):
        send(result_files(tmp_path), parse_address("dicomweb+http://127.0.0.1/x"))


def test_an_object_that_the_server_did_not_store_is_counted_with_the_reason(images: list[Path]) -> None:
    failed = {"00081155": {"vr": "UI", "Value": ["1.2.3"]}, "00081197": {"vr": "US", "Value": [0x0110]}}
    answer = json.dumps({"00081198": {"vr": "SQ", "Value": [failed]}}).encode()
    with (
        answering(answer, "application/dicom+json", 202) as (url, _),
        pytest.raises(CTInstructError, match=r"did not store 1 of 2 objects \(reason 0110\)"),
    ):
        dicomweb.store(images, parse_address(f"dicomweb+{url}"))
