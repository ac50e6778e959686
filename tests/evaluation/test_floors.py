"""When a mask is left empty: floors from scans whose truth is known, and masks that respect them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ctinstruct_hf import CTInstructError, Study
from ctinstruct_hf.cli import app
from ctinstruct_hf.data.templates import answer_segmentation, ask_segmentation
from ctinstruct_hf.evaluation.floors import LEAST, VOLUMES, Marked, find_floor
from ctinstruct_hf.inference.study import BUNDLED_MODEL, load_model
from ctinstruct_hf.phantoms import phantom_of
from ctinstruct_hf.phantoms.tiny import tiny_processor


def marked(dice: float | None, volume: float, peak: float) -> Marked:
    """As many mL with a logit above 0; the surest 3 mL have `peak`."""
    return Marked(dice, volume, tuple(peak if least <= 3 else -9.0 for least in VOLUMES))


def test_a_floor_is_where_it_serves_best() -> None:
    # always marked, surely only where it is: what tells is the logit
    by_logit = [*(marked(0.6, 50, 4.0 + one) for one in range(8)), *(marked(None, 60, 1.0 - one) for one in range(8))]
    assert find_floor(by_logit) == [pytest.approx(0.3), pytest.approx(2.5)]
    # equally sure everywhere: what tells is how much
    by_volume = [
        *(marked(0.6, 50 + one, 5.0) for one in range(8)),
        *(marked(None, 5 - one / 9, 5.0) for one in range(8)),
    ]
    assert find_floor(by_volume) == [pytest.approx(27.5), 0.0]


def test_no_floor_where_too_few_scans_tell_or_nothing_is_won() -> None:
    good = [marked(0.6, 50, 4.0)] * 9
    assert find_floor([*good, *[marked(None, 50, 1.0)] * (LEAST - 1)]) is None
    assert find_floor([*good, *[marked(None, 0.0, -2.0)] * 9]) is None  # already left empty
    assert find_floor([*good, *[marked(None, 50, 4.0)] * 9]) is None  # nothing tells them apart


def test_names_are_found_before_their_token_or_in_the_question() -> None:
    processor = tiny_processor()
    processor.image_processor.mask_floors = {"effusion": [1, 0], "pleural effusion": [1, 0], "kidney stone": [1, 0]}
    named = processor.structures_named
    asked = ask_segmentation(["pleural effusion"])
    assert named(asked, answer_segmentation(["pleural effusion"])) == ["pleural effusion"]
    assert named(asked, answer_segmentation(["pleural effusion"], named=True)) == ["pleural effusion"]
    many = ["kidney stone", "liver", "effusion"]
    assert named(ask_segmentation(many), answer_segmentation(many)) == ["kidney stone", None, "effusion"]
    assert named("Where is it?", "Sure, it is <SEG>.") == [None]
    assert named("Is there an effusion?", "No.") == []


def test_calibrate_writes_floors_that_masks_respect(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(BUNDLED_MODEL, folder)
    done = CliRunner().invoke(app, ["calibrate", "--model", str(folder), "--data", "phantoms:trunk:700-720"])
    assert done.exit_code == 0, done.output
    floors = json.loads((folder / "processor_config.json").read_text())["image_processor"]["mask_floors"]
    assert f"{len(floors)} structures of 16 scans" in done.output
    assert "emphysema" in floors  # seen well, and marked everywhere before
    load_model.cache_clear()
    network, processor = load_model(str(folder))
    assert processor.image_processor.mask_floors == floors
    for sign, there in (("+", True), ("-", False)):
        study = Study(phantom_of(f"phantom:trunk:901:{sign}emphysema").volume, network, processor)
        assert bool(study.segment("emphysema").any()) == there
        spoken = study.ask(ask_segmentation(["emphysema"]))
        assert [bool(mask.any()) for mask in spoken.masks] == [there]


def test_a_folder_without_a_processor_is_told(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["calibrate", "--model", str(tmp_path), "--data", "phantoms:trunk:700-720"])
    assert done.exit_code != 0
    assert str(tmp_path) in str(done.exception) or str(tmp_path) in done.output


def test_data_without_masks_leave_a_model_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(BUNDLED_MODEL, folder)
    before = (folder / "processor_config.json").read_bytes()
    (tmp_path / "rows.jsonl").write_text("")
    done = CliRunner().invoke(app, ["calibrate", "--model", str(folder), "--data", str(tmp_path / "rows.jsonl")])
    assert "no sample of split train with a mask" in str(done.exception)
    assert (folder / "processor_config.json").read_bytes() == before


def test_names_are_one_for_each_mask() -> None:
    with pytest.raises(CTInstructError, match="0 masks for 1 names"):
        tiny_processor().post_process_segmentation([], [], names=["liver"])
