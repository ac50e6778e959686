"""The chat interface with the real client of OpenAI, the API key, and what operators read."""

from __future__ import annotations

import base64
import gzip
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import nibabel as nib
import numpy as np
import pytest
import uvicorn
from scans import asymmetric, dicom_series

from ctinstruct_hf import Study
from ctinstruct_hf.app.engine import Engine, Limits
from ctinstruct_hf.app.server import create_app, listen
from ctinstruct_hf.data.phantoms import make_phantom

openai = pytest.importorskip("openai", reason="openai is not installed")
KEY = "a key of some length"
QUESTION = "Is there a nodule?"


class Served:
    """A server that asks for a key and allows files of a folder, with both kinds of client."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.lines: list[str] = []
        self.engine = Engine(str(model), "cpu", limits=Limits(new_tokens=12, studies=3))
        app = create_app(self.engine, page=True, key=KEY, files=folder, log=self.lines.append)
        listener = listen("127.0.0.1", 0)
        self.address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]}, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.02)
        self.client = openai.OpenAI(base_url=f"{self.address}/v1", api_key=KEY, max_retries=0, timeout=60)
        self.http = httpx.Client(base_url=self.address, headers={"Authorization": f"Bearer {KEY}"}, timeout=60)
        self.model = self.client.models.list().data[0].id

    def ask(self, url: str, question: str = QUESTION, **options: Any) -> Any:
        image = {"type": "image_url", "image_url": {"url": url}}
        messages = [{"role": "user", "content": [image, {"type": "text", "text": question}]}]
        return self.client.chat.completions.create(model=self.model, messages=messages, **options)

    def close(self) -> None:
        self.http.close()
        self.client.close()
        self.server.should_exit = True
        self.thread.join(timeout=30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scans/scan.nii.gz, scans/ct (DICOM), and a scan outside of the allowed folder."""
    root = tmp_path_factory.mktemp("files")
    volume = make_phantom(1, shape=(16, 32, 32)).volume
    for place in (root / "scans", root):
        place.mkdir(exist_ok=True)
        nib.save(volume.to_source(volume.hu), place / "scan.nii.gz")
    dicom_series(root / "scans" / "ct", asymmetric((6, 16, 16)))
    dicom_series(root / "scans" / "two" / "a", asymmetric((6, 16, 16)))
    dicom_series(root / "scans" / "two" / "b", asymmetric((4, 16, 16)), SeriesInstanceUID="1.2.9")
    (root / "scans" / "link.nii.gz").symlink_to(root / "scan.nii.gz")
    return root


@pytest.fixture(scope="module")
def served(untrained: Path, folder: Path) -> Iterator[Served]:
    server = Served(untrained, folder / "scans")
    yield server
    server.close()


@pytest.fixture(scope="module")
def plain(untrained: Path, folder: Path) -> Study:
    return Study.open(folder / "scan.nii.gz", str(untrained), device="cpu")


def data_url(file: Path) -> str:
    return f"data:application/gzip;base64,{base64.b64encode(file.read_bytes()).decode()}"


@pytest.mark.parametrize("way", ["file", "data", "study"])
def test_a_scan_comes_as_file_data_or_study_and_the_answer_is_the_usual_one(
    served: Served, folder: Path, plain: Study, way: str
) -> None:
    url = {"file": f"file://{folder}/scans/scan.nii.gz", "data": data_url(folder / "scan.nii.gz")}.get(way, "")
    if way == "study":
        content = (folder / "scan.nii.gz").read_bytes()
        opened = served.http.post("/api/studies", params={"name": "scan.nii.gz"}, content=content).json()
        url = f"study:{opened['study']}"
    answer = served.ask(url)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.content == plain.ask(QUESTION, max_new_tokens=12)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.prompt_tokens == plain.prompt_tokens(QUESTION)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert 0 < answer.usage.completion_tokens <= 12
    again = served.ask(url)
    assert again.ctinstruct["study"] == answer.ctinstruct["study"]


def test_a_streamed_answer_is_the_whole_one_in_parts(served: Served, folder: Path) -> None:
    url = f"file://{folder}/scans/scan.nii.gz"
    whole = served.ask(url)
    chunks = list(served.ask(url, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert len({chunk.id for chunk in chunks}) == 1
    ended = [chunk for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason]
    assert [chunk.choices[0].finish_reason for chunk in ended] == [whole.choices[0].finish_reason]
    assert ended[0].ctinstruct["study"] == whole.ctinstruct["study"]
    assert chunks[-1].usage == whole.usage


def test_masks_and_probabilities_come_in_the_extension_with_addresses(
    served: Served, folder: Path, plain: Study
) -> None:
    more = {"ctinstruct": {"segment": ["liver"], "diagnose": "phantom"}}
    answer = served.ask(f"file://{folder}/scans/scan.nii.gz", extra_body=more)
    assert answer.ctinstruct["research_use_only"] is True
    assert answer.ctinstruct["diagnosis"] == pytest.approx(plain.diagnose("phantom"), abs=1e-5)
    mask = answer.ctinstruct["masks"]["liver"]
    got = nib.Nifti1Image.from_bytes(gzip.decompress(served.http.get(mask["url"]).content))
    wanted = plain.volume.to_source(plain.segment("liver"))
    assert np.array_equal(np.asarray(got.dataobj), np.asarray(wanted.dataobj))
    assert httpx.get(mask["url"]).status_code == 401


def test_an_answer_ends_where_the_client_says(served: Served, folder: Path) -> None:
    answer = served.ask(f"file://{folder}/scans/scan.nii.gz", max_completion_tokens=2)
    assert answer.usage.completion_tokens <= 2
    if answer.usage.completion_tokens == 2:
        assert answer.choices[0].finish_reason == "length"


def test_a_later_message_is_about_the_scan_of_an_earlier_one(served: Served, folder: Path, plain: Study) -> None:
    image = {"type": "image_url", "image_url": {"url": f"file://{folder}/scans/scan.nii.gz"}}
    messages: list[Any] = [
        {"role": "system", "content": "You are a radiologist."},
        {"role": "user", "content": [image, {"type": "text", "text": "Describe the scan."}]},
        {"role": "assistant", "content": "No nodule."},
        {"role": "user", "content": QUESTION},
    ]
    answer = served.client.chat.completions.create(model=served.model, messages=messages)
    assert answer.choices[0].message.content == plain.ask(QUESTION, max_new_tokens=12)


WRONG_SCANS = {
    "http://127.0.0.1/scan.nii.gz": "fetched from nowhere",
    "file:///etc/passwd": "nothing below the folder",
    "file://{folder}/scan.nii.gz": "nothing below the folder",
    "file://{folder}/scans/../scan.nii.gz": "nothing below the folder",
    "file://{folder}/scans/link.nii.gz": "nothing below the folder",
    "file://{folder}/scans/none.nii.gz": "nothing below the folder",
    "file://elsewhere/scans/scan.nii.gz": "without --files",
    "file://{folder}/scans/two": "2 CT series",
    "data:application/gzip,abc": "none of base64",
    "data:application/gzip;base64,a%b": "no base64",
    "data:application/gzip;base64,": "empty",
    "data:application/gzip;base64,bm8gc2Nhbg==": "is no NIfTI file",
}


@pytest.mark.parametrize("url", WRONG_SCANS)
def test_a_scan_that_cannot_be_had_is_an_error_object_of_one_sentence(served: Served, folder: Path, url: str) -> None:
    with pytest.raises(openai.BadRequestError, match=WRONG_SCANS[url]) as caught:
        served.ask(url.format(folder=folder))
    assert caught.value.body["type"] == "invalid_request_error"
    assert str(folder) not in str(caught.value)


def test_a_study_that_is_not_open_or_a_model_that_is_not_served_is_404(served: Served) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        served.ask("study:abcdefgh")
    assert caught.value.body["type"] == "not_found_error"
    with pytest.raises(openai.NotFoundError, match="not served here") as caught:
        served.client.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": "?"}])
    assert caught.value.body["code"] == "model_not_found"
    assert served.client.models.retrieve(served.model).id == served.model


WRONG_REQUESTS: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages must be a list"),
    ({"messages": [{"role": "user", "content": "Is it?"}]}, "There is no scan"),
    ({"messages": [{"role": "assistant", "content": "Yes."}]}, "last message must be of the user"),
    ({"n": 2}, "n is not supported"),
    ({"tools": [{"type": "function"}]}, "tools is not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
    ({"max_tokens": 0.5}, "max_completion_tokens must be"),
    ({"ctinstruct": {"paint": ["liver"]}}, "'paint' is no field"),
    ({"ctinstruct": {"segment": [3]}}, "structures must be a list"),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "'input_audio' is not read"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "An image_url part is"),
]


@pytest.mark.parametrize(("change", "sentence"), WRONG_REQUESTS)
def test_a_request_that_does_not_fit_is_an_error_object(
    served: Served, folder: Path, change: dict[str, Any], sentence: str
) -> None:
    image = {"type": "image_url", "image_url": {"url": f"file://{folder}/scans/scan.nii.gz"}}
    content = [image, {"type": "text", "text": QUESTION}]
    body = {"model": served.model, "messages": [{"role": "user", "content": content}], **change}
    answer = served.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert sentence in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


PATHS = [
    "/",
    "/static/app.js",
    "/api/model",
    "/v1/models",
    "/v1/chat/completions",
    "/health",
    "/metrics",
    "/api/openapi.json",
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("key", [None, "", "a key", KEY + "x", "ä"])
def test_nothing_is_served_without_the_key(served: Served, path: str, key: str | None) -> None:
    headers = {} if key is None else {"Authorization": f"Bearer {key}".strip().encode()}
    answer = httpx.get(served.address + path, headers=headers)
    assert answer.status_code == 401
    assert KEY not in answer.text
    error = answer.json()["error"]
    assert (error["type"] == "authentication_error") if path.startswith("/v1/") else isinstance(error, str)


def test_the_client_reports_a_wrong_key_as_such(served: Served) -> None:
    client = openai.OpenAI(base_url=f"{served.address}/v1", api_key="wrong", max_retries=0)
    with client, pytest.raises(openai.AuthenticationError) as caught:
        client.models.list()
    assert caught.value.body["code"] == "invalid_api_key"


def test_the_page_takes_the_key_once_and_keeps_it_in_a_cookie(served: Served) -> None:
    with httpx.Client(base_url=served.address, follow_redirects=True) as browser:
        assert browser.get("/", params={"key": "wrong"}).status_code == 401
        page = browser.get("/", params={"key": KEY})
        assert page.status_code == 200
        assert "key=" not in str(page.url)
        assert browser.get("/api/model").status_code == 200
        kept = page.history[0].headers["set-cookie"].lower()
        assert "httponly" in kept
        assert "samesite=strict" in kept


def test_operators_see_health_metrics_and_a_line_per_job_without_names(served: Served, folder: Path) -> None:
    served.ask(f"file://{folder}/scans/scan.nii.gz", "Is there a SECRET-NAME?")
    health = served.http.get("/health")
    assert (health.status_code, health.json()["status"]) == (200, "ok")
    assert {"waiting", "running", "studies"} <= set(health.json())
    text = served.http.get("/metrics").text
    from prometheus_client.parser import text_string_to_metric_families

    families = {family.name: family for family in text_string_to_metric_families(text)}
    done = {tuple(one.labels.values()): one.value for one in families["ctinstruct_jobs"].samples}
    assert done["ask", "done"] >= 1
    steps = {one.labels["step"] for one in families["ctinstruct_step_seconds"].samples}
    assert {"thinking", "writing"} <= steps
    assert families["process_resident_memory_bytes"].samples[0].value > 0
    assert families["ctinstruct_waiting"].samples[0].value == 0
    line = json.loads(served.lines[-1])
    assert (line["event"], line["kind"], line["status"]) == ("job", "ask", "done")
    assert line["seconds"]["writing"] >= 0
    assert not any(name in text + "".join(served.lines) for name in ("SECRET", "scan.nii", str(folder)))


@pytest.mark.parametrize("arguments", [["--host", "0.0.0.0"], ["--host", "192.0.2.1", "--api"], ["--files", "none"]])
def test_beyond_this_computer_nothing_starts_without_a_key(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "ctinstruct_hf.cli", "app", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert ("without which nothing is served" if "--host" in arguments else "is no folder") in " ".join(
        done.stderr.split()
    )
