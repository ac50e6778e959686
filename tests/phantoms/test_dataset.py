"""Phantoms as a data set on disk: made once, the same voxels as in memory, read like any other set."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ctinstruct_hf import CTInstructError, read_volume
from ctinstruct_hf.cli import app
from ctinstruct_hf.data import phantoms as old_name
from ctinstruct_hf.data import prepare as prepare_module
from ctinstruct_hf.data.cases import ImageRef, MaskRef
from ctinstruct_hf.data.parts import check_part, load_part, of_slices
from ctinstruct_hf.data.prepare import open_rows
from ctinstruct_hf.data.reading import open_mask, open_volume
from ctinstruct_hf.data.samples import from_row
from ctinstruct_hf.data.store import PatchStore
from ctinstruct_hf.phantoms import FINDINGS, PhantomRef, dataset, make_phantom, phantom_of
from ctinstruct_hf.processing.image_processing_ctinstruct import CTInstructImageProcessor

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("CTINSTRUCT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_make_phantom_keeps_its_name_from_outside() -> None:
    assert old_name.make_phantom is make_phantom


@pytest.mark.parametrize("name", ["cropped:4-5", "focus:7-8", "slice:1-2:+lung nodule"])
def test_files_hold_the_very_voxels_of_the_phantom(name: str) -> None:
    """HU, organs, unions and overlapping findings, by name; the patches of both are the same."""
    (case,) = dataset.cases(name)
    phantom = phantom_of(case.id)
    volume = open_volume(case.images[0])
    assert np.array_equal(volume.hu, phantom.volume.hu)
    assert volume.spacing == pytest.approx(phantom.volume.spacing, rel=1e-6)
    masks = {mask.name: mask for mask in case.masks}
    assert {name for name in FINDINGS if phantom.labels[name]} == set(masks) & set(FINDINGS)
    for name, mask in masks.items():
        assert np.array_equal(open_mask(mask, volume), phantom.masks[name]), name
    assert np.array_equal(open_mask(MaskRef("body", case.masks[0].path), volume), phantom.masks["body"])
    assert {label.name: label.value for label in case.labels} == phantom.labels | phantom.sides
    store = PatchStore(CTInstructImageProcessor(patch_size={"depth": 32, "height": 128, "width": 128}))
    made, _ = store.image_processor.prepare(phantom.volume)
    assert torch.equal(store.image(case.images[0])["pixel_values"], made.to(torch.float16))


def test_findings_that_overlap_share_a_label_map() -> None:
    phantom = make_phantom(2, (32, 64, 64), findings=dict.fromkeys(FINDINGS, 1))
    labels, values = dataset.label_findings(phantom)
    assert any(len(found) > 1 for found in values.values())
    assert labels.max() < 128
    for name, found in values.items():
        assert np.array_equal(np.isin(labels, found), phantom.masks[name]), name


def test_a_set_is_made_once_and_anew_where_the_code_is_other(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows depend on the code that phrases them, scans on the code that paints them."""
    made: list[str] = []
    real = dataset.make
    monkeypatch.setattr(dataset, "make", lambda ref, folder: made.append(ref) or real(ref, folder))
    rows = list(open_rows("phantoms:slice:0-2", "instructions", "train"))
    assert made == ["phantom:slice:0", "phantom:slice:1"]
    assert list(open_rows("phantoms:slice:0-2", "instructions", "train")) == rows
    assert list(open_rows("phantoms:slice:0-2", "instructions", "test")) == [{**row, "split": "test"} for row in rows]
    assert len(list(open_rows("phantoms:slice:1-3", "alignment", "train"))) == 2
    assert made == [f"phantom:slice:{seed}" for seed in range(3)]  # seed 1 was there
    assert not [path for path in cache.rglob("*") if path.name.endswith(".part")]
    monkeypatch.setattr(prepare_module, "_code", lambda package: "other words")
    found = list(open_rows("phantoms:slice:0-2", "instructions", "train"))
    assert found == rows
    assert made == [f"phantom:slice:{seed}" for seed in range(3)]
    assert len(list((cache / "phantoms" / "sets").iterdir())) == 3
    monkeypatch.setattr(dataset, "_code", lambda: "other paint")
    assert len(list(dataset.cases("slice:0-1"))) == 1
    assert made[3:] == ["phantom:slice:0"]


def test_a_scan_that_a_killed_process_left_unfinished_is_made_again(cache: Path) -> None:
    before = list(dataset.cases("slice:0-2"))
    (lines,) = cache.rglob("cases.jsonl")
    whole = lines.read_bytes()
    lines.write_bytes(whole[:-40])
    assert list(dataset.cases("slice:0-3"))[:2] == before
    for text in lines.read_text().splitlines():
        if text.startswith('{"id": "phantom:slice:2"'):
            json.loads(text)


def test_the_command_prepares_a_set_that_is_sound(cache: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke
    done = run(app, ["data", "prepare", "phantoms", "-i", "slice:0-3", "-o", str(tmp_path / "set")])
    assert done.exit_code == 0, done.output
    assert "alignment: train 3" in done.output
    done = run(app, ["data", "check", str(tmp_path / "set"), "--volumes"])
    assert done.exit_code == 0, done.output
    assert "missing files: none" in done.output
    image = open_rows(tmp_path / "set", "alignment", "train")[0]["image"]["path"]
    assert read_volume(image).shape == (1, 128, 128)
    assert "phantoms" in run(app, ["data", "sources"]).output
    for name, message in (("whale:0-3", "no set of scans"), ("slice:3-3", "last \\+ 1"), ("slice:0-3:-gout", "slice")):
        with pytest.raises(CTInstructError, match=message):
            run(app, ["data", "prepare", "phantoms", "-i", name, "-o", str(tmp_path / "x")], catch_exceptions=False)


def test_a_part_of_a_recipe_names_a_set_or_describes_it() -> None:
    described = {"phantoms": {"kind": "slice", "seeds": [0, 2], "without": ["lung nodule"]}}
    named = {"dataset": "phantoms:slice:0-2:-lung nodule"}
    for part in (described, named):
        check_part(part, "alignment", ())
        assert of_slices(part)
        rows = load_part({**part, "split": "validation"}, "alignment").rows
        assert [row["id"] for row in rows] == ["phantom:slice:0:-lung nodule", "phantom:slice:1:-lung nodule"]
        assert {row["split"] for row in rows} == {"validation"}
        assert all(from_row(row, "alignment") for row in rows)
    assert not of_slices({"phantoms": {"seeds": [0, 2]}})
    for part, message in (
        ({}, "needs either dataset or phantoms"),
        ({**described, **named}, "needs either dataset or phantoms"),
        ({"phantoms": {"seeds": [2, 2]}}, "no set of scans"),
        ({"phantoms": "trunk"}, "needs phantoms"),
        ({"dataset": "phantoms:whale:0-2"}, "no set of scans"),
        ({"dataset": "phantom:trunk:0-2"}, "does not exist"),
    ):
        with pytest.raises(CTInstructError, match=message):
            check_part(part, "alignment", ())


def test_a_phantom_is_named_by_kind_and_seed() -> None:
    without = PhantomRef("cropped", 4, (("lung nodule", 0),))
    assert PhantomRef.parse(str(without)) == without
    assert not without.make().masks["lung nodule"].any()
    with pytest.raises(CTInstructError, match="no made-up scan"):
        PhantomRef.parse("phantom:whale:3")


def test_only_the_registry_knows_phantoms() -> None:
    """Beside their package, the name from outside, recipes, the demo and the bundled model's list of diseases."""
    found = subprocess.run(["git", "grep", "-il", "phantom", "--", "src"], cwd=ROOT, capture_output=True, text=True)
    if found.returncode > 1:
        pytest.skip("no git here")
    package = "src/ctinstruct_hf/"
    rest = [path.removeprefix(package) for path in found.stdout.split()]
    allowed = ("phantoms/", "assets/", "train/recipes/")
    others = {path for path in rest if not path.startswith(allowed)}
    assert others == {"data/phantoms.py", "data/sources/made.py", "cli/demo.py"}


def test_a_path_that_only_looks_like_a_phantom_is_a_file_that_is_missing() -> None:
    with pytest.raises(CTInstructError):
        open_volume(ImageRef("phantom:trunk:3"))
