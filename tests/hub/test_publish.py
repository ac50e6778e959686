"""Publishing with the real `huggingface_hub` client against a stand-in of the Hub, and loading back from it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ctinstruct_hf import CTInstructError
from ctinstruct_hf.hub.publish import check_repository, make_plan
from tests.hub.stand_in import Hub, running


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running() as one:
        yield one


@pytest.fixture
def folder(untrained: Path, tmp_path: Path) -> Path:
    target = tmp_path / "model"
    shutil.copytree(untrained, target, ignore=shutil.ignore_patterns("__pycache__"))
    (target / "training_args.bin").write_bytes(b"pickle")
    (target / "checkpoint-3").mkdir()
    (target / "README.md").write_text("an old card")
    return target


def run(hub: Hub, tmp_path: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_TOKEN": "hf_test", "HF_HOME": str(tmp_path / "home"),
                   "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}  # fmt: skip
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


def ctinstruct(hub: Hub, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run(hub, tmp_path, sys.executable, "-m", "ctinstruct_hf.cli", *arguments)


def test_a_dry_run_shows_what_would_go_and_sends_nothing(hub: Hub, folder: Path, tmp_path: Path) -> None:
    done = ctinstruct(hub, tmp_path, "publish", str(folder), "me/ct", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in done.stdout
    assert "private" in done.stdout
    assert "stays here: checkpoint-3, training_args.bin" in done.stdout
    assert "pipeline_tag: image-text-to-text" in done.stdout
    assert not hub.asked


def test_a_published_model_loads_back_with_its_own_code(hub: Hub, folder: Path, tmp_path: Path) -> None:
    done = ctinstruct(hub, tmp_path, "publish", str(folder), "me/ct")
    assert done.returncode == 0, (done.stderr, hub.asked)
    kept = hub.repositories["me/ct"]
    assert kept["private"] is True
    assert set(kept["files"]) == {path.name for path in folder.iterdir() if path.is_file()} - {"training_args.bin"}
    assert b"never a diagnosis" in kept["files"]["README.md"]
    assert kept["files"]["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    code = (
        "import sys; sys.modules['ctinstruct_hf'] = None\n"  # as on a machine without this package
        "from transformers import AutoModelForImageTextToText, AutoProcessor\n"
        "processor = AutoProcessor.from_pretrained('me/ct', trust_remote_code=True)\n"
        "model = AutoModelForImageTextToText.from_pretrained('me/ct', trust_remote_code=True)\n"
        "print(type(model).__name__, type(processor).__name__)"
    )
    loaded = run(hub, tmp_path, sys.executable, "-c", code)
    assert loaded.returncode == 0, loaded.stderr[-3000:]
    assert loaded.stdout.split() == ["CTInstructForConditionalGeneration", "CTInstructProcessor"]


def test_a_refusal_is_one_sentence(hub: Hub, folder: Path, tmp_path: Path) -> None:
    hub.refuses = 403
    done = ctinstruct(hub, tmp_path, "publish", str(folder), "me/ct")
    assert done.returncode == 2
    assert "The Hub does not take me/ct: " in done.stderr
    assert "Traceback" not in done.stderr
    assert not hub.repositories["me/ct"]["files"]


def test_what_is_no_whole_model_is_refused_before_anything_is_sent(folder: Path, tmp_path: Path) -> None:
    (folder / "vision_ctinstruct.py").unlink()
    with pytest.raises(CTInstructError, match=r"modeling_ctinstruct\.py needs vision_ctinstruct\.py"):
        make_plan(folder, "card")
    (folder / "modeling_ctinstruct.py").unlink()
    with pytest.raises(CTInstructError, match=r"lacks modeling_ctinstruct\.py"):
        make_plan(folder, "card")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CTInstructError, match=r"it lacks \*\.safetensors"):
        make_plan(folder, "card")
    with pytest.raises(CTInstructError, match="does not exist"):
        make_plan(tmp_path / "none", "card")
    with pytest.raises(CTInstructError, match="write user/name"):
        check_repository("../../etc")
