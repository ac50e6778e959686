"""The fingerprint of a model's files: the same for a copy, another for any change that answers can depend on."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from ctinstruct_hf import CTInstructError
from ctinstruct_hf.inference import fingerprint as module
from ctinstruct_hf.inference.fingerprint import fingerprint


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def change_setting(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"note": "another"}))


def test_a_copied_model_has_the_same_fingerprint_whatever_its_folder_name_times_and_notes(
    untrained: Path, tmp_path: Path
) -> None:
    copied = tmp_path / "another name"
    shutil.copytree(untrained, copied)
    for path in copied.iterdir():
        os.utime(path, (1, 1))
    (copied / "README.md").write_text("a note")
    (copied / "trainer_state.json").write_text("{}")
    assert fingerprint(copied) == fingerprint(str(untrained))
    assert len(fingerprint(copied)) == 64


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize(
    ("file", "change"),
    [("model.safetensors", flip_last_byte), ("config.json", change_setting)],
    ids=["weights", "config"],
)
def test_two_models_of_one_folder_name_are_told_apart(
    untrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, change, sampled: bool
) -> None:
    if sampled:
        monkeypatch.setattr(module, "WHOLE_BYTES", 2**16)
    other = tmp_path / untrained.name
    shutil.copytree(untrained, other)
    before = fingerprint(other)
    times = (other / file).stat()
    change(other / file)
    os.utime(other / file, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    assert fingerprint(other) != before


def test_what_is_no_model_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(CTInstructError, match="holds no file of a model"):
        fingerprint(tmp_path)
    with pytest.raises(CTInstructError, match="neither a folder nor a name on the Hub"):
        fingerprint(tmp_path / "nowhere")
