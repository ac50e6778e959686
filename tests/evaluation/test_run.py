"""A model over data: with the bundled model and a small stage-one model, on made-up scans."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

from ctinstruct_hf import CTInstructConfig, CTInstructError, CTInstructImageProcessor
from ctinstruct_hf.cli import app
from ctinstruct_hf.data.prepared import write_rows
from ctinstruct_hf.data.reading import phantom_of
from ctinstruct_hf.data.samples import ImageRef, InstructionSample, Label, MaskRef, from_row, to_row, write_jsonl
from ctinstruct_hf.data.sources.made_up import phantom_rows
from ctinstruct_hf.data.tiny import TINY_PATCH
from ctinstruct_hf.evaluation.predictions import read_predictions
from ctinstruct_hf.evaluation.rows import split_of_data
from ctinstruct_hf.evaluation.run import RunOptions, load_data, options_of, run_model
from ctinstruct_hf.evaluation.scoring import score_predictions
from ctinstruct_hf.inference.study import BUNDLED_MODEL, Study
from tests.evaluation.test_text import needs_wordnet

QUICK = RunOptions(limit=2, max_new_tokens=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL of all kinds of instructions about three slices, and one that cannot be read."""
    rows = phantom_rows("slice", range(3), "test", samples="instructions", workers=1)
    samples = [from_row(row, "instructions") for row in rows]
    held_out = from_row({**rows[0], "id": "v", "split": "validation"}, "instructions")
    diagnosis = next(one for one in samples if one.task == "diagnosis")  # type: ignore[union-attr]
    validation = from_row({**to_row(diagnosis), "id": "v/diagnosis", "split": "validation"}, "instructions")
    broken = InstructionSample(
        "broken", [ImageRef("/nowhere/scan.nii.gz")], samples[0].messages, "report", "test", "mine"
    )  # type: ignore[union-attr]
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    write_jsonl([broken, *samples, held_out, validation], path)  # type: ignore[list-item]
    return path


@needs_wordnet
def test_every_task_is_answered_and_scored(data: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app, ["evaluate", "--data", str(data), "-o", str(tmp_path / "out"), "--limit", "2", "--max-new-tokens", "4"]
    )
    assert done.exit_code == 0, done.output
    assert "1 samples failed: broken" in done.output
    found = read_predictions(tmp_path / "out" / "predictions.jsonl")
    tasks = {record.task for record in found.good}
    assert {"report", "question", "diagnosis", "segmentation"} <= tasks
    assert all(sum(record.task == task and record.split == "test" for record in found.records) <= 2 for task in tasks)
    assert [record.id for record in found.records if record.split == "validation"] == ["v/diagnosis"]
    for record in found.good:
        for mask in record.masks:
            assert (tmp_path / "out" / mask["prediction"]).exists()
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    by_task = {one["task"]: one for one in scores["tasks"]}
    assert "validation samples" in by_task["diagnosis"]["notes"][0]
    assert [name for one in scores["tasks"] for name in one["failed"]] == ["broken"]
    assert not (tmp_path / "out" / "parts").exists()


def test_answers_do_not_depend_on_the_batch(data: Path, tmp_path: Path) -> None:
    one = run_model(str(BUNDLED_MODEL), str(data), tmp_path / "one", RunOptions(("question",), limit=3, batch_size=1, max_new_tokens=6))  # fmt: skip
    three = run_model(str(BUNDLED_MODEL), str(data), tmp_path / "three", RunOptions(("question",), limit=3, batch_size=3, max_new_tokens=6))  # fmt: skip
    assert [record.prediction for record in read_predictions(one).records] == [record.prediction for record in read_predictions(three).records]  # fmt: skip


def test_an_interrupted_run_goes_on(data: Path, tmp_path: Path) -> None:
    options = RunOptions(("diagnosis", "report"), max_new_tokens=4)
    whole = read_predictions(run_model(str(BUNDLED_MODEL), str(data), tmp_path / "whole", options))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    lines = (tmp_path / "cut" / "predictions.jsonl").read_text().splitlines()
    (tmp_path / "cut" / "predictions.jsonl").unlink()
    (tmp_path / "cut" / "parts").mkdir()
    # what a process that was killed in the middle of a line leaves behind
    (tmp_path / "cut" / "parts" / "0-of-1.jsonl").write_text("\n".join(lines[1:3]) + "\n" + lines[3][:20])
    again = read_predictions(run_model(str(BUNDLED_MODEL), str(data), tmp_path / "cut", options))
    assert again.records == whole.records
    with pytest.raises(CTInstructError, match="another max_new_tokens"):
        run_model(
            str(BUNDLED_MODEL), str(data), tmp_path / "cut", RunOptions(("diagnosis", "report"), max_new_tokens=5)
        )


def test_two_processes_give_what_one_gives(data: Path, tmp_path: Path) -> None:
    arguments = ["evaluate", "--data", str(data), "--tasks", "diagnosis", "-o"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29611"]
    done = subprocess.run(
        [*launch, "-m", "ctinstruct_hf.cli", *arguments, str(tmp_path / "two")],
        env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    alone = CliRunner().invoke(app, [*arguments, str(tmp_path / "one")])
    assert alone.exit_code == 0, alone.output
    one, two = (read_predictions(tmp_path / name / "predictions.jsonl").records for name in ("one", "two"))
    assert [record.id for record in one] == [record.id for record in two]
    for a, b in zip(one, two, strict=True):
        assert a.probabilities == pytest.approx(b.probabilities, abs=1e-5)


def test_made_up_scans_by_seed() -> None:
    rows = load_data("phantoms:slice:0-5", "alignment", "test")
    assert [row["id"] for row in rows] == [f"phantom:slice:{seed}" for seed in range(4)]
    assert [row["id"] for row in load_data("phantoms:slice:0-5", "alignment", "validation")] == ["phantom:slice:4"]


def test_a_stage_one_model_is_asked_for_what_it_can(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from ctinstruct_hf.modeling.pretraining_ctinstruct import CTInstructForPretraining
    from ctinstruct_hf.train.checkpoints import save_trained

    folder = tmp_path / "model"
    model = CTInstructForPretraining(CTInstructConfig.preset("tiny"))
    processor = CTInstructImageProcessor(patch_size=TINY_PATCH, max_patches=4)
    save_trained(folder, model, AutoTokenizer.from_pretrained(BUNDLED_MODEL), processor)
    file = run_model(str(folder), "phantoms:slice:0-8", tmp_path / "out", RunOptions())
    found = read_predictions(file)
    assert {record.task for record in found.good} == {"retrieval", "diagnosis", "segmentation"}
    scores = score_predictions(found, bootstraps=20)
    retrieval, masks = scores.find("retrieval", "phantoms"), scores.find("segmentation", "phantoms")
    assert retrieval is not None
    assert set(retrieval.metrics) == {"ir@5", "ir@10", "tr@5", "tr@10"}
    assert masks is not None
    assert 0 <= masks.metrics["dice"].mean <= 1
    with pytest.raises(CTInstructError, match="report: this model can be asked retrieval"):
        run_model(str(folder), "phantoms:slice:0-8", tmp_path / "other", RunOptions(("report",)))


def test_bad_arguments_are_one_sentence(tmp_path: Path) -> None:
    for arguments, message in (
        (["--data", str(tmp_path / "none")], "does not exist"),
        ([], "Give either --data"),
        (["--data", "phantoms:slice:0-2", "--model", str(tmp_path)], "cannot be loaded"),
        (["--data", "phantoms:slice:0-2", "--thresholds", "x"], "thresholds is 'x'"),
        (["--data", "phantoms:slice:0-2", "--tasks", "poem"], "--tasks has poem"),
    ):
        done = CliRunner().invoke(app, ["evaluate", *arguments, "-o", str(tmp_path / "out")])
        assert isinstance(done.exception, CTInstructError), done.output
        assert message in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_a_question_without_choices_fails_alone(tmp_path: Path) -> None:
    rows = phantom_rows("slice", range(1), "test", samples="instructions", workers=1)
    asked = from_row(next(row for row in rows if row["task"] == "question"), "instructions")
    odd = from_row({**to_row(asked), "id": "odd", "task": "multiple_choice"}, "instructions")
    write_jsonl([odd, asked], tmp_path / "rows.jsonl")
    found = read_predictions(run_model(str(BUNDLED_MODEL), str(tmp_path / "rows.jsonl"), tmp_path / "out", QUICK))
    assert [(one.id, "lists no choices" in one.error) for one in found.records] == [("odd", True), (asked.id, False)]


def conversation(*turns: tuple[str, str], **values: object) -> InstructionSample:
    messages: list[dict[str, object]] = []
    for place, (question, answer) in enumerate(turns):
        shown = [{"type": "image"}] if place == 0 else []
        messages.append({"role": "user", "content": [*shown, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    base: dict[str, object] = {
        "images": [ImageRef("phantom:trunk:3")],
        "id": "talk",
        "task": "segmentation",
        "split": "test",
        "source": "mine",
    }
    return InstructionSample(messages=messages, **{**base, **values})  # type: ignore[arg-type]


def test_each_turn_of_a_conversation_is_scored_as_what_it_is(tmp_path: Path) -> None:
    """Masks, then other masks by a name as people write it, then text, choices and probabilities."""
    scan = "phantom:trunk:3"
    mask = {
        "Left_Kidney": MaskRef("Left_Kidney", scan),
        "liver": MaskRef("liver", scan),
        "spleen": MaskRef("spleen", scan),
    }
    first = ("Where is the liver?", "Sure, it is <SEG>.")
    labels = [Label("Pleural_Effusion", 1), Label("emphysema", 0)]
    talk = conversation(
        first,
        ("Please segment the Left_Kidney and spleen.", "Sure, Left_Kidney <SEG>, spleen <SEG>."),
        ("Is it large?", "No."),
        ("Which? (a) mass (b) cyst", "(b) cyst"),
        ("Give probabilistic predictions for the presence of Pleural_Effusion and emphysema.",
         "Pleural_Effusion <disease_confidence>, emphysema <disease_confidence>"),
        ("Give probabilistic predictions for the presence of lung nodule.", "lung nodule <disease_confidence>"),
        masks=[mask["liver"], mask["Left_Kidney"], mask["spleen"]], labels=[*labels, Label("lung nodule", 0)],
    )  # fmt: skip
    alone = conversation(first, id="alone", masks=[mask["liver"]])
    write_jsonl([talk, alone], tmp_path / "rows.jsonl")
    options = RunOptions(max_new_tokens=3)
    found = read_predictions(run_model(str(BUNDLED_MODEL), str(tmp_path / "rows.jsonl"), tmp_path / "out", options))
    assert not found.failed
    made = {record.id: record for record in found.records}
    assert {name: record.task for name, record in made.items()} == {
        "talk": "segmentation", "talk/turn-1": "segmentation", "talk/turn-2": "question", "talk/turn-3": "multiple_choice",
        "talk/turn-4": "diagnosis", "talk/turn-5": "diagnosis", "alone": "segmentation",
    }  # fmt: skip
    assert [one["name"] for one in made["talk/turn-1"].masks] == ["Left_Kidney", "spleen"]
    assert made["talk/turn-2"].reference == "No."
    assert made["talk/turn-3"].options == ["mass", "cyst"]
    assert made["talk/turn-4"].labels == {"Pleural_Effusion": 1, "emphysema": 0}
    assert made["talk/turn-5"].labels == {"lung nodule": 0}
    voxels = {
        (name, one["name"]): np.asarray(nib.load(found.folder / one["prediction"]).dataobj) > 0
        for name in ("talk", "talk/turn-1", "alone")
        for one in made[name].masks
    }
    assert np.array_equal(voxels["talk", "liver"], voxels["alone", "liver"])
    # the name as people write it becomes the model's: asked as written, the kidney's mask is empty
    study = Study.open(phantom_of(scan).volume)
    assert voxels["talk/turn-1", "Left_Kidney"].sum() > 0.5 * study.segment("left kidney").sum() > 0
    assert voxels["talk/turn-1", "spleen"].sum() > 0.5 * study.segment("spleen").sum() > 0


def test_names_that_the_model_may_not_know_stand_in_the_notes_of_the_scores(tmp_path: Path) -> None:
    odd = conversation(("Where is the livr?", "Sure, it is <SEG>."), masks=[MaskRef("livr")])
    write_jsonl([odd], tmp_path / "rows.jsonl")
    found = read_predictions(run_model(str(BUNDLED_MODEL), str(tmp_path / "rows.jsonl"), tmp_path / "out", QUICK))
    scores = score_predictions(found, bootstraps=5).find("segmentation", "mine")
    assert scores is not None
    assert any("did you mean liver" in note for note in scores.notes)


def test_a_set_without_a_test_split_is_evaluated_on_validation(tmp_path: Path) -> None:
    """CT-RATE has train and validation, and its choices are written (a), (b)."""
    ask = ("Which? (a) nodule (b) emphysema", "(b) emphysema")
    samples = [
        conversation(
            ask, id=split, task="multiple_choice", split=split, source="ct_rate", images=[ImageRef("phantom:slice:3")]
        )
        for split in ("train", "validation")
    ]
    write_rows(tmp_path / "data", "instructions", [to_row(sample) for sample in samples])
    write_jsonl(samples, tmp_path / "rows.jsonl")
    for data in (tmp_path / "data", tmp_path / "rows.jsonl"):
        assert split_of_data(str(data), "instructions") == "validation"
        with pytest.raises(CTInstructError, match="no instructions rows of split test: it has train, validation"):
            load_data(str(data), "instructions", "test")
        assert [row["id"] for row in load_data(str(data), "instructions", "train")] == ["train"]
    arguments = ["evaluate", "--data", str(tmp_path / "data"), "--max-new-tokens", "3", "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    found = read_predictions(tmp_path / "out" / "predictions.jsonl")
    assert [(record.id, record.error, record.options) for record in found.records] == [
        ("validation", "", ["nodule", "emphysema"])
    ]
    with pytest.raises(CTInstructError, match="split is 'dev'"):
        load_data(str(tmp_path / "data"), "instructions", "dev")


def test_choices_are_read_from_a_question() -> None:
    assert options_of("Which? (A) one (B) two, (C) three") == ["one", "two", "three"]
    assert options_of("Which? Choices: A. one B. two") == ["one", "two"]
    with pytest.raises(CTInstructError, match="lists no choices"):
        options_of("Which?")
