"""Rows: checked on reading, the same through JSONL, Parquet and streams; a prepared set is looked through."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from datasets_on_disk import nifti, nnunet, totalsegmentator
from typer.testing import CliRunner

from ctinstruct_hf import CTInstructError, CTInstructImageProcessor
from ctinstruct_hf.cli import app
from ctinstruct_hf.data import templates
from ctinstruct_hf.data.cases import Case, ImageRef, Label, MaskRef, Question
from ctinstruct_hf.data.check import check
from ctinstruct_hf.data.estimate import estimate
from ctinstruct_hf.data.instructions import to_alignment, to_instructions
from ctinstruct_hf.data.prepare import PrepareOptions, prepare
from ctinstruct_hf.data.prepared import describe, export_jsonl, import_jsonl, iterate, load_rows, write_rows
from ctinstruct_hf.data.reading import open_labels, open_volume
from ctinstruct_hf.data.samples import (
    AlignmentSample,
    InstructionSample,
    from_row,
    read_jsonl,
    to_row,
    write_jsonl,
)
from ctinstruct_hf.data.store import PatchStore
from ctinstruct_hf.phantoms.dataset import cases


def sample() -> InstructionSample:
    return InstructionSample(
        id="a/1",
        images=[ImageRef("scan.nii.gz")],
        messages=[
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where is the liver?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "Sure, it is <SEG>."}]},
        ],
        task="segmentation",
        split="train",
        source="mine",
        masks=[MaskRef("liver", "labels.nii.gz", [1])],
    )


def test_a_sample_survives_jsonl_and_parquet(tmp_path: Path) -> None:
    aligned = AlignmentSample("b", ImageRef("x.npz", 2.0, -1.0, [1, 2, 3]), "test", "mine", texts=["Text."], labels=[Label("x", -1), Label("y", 1)])  # fmt: skip
    assert write_jsonl([sample()], tmp_path / "a.jsonl") == 1
    assert list(read_jsonl(tmp_path / "a.jsonl")) == [sample()]
    write_rows(tmp_path, "instructions", [to_row(sample())])
    write_rows(tmp_path, "alignment", [to_row(aligned)])
    for streaming in (False, True):
        rows = [from_row(row, "instructions") for row in load_rows(tmp_path, "instructions", "train", streaming)]
        assert rows == [sample()]
        assert [from_row(row, "alignment") for row in load_rows(tmp_path, "alignment", "test", streaming)] == [aligned]
    assert export_jsonl(tmp_path, tmp_path / "out.jsonl") == 1
    assert import_jsonl(tmp_path / "out.jsonl", tmp_path / "again") == 1
    assert [row["id"] for _, _, _, row in iterate(tmp_path / "again")] == ["a/1"]


@pytest.mark.parametrize(("change", "told"), [
    ({"task": "poetry"}, "task 'poetry'"),
    ({"split": "dev"}, "split 'dev'"),
    ({"masks": []}, "1 <SEG> in its answers and 0 masks"),
    ({"labels": [{"name": "x", "value": 1}]}, "0 <disease_confidence> in its answers and 1 labels"),
    ({"images": []}, "shows 1 images in its messages and lists 0"),
    ({"messages": []}, "turns"),
    ({"extra": 1}, "unknown fields"),
    ({"id": ""}, "empty id"),
    ({"images": [{"path": "x", "layout": "abc"}]}, "layout 'abc'"),
    ({"masks": [{"path": "x"}]}, "malformed"),
])  # fmt: skip
def test_a_bad_line_is_told_with_file_and_line(tmp_path: Path, change: dict, told: str) -> None:
    path = tmp_path / "mine.jsonl"
    good = to_row(sample())
    path.write_text(json.dumps(good) + "\n\n" + json.dumps({**good, **change}) + "\n")
    with pytest.raises(CTInstructError, match=r"mine\.jsonl, line 3: ") as error:
        list(read_jsonl(path))
    assert told in str(error.value)


def test_files_of_imported_rows_lie_in_their_folder_and_become_absolute(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
        (folder / "a.nii.gz").touch()
    (here / "link.nii.gz").symlink_to(there / "a.nii.gz")
    row = to_row(sample())
    rows = here / "mine.jsonl"

    def imported(image: str, mask: str, root: Path | None = None) -> list[str]:
        files = {"images": [{"path": image}], "masks": [{**row["masks"][0], "path": mask}]}
        rows.write_text(json.dumps({**row, **files}))
        import_jsonl(rows, tmp_path / "set", root=root)
        found = next(iter(iterate(tmp_path / "set")))[3]
        return [found["images"][0]["path"], found["masks"][0]["path"]]

    assert imported("a.nii.gz", "") == [str(here / "a.nii.gz"), ""]
    assert imported(str(there / "a.nii.gz"), "here/a.nii.gz", tmp_path) == [
        str(there / "a.nii.gz"),
        str(here / "a.nii.gz"),
    ]
    for bad in ("../there/a.nii.gz", str(there / "a.nii.gz"), "link.nii.gz", str(here / ".." / "there" / "a.nii.gz")):
        for image, mask in ((bad, ""), ("a.nii.gz", bad)):
            with pytest.raises(CTInstructError, match=r"mine.jsonl, sample 1 names .*outside of here.*--root"):
                imported(image, mask)


def test_no_json_is_told_with_its_line_and_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text('{"id": ')
    with pytest.raises(CTInstructError, match="line 1"):
        import_jsonl(tmp_path / "mine.jsonl", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_case_becomes_the_papers_six_kinds() -> None:
    (made,) = cases("cropped:3-4")
    case = replace(made, diseases=[])
    samples = to_instructions(case)
    for one in samples:
        one.check()
        assert from_row(json.loads(json.dumps(to_row(one))), "instructions") == one
    assert {one.task for one in samples} == {
        "report",
        "caption",
        "segmentation",
        "diagnosis",
        "multiple_choice",
        "question",
    }
    assert to_instructions(case) == samples
    assert to_instructions(case, seed=1) != samples
    assert any(mask.path == "" for one in samples for mask in one.masks)  # an absent structure is asked for too
    assert any("no " in answer for one in samples if one.task == "question" for answer in one.answers)
    (diagnosis,) = [one for one in samples if one.task == "diagnosis"]
    assert [label.value for label in diagnosis.labels] == [one.value for one in case.labels]
    (listed,) = [
        one for one in to_instructions(replace(case, diseases=["emphysema", "gout"])) if one.task == "diagnosis"
    ]
    assert listed.labels == [next(one for one in case.labels if one.name == "emphysema"), Label("gout", -1)]


def test_the_papers_examples_are_among_the_phrasings() -> None:
    asked = {question for question, _ in templates.PAPER_EXAMPLES}
    drawn: set[str] = set()
    for seed in range(60):
        rng = np.random.default_rng(seed)
        drawn |= {templates.draw(rng, templates.REPORT), templates.ask_segmentation(["COVID infection"], rng)}
        drawn.add(templates.ask_diagnosis(["calcification", "bronchiectasis"], rng))
    assert asked <= drawn
    assert templates.answer_segmentation(["COVID infection"]) == "Sure, it is <SEG>."
    assert templates.answer_diagnosis(["calcification", "bronchiectasis"]) == templates.PAPER_EXAMPLES[2][1]


def test_turns_of_one_conversation_stay_together() -> None:
    questions = [Question("A?", "a"), Question("B?", "b", follows=True), Question("C?", "c")]
    case = Case("x", [ImageRef("x.nii")], "train", "mine", questions=questions)
    assert [len(one.messages) for one in to_instructions(case)] == [4, 2]
    assert to_alignment(case).grains == []


def test_labels_on_another_grid_are_refused(tmp_path: Path) -> None:
    nifti(tmp_path / "scan.nii.gz")
    volume = open_volume(ImageRef(str(tmp_path / "scan.nii.gz")))
    nib.save(nib.Nifti1Image(np.zeros((12, 8, 4), np.uint8), np.eye(4)), tmp_path / "small.nii.gz")
    with pytest.raises(CTInstructError, match=r"small\.nii\.gz has shape"):
        open_labels(str(tmp_path / "small.nii.gz"), volume)
    with pytest.raises(CTInstructError, match="labels -500"):
        open_labels(str(tmp_path / "scan.nii.gz"), volume)


def test_the_check_finds_what_is_wrong(tmp_path: Path) -> None:
    nifti(tmp_path / "scan.nii.gz")
    (tmp_path / "broken.nii.gz").write_bytes(b"not gzip")
    scan, broken = str(tmp_path / "scan.nii.gz"), str(tmp_path / "broken.nii.gz")
    one = AlignmentSample("1", ImageRef(scan), "train", "mine", "p1", labels=[Label("x", 1)])
    rows = [one, replace(one, id="2", split="test"), replace(one, id="3", image=ImageRef(broken), patient="p2"),
            replace(one, id="4", image=ImageRef("lost.nii"), patient="p3", labels=[Label("x", 0)])]  # fmt: skip
    write_rows(tmp_path / "set", "alignment", [to_row(row) for row in rows])
    describe(tmp_path / "set", {})
    found = check(tmp_path / "set", volumes=True)
    assert found.missing == ["lost.nii"]
    assert list(found.broken) == [broken]
    assert found.leaks == {"p1": ["test", "train"]}
    assert found.labels["alignment", "x"] == {1: 3, 0: 1}
    assert sum(found.counts.values()) == 4
    outcome = CliRunner().invoke(app, ["data", "check", str(tmp_path / "set"), "--volumes"])
    assert outcome.exit_code == 1
    assert "missing files: 1" in outcome.output


def test_the_command_line_prepares_checks_and_exports(tmp_path: Path) -> None:
    totalsegmentator(tmp_path / "raw")
    run = CliRunner().invoke
    done = run(app, ["data", "prepare", "totalsegmentator", "-i", str(tmp_path / "raw"), "-o", str(tmp_path / "set"), "--workers", "1"])  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "alignment: train 1, validation 1" in done.output
    assert "1 cases could not be used" in done.output
    assert run(app, ["data", "check", str(tmp_path / "set"), "--volumes"]).exit_code == 0
    assert (
        "rows in" in run(app, ["data", "export", "-i", str(tmp_path / "set"), "-o", str(tmp_path / "x.jsonl")]).output
    )
    assert "rows in" in run(app, ["data", "import", "-i", str(tmp_path / "x.jsonl"), "-o", str(tmp_path / "y")]).output
    assert "ct_rate" in run(app, ["data", "sources"]).output
    with pytest.raises(CTInstructError, match="finished data set"):
        prepare("totalsegmentator", tmp_path / "raw", tmp_path / "set")


def test_size_and_time_are_estimated_from_a_few_cases_and_nothing_is_written(tmp_path: Path) -> None:
    nnunet(tmp_path / "raw", 12)
    (tmp_path / "raw" / "imagesTr" / "c11_0000.nii.gz").unlink()
    processor = CTInstructImageProcessor(patch_size={"depth": 8, "height": 32, "width": 32})
    found = estimate("nnunet", tmp_path / "raw", PrepareOptions(), 1, image_processor=processor)
    assert (found.cases, found.unusable, found.tried, found.failed) == (11, 1, 5, 0)
    whole = prepare("nnunet", tmp_path / "raw", tmp_path / "set", workers=1)
    assert sum(whole["rows"]["alignment"].values()) == 11
    store = PatchStore(processor, tmp_path / "cache")
    for _, _, _, row in iterate(tmp_path / "set", ["alignment"]):
        sample = from_row(row, "alignment")
        store.image(sample.image)
        store.mask(sample.image, next(mask for mask in sample.masks if mask.path))
    size = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.safetensors"))
    assert found.cache_bytes == pytest.approx(size, rel=0.05)
    assert found.seconds > 0 < found.cache_seconds
    done = CliRunner().invoke(app, ["data", "prepare", "nnunet", "-i", str(tmp_path / "raw"), "-o", str(tmp_path / "no"), "--estimate", "--limit", "1"])  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "1 cases, 1 tried; 1 more have no files or no labels" in done.output
    assert "cache of patches, filled by the first epoch, at the paper's patch size: " in done.output
    assert not (tmp_path / "no").exists()
    for path in (tmp_path / "raw" / "imagesTr").iterdir():
        path.write_bytes(b"broken")
    with pytest.raises(CTInstructError, match="has no usable case of nnunet among 5 that were tried"):
        estimate("nnunet", tmp_path / "raw", PrepareOptions())


PREPARE = """
import sys
from pathlib import Path
from ctinstruct_hf.data import prepare as module
module.CASES_A_PART = 1
module.prepare('nnunet', Path(sys.argv[1]), Path(sys.argv[2]), workers=1)
"""


def test_a_killed_preparation_goes_on_and_ends_with_the_same_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tmp_path / "raw"
    nnunet(raw, 60)
    whole = prepare("nnunet", raw, tmp_path / "whole", workers=1)
    target = tmp_path / "killed"
    script = tmp_path / "script.py"
    script.write_text(PREPARE)
    process = subprocess.Popen([sys.executable, str(script), str(raw), str(target)])
    deadline = time.monotonic() + 60
    while not list(target.glob(".parts-*/[0-9].json")) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = len(list(target.glob(".parts-*/*.json")))
    assert 0 < before < 60
    assert not (target / "dataset.json").exists()
    monkeypatch.setattr("ctinstruct_hf.data.prepare.CASES_A_PART", 1)
    assert prepare("nnunet", raw, target, PrepareOptions(), workers=2) == whole
    assert list(iterate(target)) == list(iterate(tmp_path / "whole"))
    assert not list(target.glob(".parts-*"))
