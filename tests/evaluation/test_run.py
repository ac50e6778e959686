"""A model over data: with the bundled model and a small stage-one model, on made-up scans."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from datasets_on_disk import table
from typer.testing import CliRunner
from wordnets import needs_wordnet

from ctinstruct_hf import CTInstructConfig, CTInstructError, CTInstructImageProcessor
from ctinstruct_hf.cli import app
from ctinstruct_hf.data.cases import Case, ImageRef, Label, MaskRef
from ctinstruct_hf.data.prepare import open_rows, prepare
from ctinstruct_hf.data.prepared import write_rows
from ctinstruct_hf.data.reading import open_volume
from ctinstruct_hf.data.samples import (
    InstructionSample,
    from_row,
    read_jsonl,
    to_row,
    write_jsonl,
)
from ctinstruct_hf.data.store import TINY_PATCH
from ctinstruct_hf.data.templates import answer_diagnosis, ask_diagnosis
from ctinstruct_hf.evaluation.predictions import read_predictions
from ctinstruct_hf.evaluation.rows import split_of_data
from ctinstruct_hf.evaluation.run import RunOptions, load_data, options_of, run_model
from ctinstruct_hf.evaluation.scoring import score_predictions
from ctinstruct_hf.inference.study import BUNDLED_MODEL, Study, load_model
from ctinstruct_hf.modeling.configuration_ctinstruct import CT_RATE_DISEASES
from ctinstruct_hf.phantoms import FINDINGS
from ctinstruct_hf.phantoms.dataset import cases

QUICK = RunOptions(limit=2, max_new_tokens=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL of all kinds of instructions about three slices, and one that cannot be read."""
    rows = list(open_rows("phantoms:slice:0-3", "instructions", "test"))
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
    assert {"contradictory", "report / probability"} <= set(by_task["consistency"]["metrics"])
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


@pytest.mark.slow
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
    rows = list(open_rows("phantoms:slice:0-1", "instructions", "test"))
    asked = from_row(next(row for row in rows if row["task"] == "question"), "instructions")
    odd = from_row({**to_row(asked), "id": "odd", "task": "multiple_choice"}, "instructions")
    write_jsonl([odd, asked], tmp_path / "rows.jsonl")
    found = read_predictions(run_model(str(BUNDLED_MODEL), str(tmp_path / "rows.jsonl"), tmp_path / "out", QUICK))
    assert [(one.id, "lists no choices" in one.error) for one in found.records] == [("odd", True), (asked.id, False)]


def trunk(seed: int = 3) -> Case:
    (case,) = cases(f"trunk:{seed}-{seed + 1}")
    return case


def mask_of(case: Case, name: str) -> MaskRef:
    return next(mask for mask in case.masks if mask.name == name)


def conversation(*turns: tuple[str, str], **values: object) -> InstructionSample:
    messages: list[dict[str, object]] = []
    for place, (question, answer) in enumerate(turns):
        shown = [{"type": "image"}] if place == 0 else []
        messages.append({"role": "user", "content": [*shown, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    base: dict[str, object] = {
        "images": trunk().images,
        "id": "talk",
        "task": "segmentation",
        "split": "test",
        "source": "mine",
    }
    return InstructionSample(messages=messages, **{**base, **values})  # type: ignore[arg-type]


def test_each_turn_of_a_conversation_is_scored_as_what_it_is(tmp_path: Path) -> None:
    """Masks, then other masks by a name as people write it, then text, choices and probabilities."""
    mask = {mask.name: mask for mask in trunk().masks}
    mask["Left_Kidney"] = replace(mask["left kidney"], name="Left_Kidney")
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
    study = Study.open(open_volume(trunk().images[0]))
    assert voxels["talk/turn-1", "Left_Kidney"].sum() > 0.5 * study.segment("left kidney").sum() > 0
    assert voxels["talk/turn-1", "spleen"].sum() > 0.5 * study.segment("spleen").sum() > 0


def test_the_tower_and_the_reading_of_the_images_run_once_for_all_questions_about_a_scan(
    data: Path, tmp_path: Path
) -> None:
    """Also where rows of two scans come in turn."""
    network, _ = load_model(str(BUNDLED_MODEL), None, None, None, None)
    runs: list[str] = []
    tower = network.model.vision_tower.register_forward_hook(lambda *_: runs.append("tower"))
    reading = network.model.register_forward_pre_hook(
        lambda _, __, given: runs.append("images") if given.get("vision_features") is not None else None,
        with_kwargs=True,
    )
    rows = [to_row(sample) for sample in read_jsonl(data) if sample.id != "broken" and sample.split == "test"]
    rows.sort(key=lambda row: row["id"].rpartition("-")[2])  # the scans take turns
    write_jsonl([from_row(row, "instructions") for row in rows], tmp_path / "rows.jsonl")  # type: ignore[misc]
    try:
        file = run_model(
            str(BUNDLED_MODEL), str(tmp_path / "rows.jsonl"), tmp_path / "out", RunOptions(max_new_tokens=3)
        )
    finally:
        tower.remove()
        reading.remove()
    found = read_predictions(file)
    assert [record.id for record in found.records] == [row["id"] for row in rows]
    assert not found.failed
    assert sorted(runs) == ["images"] * 3 + ["tower"] * 3


def test_each_turn_is_about_the_image_shown_last_before_it(tmp_path: Path) -> None:
    """Two scans with other grids, each shown before its question; the masks are those of each scan alone."""
    scans = [trunk(5), trunk(3)]
    talk = conversation(
        ("Where is the liver?", "Sure, it is <SEG>."),
        ("And in this one, where is the spleen?", "Sure, it is <SEG>."),
        images=[scan.images[0] for scan in scans],
        masks=[mask_of(scans[0], "liver"), mask_of(scans[1], "spleen")],
    )
    talk.messages[2]["content"].insert(0, {"type": "image"})
    write_jsonl([talk], tmp_path / "rows.jsonl")
    found = read_predictions(run_model(str(BUNDLED_MODEL), str(tmp_path / "rows.jsonl"), tmp_path / "out", QUICK))
    assert not found.failed
    for record, scan, name in zip(found.records, scans, ("liver", "spleen"), strict=True):
        volume = open_volume(scan.images[0])
        mask = np.asarray(nib.load(found.folder / record.masks[0]["prediction"]).dataobj) > 0
        assert mask.shape == volume.to_source(volume.hu).shape
        alone = Study.open(volume).segment(name)
        assert mask.sum() > 0.5 * alone.sum() > 0
    assert set(score_predictions(found, bootstraps=5).tasks[0].per_sample["dice"]) == {"talk", "talk/turn-1"}


def test_a_model_is_also_asked_freely_for_masks_and_probabilities(tmp_path: Path) -> None:
    """The answer in the data is odd; the model's own gives the same mask. A question in the data's own words gets none."""
    liver = {"masks": [mask_of(trunk(), "liver")]}
    two = ["emphysema", "cardiomegaly"]  # which the bundled model was taught only among all others
    write_jsonl(
        [
            conversation(("Where is the liver?", "Sure, it is <SEG>."), id="usual", **liver),
            conversation(("Where is the liver?", "Here you are: <SEG>"), id="odd", **liver),
            conversation(("Is there emphysema?", "Sure, liver <SEG>."), id="no mask", **liver),
            conversation((ask_diagnosis(FINDINGS), answer_diagnosis(FINDINGS)), id="all", task="diagnosis",
                         labels=[Label(name, number % 2) for number, name in enumerate(FINDINGS)]),
            conversation((ask_diagnosis(two), answer_diagnosis(two)), id="two", task="diagnosis",
                         labels=[Label(name, 1) for name in two]),
        ],
        tmp_path / "rows.jsonl",
    )  # fmt: skip
    options = RunOptions(max_new_tokens=150)
    found = read_predictions(run_model(str(BUNDLED_MODEL), str(tmp_path / "rows.jsonl"), tmp_path / "out", options))
    assert not found.failed
    made = {record.id: record for record in found.records}
    right = {name: record.free["as_asked"] for name, record in made.items()}
    assert right == {"usual": True, "odd": True, "no mask": False, "all": True, "two": False}
    assert made["usual"].masks[0]["free"] == made["usual"].masks[0]["prediction"]
    assert "free" not in made["no mask"].masks[0]
    assert made["no mask"].free["answer"].startswith(("Yes", "No"))
    usual, odd = (
        np.asarray(nib.load(found.folder / made[name].masks[0]["free"]).dataobj) > 0 for name in ("usual", "odd")
    )
    assert np.array_equal(usual, odd)
    assert made["all"].free["probabilities"] == pytest.approx(made["all"].probabilities, abs=1e-5)
    assert made["two"].free["probabilities"] == {}
    assert set(made["two"].probabilities) == set(two)
    scores = score_predictions(found, bootstraps=5)
    masks, diagnosis = scores.find("segmentation", "mine"), scores.find("diagnosis", "mine")
    assert masks is not None
    assert diagnosis is not None
    assert masks.metrics["emitted"].mean == pytest.approx(2 / 3)
    assert masks.per_sample["free_dice"]["odd"] == masks.per_sample["dice"]["usual"]
    assert diagnosis.metrics["emitted"].mean == 0.5


def test_before_and_after_are_shown_side_by_side(tmp_path: Path) -> None:
    """Against the folder of an earlier evaluation, and against a model, which is run over the same data."""
    arguments = ["evaluate", "--data", "phantoms:slice:0-1", "--tasks", "diagnosis", "-o"]
    first = CliRunner().invoke(app, [*arguments, str(tmp_path / "first")])
    assert first.exit_code == 0, first.output
    assert "Scored on split test; phantoms:slice:0-1 has validation, test." in first.output
    for number, base in enumerate((tmp_path / "first", BUNDLED_MODEL)):
        out = tmp_path / str(number)
        done = CliRunner().invoke(app, [*arguments, str(out), "--against", str(base)])
        assert done.exit_code == 0, done.output
        rows = [line.split("|")[1:6] for line in done.output.splitlines() if "ctinstruct-tiny |" in line]
        assert [row[0].split(":")[0].strip() for row in rows[:2]] == ["before", "after"]
        assert rows[0][1:] == rows[1][1:]
        assert json.loads((out / "scores.json").read_text())["system"].startswith("after: ")
    file = tmp_path / "first" / "predictions.jsonl"
    with_file = ["evaluate", "--predictions", str(file), "-o", str(tmp_path / "again"), "--against"]
    assert CliRunner().invoke(app, [*with_file, str(tmp_path / "first")]).exit_code == 0
    refused = CliRunner().invoke(app, [*with_file, str(BUNDLED_MODEL)])
    assert "name the folder of an earlier evaluation" in str(refused.exception)
    other = CliRunner().invoke(
        app,
        ["evaluate", "--data", "phantoms:slice:1-2", "--tasks", "diagnosis", "-o", str(tmp_path / "other"),
         "--against", str(tmp_path / "first")],
    )  # fmt: skip
    assert "has different samples" in str(other.exception)


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
            ask, id=split, task="multiple_choice", split=split, source="ct_rate", images=next(cases("slice:3-4")).images
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


@needs_wordnet
def test_the_first_command_of_the_documents_works_on_ct_rate(tmp_path: Path, small_scan: Path) -> None:
    """It has train and validation; its questions fill the CT-VQA columns of table 7."""
    base = tmp_path / "raw"
    name = "valid_1_a_1.nii.gz"
    (base / "valid" / "valid_1" / "valid_1_a").mkdir(parents=True)
    shutil.copy(small_scan, base / "valid" / "valid_1" / "valid_1_a" / name)
    scan = {"RescaleSlope": 1, "RescaleIntercept": 0, "XYSpacing": "[4, 4]", "ZSpacing": 5}
    texts = {"Technique_EN": "", "Findings_EN": "No nodule.", "Impressions_EN": "Normal."}
    labels = {disease.capitalize(): 0 for disease in CT_RATE_DISEASES}
    table(base / "metadata" / "validation_metadata.csv", [{"VolumeName": name, **scan}])
    table(base / "radiology_text_reports" / "validation_reports.csv", [{"VolumeName": name, **texts}])
    table(base / "multi_abnormality_labels" / "valid_predicted_labels.csv", [{"VolumeName": name, **labels}])
    (base / "vqa").mkdir()
    turns = [{"from": "human", "value": "<image>\nIs there a nodule?<short_answer>"}, {"from": "gpt", "value": "No."}]
    (base / "vqa" / "valid_vqa.json").write_text(json.dumps([{"id": "1", "image": name, "conversations": turns}]))
    prepare("ct_rate", base, tmp_path / "ct_rate", workers=1)
    arguments = ["evaluate", "--data", str(tmp_path / "ct_rate"), "-o", str(tmp_path / "out"), "--max-new-tokens", "4"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert f"Scored on split validation; {tmp_path / 'ct_rate'} has validation." in done.output
    seventh = done.output.partition("**Table 7")[2]
    row = next(line for line in seventh.splitlines() if line.startswith("| ctinstruct-tiny"))
    assert all("±" in cell for cell in row.split("|")[2:5])  # ROUGE-1, BLEU-1, METEOR of CT-VQA
    tasks = {record.task for record in read_predictions(tmp_path / "out" / "predictions.jsonl").records}
    assert tasks == {"report", "caption", "question", "diagnosis"}


def test_choices_are_read_from_a_question() -> None:
    assert options_of("Which? (A) one (B) two, (C) three") == ["one", "two", "three"]
    assert options_of("Which? Choices: A. one B. two") == ["one", "two"]
    with pytest.raises(CTInstructError, match="lists no choices"):
        options_of("Which?")
