"""The vision tower for ONNX Runtime: the same numbers, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ctinstruct_hf import CTInstructError, Study
from ctinstruct_hf.cli import app
from ctinstruct_hf.inference import onnx_export

onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")


def test_the_bundled_tower_gives_the_same_tokens_in_onnx_runtime(small_scan: Path, tmp_path: Path) -> None:
    path = tmp_path / "tower.onnx"
    done = CliRunner().invoke(app, ["export", "onnx", "-i", str(small_scan), "-o", str(path)])
    assert done.exit_code == 0, (done.exception, done.output)
    study = Study.open(small_scan, device="cpu")
    session = onnxruntime.InferenceSession(str(path))
    assert (
        json.loads(session.get_modelmeta().custom_metadata_map["patch_grid"]) == study.batch["patch_grid"][0].tolist()
    )
    batch = {name: study.batch[name].clone() for name in ("pixel_values", "slice_mask")}
    batch["pixel_values"] += 0.1 * torch.randn_like(batch["pixel_values"])  # another scan than the one of the export
    batch["slice_mask"][-1] = False
    with torch.inference_mode():
        features = study.model.model.vision_tower(batch["pixel_values"], study.batch["patch_grid"], batch["slice_mask"])
    tokens, *maps = session.run(None, {name: value.numpy() for name, value in batch.items()})
    np.testing.assert_allclose(tokens, features.last_hidden_state.numpy(), atol=1e-4, rtol=1e-4)
    assert [output.name for output in session.get_outputs()] == [
        "tokens",
        *(f"feature_map_{n}" for n in range(len(maps))),
    ]
    assert [part.shape for part in maps] == [tuple(part.shape) for part in features.feature_maps]
    with pytest.raises(CTInstructError, match="tokens of the exported tower differs from PyTorch by"):
        onnx_export.compare(path, batch, {"tokens": torch.from_numpy(tokens) + 0.01})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["torchscript", "-o", "tower.onnx"], "'torchscript' is no layout to export: use onnx"),
        (["onnx", "-o", "tower.bin"], "must be a file whose name ends in .onnx"),
        (["onnx", "-o", "tower.onnx", "--attention", "flash"], "attention is 'flash': use sdpa or eager"),
    ],
)
def test_what_cannot_be_exported_is_refused(arguments: list[str], words: str, small_scan: Path) -> None:
    done = CliRunner().invoke(app, ["export", *arguments, "-i", str(small_scan)])
    assert isinstance(done.exception, CTInstructError), (done.exception, done.output)
    assert words in str(done.exception)


def test_a_missing_library_is_named(small_scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_export, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(CTInstructError, match=r"needs onnxscript: pip install 'ctinstruct-hf\[onnx\]'"):
        onnx_export.export_tower(small_scan, tmp_path / "tower.onnx")
