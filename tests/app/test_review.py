"""Corrections of a reader, over HTTP."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from running import Running
from scans import as_nifti, asymmetric

from ctinstruct_hf.app.review import as_markdown, split_report


@pytest.fixture(scope="module")
def server(untrained: Path) -> Iterator[Running]:
    running = Running(str(untrained))
    yield running
    running.close()


def test_a_report_is_split_into_sections_and_sentences() -> None:
    text = "Technique: Native CT. Findings: A nodule of 5.2 mm is seen.\nNo effusion.\n\nImpression: Nodule *7*."
    found = split_report(text)
    assert [(sentence["section"], sentence["original"]) for sentence in found] == [
        ("Technique", "Native CT."),
        ("Findings", "A nodule of 5.2 mm is seen."),
        ("Findings", "No effusion."),
        ("Impression", "Nodule *7*."),
    ]
    assert split_report("") == []
    assert as_markdown(found).endswith("## Impression\n\nNodule \\*7\\*.")  # text, not emphasis


@pytest.mark.parametrize("sheared", [False, True])
def test_an_edited_mask_comes_back_on_the_grid_of_the_scan(server: Running, tmp_path: Path, sheared: bool) -> None:
    image = as_nifti(asymmetric((12, 20, 24)), "RAS" if sheared else "PIL", (2.0, 2.0, 2.0))
    if sheared:  # a third of a voxel a slice along the rows
        affine = image.affine.copy()
        affine[:3, 2] += 0.3 * affine[:3, 0]
        image = nib.Nifti1Image(np.asarray(image.dataobj), affine)
    nib.save(image, tmp_path / "scan.nii")
    study = server.open(tmp_path / "scan.nii")
    one = server.engine.studies[study]
    assert (one.study.volume.source.resampling is not None) == sheared
    one.study.results.masks["liver"] = np.zeros(one.study.volume.shape, bool)
    one.keep_mask("liver", one.study.results.masks["liver"])
    wanted = np.zeros(image.shape, np.uint8)
    wanted[5:9, 6:14, 3:8] = 1
    path = f"/api/studies/{study}/masks/liver/edited"
    body = zlib.compress(wanted.tobytes(order="F"))
    kept = server.client.put(path, content=body).json()
    assert (kept["name"], kept["known"]) == ("liver (edited)", True)
    found = server.client.get(f"/api/studies/{study}/results").json()["masks"]
    assert found["liver (edited)"]["edited_from"] == "liver"
    assert found["liver"]["voxels"] == 0  # the model's stays as it is
    (tmp_path / "mask.nii.gz").write_bytes(server.client.get(f"/api/studies/{study}/masks/{kept['file']}").content)
    taken = nib.load(tmp_path / "mask.nii.gz")
    assert np.allclose(taken.affine, image.affine)
    assert np.array_equal(np.asarray(taken.dataobj), wanted)
    again = server.client.put(f"/api/studies/{study}/masks/liver%20(edited)/edited", content=body).json()
    assert again["name"] == "liver (edited)"  # corrected twice, it is one mask
    for wrong in (b"x", zlib.compress(b"x"), zlib.compress(bytes(wanted.size + 1))):
        answer = server.client.put(path, content=wrong)
        assert answer.status_code == 400
        assert "mask" in answer.json()["error"]
    assert server.client.put(f"/api/studies/{study}/masks/spleen/edited", content=body).status_code == 404


def test_corrections_that_do_not_fit_are_refused(server: Running, small_scan: Path) -> None:
    study = server.open(small_scan)
    results = server.engine.studies[study].study.results
    address = f"/api/studies/{study}/review"
    assert server.client.get(f"{address}/report.txt").status_code == 400  # there is none yet
    assert server.client.get(f"{address}/corrections.zip").status_code == 400
    results.report = "Findings: Clear."
    for body in (
        {"sentences": []},
        {"sentences": [{"text": "x", "state": "wrong"}]},
        {"sentences": [{"state": "open"}]},
        {"labels": {"no such finding": True}},
        {"labels": []},
        {"text": "x"},
    ):
        answer = server.client.put(address, json=body)
        assert answer.status_code == 400, body
    disease = server.engine.model.config.disease_names[0]
    body = {"sentences": [{"text": "Not clear.", "state": "changed"}], "labels": {disease: True}}
    assert server.client.put(address, json=body).json()["labels"] == {disease: True}
    assert server.client.put(address, json={"labels": {disease: None}}).json()["labels"] == {}
    saved = json.loads(server.client.get(f"{address}/report.json").content)
    assert (saved["original"], saved["corrected"]) == ("Findings: Clear.", "Findings: Not clear.")
    results.report = "Findings: Another one."  # written again: the corrections belonged to the earlier report
    assert server.client.get(f"{address}/report.txt").text.endswith("Findings: Another one.\n")
