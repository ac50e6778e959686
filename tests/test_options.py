"""Options are obeyed or refused, never ignored."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from ctinstruct_hf import CTInstructConfig, CTInstructForPretraining
from ctinstruct_hf.cli import app
from ctinstruct_hf.errors import CTInstructError


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("pretrain miniature --table 3 --row ViT3D", "--row has no effect beside --table"),
        ("pretrain miniature --table 3 --restart", "--restart has no effect beside --table"),
        ("pretrain miniature --table 4 --resume runs/x", "--resume has no effect beside --table"),
        (
            "evaluate --predictions p.jsonl --model m --tasks report",
            "--model, --tasks has no effect beside --predictions",
        ),
        (
            "evaluate --predictions p.jsonl --split test --limit 3",
            "--split, --limit has no effect beside --predictions",
        ),
        ("evaluate --predictions p.jsonl --dataset ct_rate", "--dataset has no effect beside"),
        ("evaluate --data d --from m3d", "--from has no effect beside --data"),
    ],
)
def test_options_without_effect_are_refused_by_name(command: str, sentence: str) -> None:
    result = CliRunner().invoke(app, command.split())
    assert isinstance(result.exception, CTInstructError)
    assert sentence in str(result.exception)


def test_a_stage_one_model_is_evaluated_in_float32_only(tiny_config, tmp_path: Path) -> None:
    folder = tmp_path / "stage-one"
    CTInstructForPretraining(CTInstructConfig.preset("tiny")).save_pretrained(folder)
    command = [
        "evaluate",
        "--model",
        str(folder),
        "--data",
        "phantoms:slice:0-2",
        "--dtype",
        "bfloat16",
        "-o",
        str(tmp_path),
    ]
    result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, CTInstructError)
    assert "--dtype bfloat16 is for models that speak" in str(result.exception)
