"""Killed processes, full disks and locked folders: nothing cut short has a final name, and a second run ends as if undisturbed."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import pytest
import yaml
from datasets_on_disk import nnunet
from repository import shared
from safetensors import safe_open
from trainings import QUICK, SMALL, losses

from ctinstruct_hf import CTInstructError
from ctinstruct_hf.files import whole_file, whole_folder, why_unwritable
from ctinstruct_hf.train.checkpoints import MARK
from tests.hub.stand_in import running

CHANGING = (".log", ".html", "README.md", "run.json", "training_args.bin", "results.csv")  # hold times, places, or logs


def start(arguments: list[str], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "ctinstruct_hf.cli", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(arguments: list[str], **environment: str) -> float:
    """Seconds of a run that must succeed."""
    began = time.monotonic()
    process = start(arguments, **environment)
    _, told = process.communicate(timeout=600)
    assert process.returncode == 0, told[-3000:]
    return time.monotonic() - began


def kill_within(seconds: float, arguments: list[str], **environment: str) -> None:
    """Kill a command, and what it started, unless it ends within so many seconds."""
    process = start(arguments, **environment)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def final_files(folder: Path) -> Iterator[Path]:
    """What has a final name: no drafts, and of checkpoints only those that say they are whole."""
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if not path.is_file() or any(part.startswith(".") for part in parts):
            continue
        checkpoint = next((part for part in parts if part.startswith("checkpoint-")), None)
        if checkpoint is not None and not (folder / checkpoint / MARK).exists():
            continue
        yield path


def check_whole(path: Path) -> None:
    """Raises where a file is cut short."""
    if path.suffix == ".json":
        json.loads(path.read_text())
    elif path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                file.get_tensor(name)
    elif path.name.endswith(".nii.gz"):
        gzip.decompress(path.read_bytes())
        nib.load(path).get_fdata()
    elif path.suffix == ".html":
        assert path.read_text().rstrip().endswith("</html>"), path


def contents(folder: Path) -> dict[str, str]:
    """{file: hash} of results that must not depend on when and where they were made."""
    found = {}
    for path in final_files(folder):
        name = str(path.relative_to(folder))
        if "checkpoint-" in name or "runs/" in name or path.name.endswith(CHANGING):
            continue
        text = path.read_bytes().replace(str(folder).encode(), b"OUT")
        if path.name == "findings.json":
            text = re.sub(rb'"date": "[^"]*"', b'"date": ""', text)
        found[name] = hashlib.sha256(text).hexdigest()
    return found


@pytest.fixture
def task(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A function: output folder -> arguments of a command."""
    verb = request.param
    if verb == "predict":
        from ctinstruct_hf.phantoms import make_phantom

        (tmp_path / "scans").mkdir()
        for seed in range(3):
            volume = make_phantom(seed, shape=(24, 48, 48)).volume
            nib.save(volume.to_source(volume.hu), tmp_path / "scans" / f"{seed}.nii.gz")
        return lambda out: ["predict", "-i", str(tmp_path / "scans"), "-o", str(out), "--segment", "liver,heart", "--ask", "Is there a nodule?"]  # fmt: skip
    if verb == "prepare":
        raw = tmp_path / "raw"
        nnunet(raw, 40)
        return lambda out: ["data", "prepare", "nnunet", "-i", str(raw), "-o", str(out), "--workers", "1"]
    if verb == "evaluate":
        return lambda out: ["evaluate", "--data", "phantoms:trunk:900100-900102", "-o", str(out), "--limit", "3", "--tasks", "question,segmentation,report", "--max-new-tokens", "20"]  # fmt: skip
    if verb == "convert":
        source = shared("reference/released_tiny")
        return lambda out: ["convert", "released", "-i", str(source), "-o", str(out)]
    recipe: dict[str, Any] = {
        "cache": str(tmp_path / "cache"),
        "max_steps": 8,
        "save_steps": 2,
        **QUICK,
    }
    slices = {"kind": "slice", "seeds": [0, 6]}
    if verb == "pretrain":
        recipe |= {
            "text_encoder": str(request.getfixturevalue("text_encoder")),
            "image_processor": SMALL,
            "vision": {"stage_depths": [1, 1, 1, 1], "num_slice_attention_layers": 1},
            "mixture": [{"phantoms": slices, "batch_size": 3}],
            "masks_per_image": 3,
        }
    else:
        recipe |= {
            "vision": str(request.getfixturevalue("stage_one")),
            "language_model": "tiny",
            "mixture": [{"phantoms": slices, "tasks": ["report", "question", "segmentation"]}],
        }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return lambda out: [verb, str(tmp_path / "recipe.yaml"), "-o", str(out)]


def kill_again_and_again(task: Any, folder: Path, times: int) -> None:
    """Kill a command at random moments; then it must end as one that nothing disturbed."""
    seconds = finish(task(folder / "whole"))
    moments = random.Random(0)
    for _ in range(times):
        kill_within(moments.uniform(0.2, 1.0) * seconds, task(folder / "killed"))
        if (folder / "killed").exists():
            for path in final_files(folder / "killed"):
                check_whole(path)
    if not (folder / "killed" / "dataset.json").exists():  # a finished data set is not made twice
        finish(task(folder / "killed"))
    assert contents(folder / "killed") == contents(folder / "whole")
    left = [path.name for path in (*folder.glob(".killed*"), *(folder / "killed").rglob("*.part"))]
    assert not left, left


@pytest.mark.parametrize("task", ["predict", pytest.param("prepare", marks=pytest.mark.slow)], indirect=True)
def test_killed_and_run_again(task: Any, tmp_path: Path) -> None:
    kill_again_and_again(task, tmp_path, 2)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["predict", "prepare", "evaluate", "convert", "pretrain", "instruct"], indirect=True)
def test_killed_ten_times_and_run_again(task: Any, tmp_path: Path) -> None:
    kill_again_and_again(task, tmp_path, 10)
    if (tmp_path / "whole" / "recipe.json").exists():
        assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


@pytest.mark.slow
def test_publishing_is_killed_ten_times(untrained: Path, tmp_path: Path) -> None:
    moments = random.Random(0)
    with running() as hub:
        environment = {"HF_ENDPOINT": hub.address, "HF_TOKEN": "hf_test", "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}  # fmt: skip
        seconds = finish(["publish", str(untrained), "me/whole"], **environment)
        whole = hub.repositories["me/whole"]["files"]
        for _ in range(10):
            kill_within(moments.uniform(0.2, 1.0) * seconds, ["publish", str(untrained), "me/killed"], **environment)
            sent = hub.repositories.get("me/killed", {}).get("files", {})
            assert sent.keys() in (set(), whole.keys())  # one commit: all or nothing
        finish(["publish", str(untrained), "me/killed"], **environment)
        sent = hub.repositories["me/killed"]["files"]
    assert sent.keys() == whole.keys()
    assert all(sent[name] == whole[name] for name in whole if name != "README.md")


# full and locked places


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Any]:
    """A function: megabytes, options -> a file system of that size."""
    mounted = []

    def mount(megabytes: float, options: str = "rw") -> Path:
        place = tmp_path / f"small-{len(mounted)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={int(megabytes * 1024)}k,{options}", "tmpfs", str(place)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("a small file system cannot be mounted here")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", str(place)], check=False)


@pytest.mark.parametrize("options", ["rw", pytest.param("ro", marks=pytest.mark.slow)])
@pytest.mark.parametrize("task", ["predict", "prepare", "convert", "pretrain", "evaluate"], indirect=True)
def test_a_full_or_locked_place_is_one_sentence(task: Any, full: Any, options: str) -> None:
    place = full(0.02 if options == "rw" else 1, options)
    process = start(task(place / "out"))
    told, wrong = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "Traceback" not in wrong, wrong[-3000:]
    sentence = [line for line in (told + wrong).splitlines() if "cannot be written" in line]
    assert sentence, told + wrong
    assert "No space left" in sentence[-1] or "Read-only file system" in sentence[-1]
    if (place / "out").exists():
        for path in final_files(place / "out"):
            check_whole(path)
        assert not list((place / "out").rglob("*.part"))
    assert not list(place.glob(".*"))


# the two helpers that all of it stands on


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    def write(error: type[Exception]) -> None:
        with whole_file(tmp_path / "a.json") as draft:
            draft.write_text("half")
            raise error

    with pytest.raises(KeyError):
        write(KeyError)
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "b") as draft:  # noqa: PT012
        (draft / "a").write_text("half")
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_what_a_dead_process_left_is_removed_and_a_living_one_kept(tmp_path: Path) -> None:
    script = f"""
import os, signal, sys
from pathlib import Path
from ctinstruct_hf.files import whole_file, whole_folder
here = Path({str(tmp_path)!r})
with whole_file(here / "a.json") as draft, whole_folder(here / "b") as folder:
    draft.write_text("half")
    (folder / "c").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", script], check=False)
    assert len(list(tmp_path.glob(".*"))) == 2
    living = subprocess.Popen([sys.executable, "-c", script.replace("os.kill(os.getpid(), signal.SIGKILL)", "print(flush=True); sys.stdin.read()")], stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    assert living.stdout is not None
    living.stdout.readline()
    with whole_file(tmp_path / "a.json") as draft, whole_folder(tmp_path / "b") as folder:
        draft.write_text("whole")
        (folder / "c").write_text("whole")
    drafts = list(tmp_path.glob(".*"))
    assert len(drafts) == 2
    assert all(f"-{living.pid}." in path.name for path in drafts)
    living.kill()
    living.communicate()
    with whole_file(tmp_path / "a.json") as draft, whole_folder(tmp_path / "b") as folder:
        draft.write_text("whole")
        (folder / "c").write_text("whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b"]


def test_only_trouble_with_the_place_is_told_as_such() -> None:
    import errno

    full = OSError(errno.ENOSPC, "No space left on device", "/x/y")
    assert why_unwritable(full) == "/x/y cannot be written: No space left on device."
    wrapped = RuntimeError("serialising failed")
    wrapped.__cause__ = full
    assert why_unwritable(wrapped) == "/x/y cannot be written: No space left on device."
    assert why_unwritable(RuntimeError("[enforce fail] file write failed")) is not None
    assert why_unwritable(FileNotFoundError(errno.ENOENT, "No such file or directory")) is None
    assert why_unwritable(CTInstructError("bad")) is None
