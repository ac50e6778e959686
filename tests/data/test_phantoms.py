"""Phantoms: the same every time, anatomically right, with truth that fits."""

from __future__ import annotations

import numpy as np
import pytest

from ctinstruct_hf import CTInstructError
from ctinstruct_hf.data.phantoms import FINDINGS, ORGANS, UNIONS, make_phantom


@pytest.fixture(scope="module")
def phantom():
    return make_phantom(5, shape=(64, 96, 96))


def centre(mask: np.ndarray) -> np.ndarray:
    return np.array([places.mean() for places in np.nonzero(mask)])


def test_a_seed_gives_the_same_phantom(phantom) -> None:
    again = make_phantom(5, shape=(64, 96, 96))
    assert np.array_equal(again.volume.hu, phantom.volume.hu)
    assert (again.report, again.questions, again.labels) == (phantom.report, phantom.questions, phantom.labels)
    assert not np.array_equal(make_phantom(6, shape=(64, 96, 96)).volume.hu, phantom.volume.hu)


def test_left_is_left_and_the_heart_points_left(phantom) -> None:
    masks = phantom.masks
    assert centre(masks["left lung"])[2] > centre(masks["right lung"])[2]  # width runs toward the left
    assert centre(masks["liver"])[2] < centre(masks["spleen"])[2]
    assert centre(masks["heart"])[2] > centre(masks["spine"])[2]
    assert centre(masks["spine"])[1] > centre(masks["sternum"])[1]  # height runs toward the back
    assert centre(masks["lungs"])[0] > centre(masks["liver"])[0]  # depth runs toward the head
    assert set(masks) == {*ORGANS, *UNIONS, *FINDINGS}
    assert sum(masks[name].any() for name in ORGANS) >= 14


def test_fluid_lies_at_the_back() -> None:
    phantom = make_phantom(3, shape=(64, 96, 96), findings={"pleural effusion": 1})
    fluid, lungs = phantom.masks["pleural effusion"], phantom.masks["lungs"]
    assert centre(fluid)[1] > centre(lungs)[1]
    assert not (fluid & ~lungs).any()


@pytest.mark.parametrize("finding", FINDINGS)
def test_a_finding_can_be_put_in_and_taken_out(finding: str) -> None:
    seed = 11
    others = dict.fromkeys(FINDINGS, 0)
    without = make_phantom(seed, shape=(64, 96, 96), findings=others)
    with_it = make_phantom(seed, shape=(64, 96, 96), findings={**others, finding: 1})
    assert without.labels == others
    assert not without.masks[finding].any()
    assert with_it.labels == {**others, finding: 1}
    assert with_it.masks[finding].any()
    assert "No abnormality" in without.report
    assert finding in with_it.report.lower()
    for organ in ("liver", "spine", "spleen"):
        assert np.array_equal(with_it.masks[organ], without.masks[organ])


def test_slices_and_bad_arguments() -> None:
    assert make_phantom(0, kind="slice").volume.shape == (1, 160, 160)
    with pytest.raises(CTInstructError, match="kind"):
        make_phantom(0, kind="movie")
    with pytest.raises(CTInstructError, match="unknown names"):
        make_phantom(0, findings={"gout": 1})
    with pytest.raises(CTInstructError, match="shape"):
        make_phantom(0, shape=(4, 2, 2))


def test_questions_answer_what_is_there(phantom) -> None:
    presence = {q["about"]: q["answer"] for q in phantom.questions if q["kind"] == "short" and q["about"] in FINDINGS}
    assert presence == {name: "Yes." if there else "No." for name, there in phantom.labels.items()}
    for question in phantom.questions:
        if question["kind"] == "multiple_choice":
            assert question["answer"] in question["choices"]
