"""Other systems' own files, in the forms that their evaluation scripts write."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner
from wordnets import needs_wordnet

from ctinstruct_hf import CTInstructError
from ctinstruct_hf.cli import app
from ctinstruct_hf.evaluation.converters import convert_predictions
from ctinstruct_hf.evaluation.predictions import read_predictions


def table(path: Path, *rows: list[Any]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


def test_m3d(tmp_path: Path) -> None:
    closed = table(
        tmp_path / "eval_close_vqa.csv",
        ["Question Type", "Question", "Answer", "Answer Choice", "Pred", "Correct"],
        [1, "Which plane? Choices: A. Axial B. Coronal C. Sagittal D. Oblique", "Axial", "A", "A. Axial", 1],
        [1, "Which phase? Choices: A. Native B. Arterial C. Venous D. Late", "Late", "D", "The answer is B.", 0],
    )
    found = convert_predictions("m3d", closed)
    assert found.system == "M3D"
    assert found.records[0].options == ["Axial", "Coronal", "Sagittal", "Oblique"]
    assert found.records[1].reference == "D. Late"
    opened = table(
        tmp_path / "eval_open_vqa.csv",
        ["Question Type", "Question", "Answer", "Pred", "bleu", "rouge1", "meteor", "bert_f1"],
        [2, "What is seen?", " A cyst ", "A mass", 0.5, 0.5, 0.5, 0.9],
    )
    assert convert_predictions("m3d", opened).records[0].reference == "A cyst"
    caption = table(
        tmp_path / "eval_caption.csv",
        ["Question", "Ground Truth", "pred", "bleu", "rouge1", "meteor", "bert_f1"],
        ["Describe.", "Normal.", "Normal liver.", 0.5, 0.5, 0.5, 0.9],
    )
    assert convert_predictions("m3d", caption).records[0].task == "caption"


def test_radfm_cells_are_printed_lists(tmp_path: Path) -> None:
    path = table(
        tmp_path / "output.csv",
        ["Question", "Ground Truth", "Pred", "belong_to"],
        ["['What is it?']", '["It\'s a cyst."]', "['A cyst.']", "['rp3d_vqa']"],
        ["['Write a caption.']", "['Normal.']", "['Normal.']", "['rp3d_caption']"],
    )
    first, second = convert_predictions("radfm", path).records
    assert (first.question, first.reference, first.prediction, first.dataset) == ("What is it?", "It's a cyst.", "A cyst.", "rp3d_vqa")  # fmt: skip
    assert second.task == "caption"
    assert convert_predictions("radfm", path, dataset="mine").records[0].dataset == "mine"


def ct_chat_files(tmp_path: Path, image: str = "valid_1_a_1.npz") -> tuple[Path, Path]:
    turns = [
        ("<image>\nIs there a nodule?<short_answer>", "short_answer", "Yes."),
        ("<image>\nWhich? (A) Nodule (B) Cyst<multiple_choice>", "multiple_choice", "(A) Nodule"),
        ("<image>\nWrite a report.<report_generation>", "report_generation", "Findings: nodule."),
    ]
    right = [
        {
            "id": "case1",
            "image": "valid_1_a_1.nii.gz",
            "conversations": [
                turn
                for question, kind, answer in turns
                for turn in (
                    {"from": "human", "value": question, "type": kind},
                    {"from": "gpt", "value": answer},
                )
            ],
        }
    ]
    said = [{"image": image, "conversations_out": [{"question": q, "answer": "(A) Nodule</s>"} for q, _, _ in turns]}]
    for name, content in (("out.json", said), ("valid_vqa.json", right)):
        (tmp_path / name).write_text(json.dumps(content))
    return tmp_path / "out.json", tmp_path / "valid_vqa.json"


def test_ct_chat_with_the_right_answers_of_ct_rate(tmp_path: Path) -> None:
    out, right = ct_chat_files(tmp_path)
    records = convert_predictions("ct_chat", out, right).records
    assert [record.task for record in records] == ["question", "multiple_choice", "report"]
    assert records[0].question == "Is there a nodule?"
    assert records[1].options == ["Nodule", "Cyst"]
    assert records[1].prediction == "(A) Nodule"
    with pytest.raises(CTInstructError, match="needs --references"):
        convert_predictions("ct_chat", out)


def test_ct_chat_answers_about_another_volume_are_refused(tmp_path: Path) -> None:
    out, right = ct_chat_files(tmp_path, image="valid_2_a_1.npz")
    with pytest.raises(CTInstructError, match=r"about valid_2_a_1.npz, valid_vqa.json about valid_1_a_1.nii.gz"):
        convert_predictions("ct_chat", out, right)


def test_the_releases_own_files(tmp_path: Path) -> None:
    path = tmp_path / "report_ctrate.json"
    sample = {
        "predict": ["system\n…\nassistant\nNormal."],
        "ground_truth": ["Normal. "],
        "question": [[{"type": "image"}, {"type": "text", "text": "Please generate a report."}]],
    }
    path.write_text(json.dumps({"metric": {"meteor": 1}, "1": sample}))
    record = convert_predictions("released", path).records[0]
    assert (record.task, record.prediction, record.reference) == ("report", "Normal.", "Normal.")
    assert record.question == "Please generate a report."
    masks = tmp_path / "seg_ctorg.json"
    masks.write_text(json.dumps({"metric": {}, "1": {**sample, "dice": "0.98"}}))
    assert convert_predictions("released", masks).records[0].masks[0]["dice"] == 0.98
    diagnosis = tmp_path / "diag.json"
    diagnosis.write_text(json.dumps({"1": {**sample, "ground_truth": ["nodule <disease_confidence>"]}}))
    with pytest.raises(CTInstructError, match="keeps no probabilities"):
        convert_predictions("released", diagnosis)


def test_files_of_another_form_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CTInstructError, match=r"lacks the columns Pred"):
        convert_predictions("radfm", table(tmp_path / "x.csv", ["Question", "Ground Truth"], ["a", "b"]))
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(CTInstructError, match="holds list, expected dict"):
        convert_predictions("released", tmp_path / "x.json")
    with pytest.raises(CTInstructError, match="'merlin' is not known"):
        convert_predictions("merlin", tmp_path / "x.json")
    with pytest.raises(CTInstructError, match="does not exist"):
        convert_predictions("m3d", tmp_path / "none.csv")


@needs_wordnet
def test_the_command_converts_and_scores(tmp_path: Path) -> None:
    out, right = ct_chat_files(tmp_path)
    done = CliRunner().invoke(app, ["evaluate", "--predictions", str(out), "--from", "ct_chat", "--references", str(right), "-o", str(tmp_path / "e")])  # fmt: skip
    assert done.exit_code == 0, done.output
    assert len(read_predictions(tmp_path / "e" / "predictions.jsonl").records) == 3
    scores = json.loads((tmp_path / "e" / "scores.json").read_text())
    assert {task["task"] for task in scores["tasks"]} == {"question", "multiple_choice", "report"}
    assert (tmp_path / "e" / "page" / "index.html").exists()
