"""Models by name: one snapshot from a stand-in of the Hub, with and without network, and what the Hub says."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_client import point_to
from typer.testing import CliRunner

from ctinstruct_hf import CTInstructError
from ctinstruct_hf.cli import app
from ctinstruct_hf.inference import models
from ctinstruct_hf.inference.models import load_model, resolve_model
from tests.hub.stand_in import COMMIT, Hub, running

_FILES = ("config.json", "generation_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json",
          "chat_template.jinja", "model.safetensors")  # fmt: skip


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A Hub whose cache is empty."""
    with running() as one:
        point_to(monkeypatch, one.address, tmp_path / "cache")
        yield one


@pytest.fixture
def published(hub: Hub, untrained: Path) -> Hub:
    files = {name: (untrained / name).read_bytes() for name in _FILES if (untrained / name).exists()}
    files |= {"pytorch_model.bin": b"pickle", "token.json": b"{}", "modeling_evil.py": b"raise SystemExit"}
    hub.repositories["me/ct"] = {"private": False, "files": files}
    return hub


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that takes connections and never answers, as behind a wall."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(64)
        held: list[Any] = []
        threading.Thread(target=lambda: hold(server, held), daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def hold(server: socket.socket, held: list[Any]) -> None:
    while True:
        try:
            held.append(server.accept())
        except OSError:
            return


def test_processor_and_weights_come_from_one_snapshot_of_the_files_that_are_needed(published: Hub) -> None:
    found = resolve_model("me/ct")
    assert (found.name, found.commit) == ("me/ct", COMMIT)
    assert found.folder.name == COMMIT
    assert {path.name for path in found.folder.iterdir()} == set(_FILES) & set(published.repositories["me/ct"]["files"])
    asked = len(published.asked)
    network, processor = load_model("me/ct", "cpu")
    assert network.config._commit_hash == COMMIT
    assert processor.image_processor.patch_size["depth"] == 32
    assert len(published.asked) == asked  # nothing more was asked for
    models._snapshot.cache_clear()
    resolve_model("me/ct")
    assert len(published.asked) == asked + 1  # which commit it is; the files are there
    models._snapshot.cache_clear()
    assert resolve_model("me/ct", COMMIT) == found
    assert len(published.asked) == asked + 1  # a commit never changes


def test_without_network_what_is_cached_is_used_and_what_is_not_fails_within_seconds(
    published: Hub, silent: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(models, "_SECONDS", 1.5)
    found = resolve_model("me/ct")
    for address in (silent, "http://127.0.0.1:9", "http://nowhere.invalid"):
        point_to(monkeypatch, address, tmp_path / "cache")
        start = time.monotonic()
        assert resolve_model("me/ct") == found
        assert f"commit {COMMIT} of the cache is used" in caplog.text
        with pytest.raises(CTInstructError, match=r"'me/other' cannot be loaded: .* not in the cache"):
            resolve_model("me/other")
        assert time.monotonic() - start < 10
        caplog.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    models._snapshot.cache_clear()
    assert resolve_model("me/ct") == found


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((403, "GatedRepo", "Access to model me/x is restricted and you are not in the authorized list."),
         "'me/x' cannot be loaded: Access to model me/x is restricted and you are not in the authorized list. Ask for access"),
        ((401, "", "Invalid username or password."), "Invalid username or password. Check the name; a private model needs"),
        ((404, "RepoNotFound", "Repository not found"), "Repository not found. Check the name"),
        ((403, "", "This token may not read me/x"), "This token may not read me/x"),
        ((500, "", "We are having a bad day"), "We are having a bad day"),
    ],
)  # fmt: skip
def test_the_hub_says_itself_why_not(answer: tuple[int, str, str], words: str, hub: Hub) -> None:
    hub.answers["me/x"] = answer
    with pytest.raises(CTInstructError) as error:
        resolve_model("me/x")
    assert words in str(error.value)
    assert "Client Error" not in str(error.value)
    assert "\n" not in str(error.value)


def test_revisions_are_of_names_only(published: Hub, untrained: Path) -> None:
    assert resolve_model("me/ct", "main").commit == COMMIT
    with pytest.raises(CTInstructError, match="Invalid rev id: v9"):
        resolve_model("me/ct", "v9")
    with pytest.raises(CTInstructError, match=r"name on the Hub\. Name a revision by --revision"):
        resolve_model("me/ct@main")
    with pytest.raises(CTInstructError, match="is a folder"):
        resolve_model(str(untrained), "main")
    with pytest.raises(CTInstructError, match="needs a model"):
        resolve_model(None, "main")
    with pytest.raises(CTInstructError, match="is a file"):
        resolve_model(untrained / "config.json")
    assert resolve_model(untrained) == models.ResolvedModel(untrained, str(untrained))
    for name in ("a" * 5000, "a/b/c", "\0", "/nowhere/at/all"):
        with pytest.raises(CTInstructError, match="neither a folder nor a name on the Hub"):
            resolve_model(name)


@pytest.mark.parametrize("verb", ["predict", "evaluate", "app"])
def test_verbs_with_a_model_take_a_revision(verb: str, published: Hub, small_scan: Path, tmp_path: Path) -> None:
    arguments = {
        "predict": ["-i", str(small_scan), "-o", str(tmp_path / "out")],
        "evaluate": ["--data", "phantoms:slice:0-2", "-o", str(tmp_path / "out")],
        "app": ["--no-browser"],
    }[verb]
    done = CliRunner().invoke(app, [verb, *arguments, "--model", "me/ct", "--revision", "v9"])
    assert isinstance(done.exception, CTInstructError), (done.exception, done.output)
    assert "Invalid rev id: v9" in str(done.exception)
    assert not (tmp_path / "out").exists()
