"""Model cards and the doctor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from ctinstruct_hf import CTInstructError
from ctinstruct_hf.cli import app
from ctinstruct_hf.hub.card import make_card

SCORES = {
    "system": "mine",
    "tasks": [
        {
            "task": "diagnosis",
            "dataset": "ct_rate",
            "count": 60,
            "metrics": {"auc": {"mean": 0.81234, "sd": 0.1, "low": 0.75, "high": 0.86}, "ece": {"mean": None, "low": None}},
            "notes": ["thresholds: best F1 on 60 validation samples"],
        }
    ],
}  # fmt: skip


def test_a_card_has_what_the_hub_reads(untrained: Path, tmp_path: Path) -> None:
    (tmp_path / "scores.json").write_text(json.dumps(SCORES))
    text = make_card(
        untrained,
        tmp_path / "scores.json",
        name="me/ct",
        datasets=["ibrahimhamamci/CT-RATE"],
        base_model="Qwen/Qwen2-7B",
    )
    card = ModelCard(text)  # the real parser
    assert card.data.pipeline_tag == "image-text-to-text"
    assert card.data.base_model == "Qwen/Qwen2-7B"
    assert card.data.datasets == ["ibrahimhamamci/CT-RATE"]
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_type) == ("roc_auc", 0.8123, "ct_rate")
    assert "never a diagnosis" in text
    assert "The weights are random" in text  # the folder says so of itself
    assert "| diagnosis | ct_rate | 60 | AUC, mean over findings | 0.812 | 0.750–0.860 |" in text
    assert "best F1 on 60 validation samples" in text


def test_the_command_writes_it_beside_the_model(untrained: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(untrained, folder)
    (tmp_path / "notes.md").write_text("Trained on phantoms only.")
    done = CliRunner().invoke(app, ["card", str(folder), "--notes", str(tmp_path / "notes.md")])
    assert done.exit_code == 0, done.output
    text = (folder / "README.md").read_text()
    assert "Trained on phantoms only." in text
    assert yaml.safe_load(text.split("---")[1])["library_name"] == "transformers"


def test_what_is_no_model_or_no_evaluation_is_refused(untrained: Path, tmp_path: Path) -> None:
    with pytest.raises(CTInstructError, match="holds no model"):
        make_card(tmp_path)
    (tmp_path / "scores.json").write_text("{}")
    with pytest.raises(CTInstructError, match=r"is no scores\.json"):
        make_card(untrained, tmp_path / "scores.json")


def test_the_doctor_examines_and_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 0, done.output
    for topic in ("Python", "torch", "CPU", "DICOM SEG", "METEOR", "self-test"):
        assert topic in done.output
    assert "the bundled model answers in" in done.output
    from ctinstruct_hf.cli import doctor

    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    told = {finding.topic: finding for finding in doctor.examine()}
    assert told["DICOM SEG"].found == "missing"
    assert "dicom-seg" in told["DICOM SEG"].advice
    monkeypatch.setattr(
        "ctinstruct_hf.inference.study.load_model", lambda *_: (_ for _ in ()).throw(OSError("no weights"))
    )
    broken = CliRunner().invoke(app, ["doctor"])
    assert broken.exit_code == 1
    assert "failed: OSError: no weights" in broken.output
