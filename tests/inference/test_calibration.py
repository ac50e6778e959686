"""Probabilities, thresholds and the usual scans of a model, as `ctinstruct calibrate` stores them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ctinstruct_hf import CTInstructError
from ctinstruct_hf.evaluation.calibrating import fit_diseases, pooled_ece
from ctinstruct_hf.evaluation.diagnosis import calibration as error_of
from ctinstruct_hf.inference.calibration import (
    CALIBRATION,
    Calibration,
    DiseaseCalibration,
    read_calibration,
    write_calibration,
)
from ctinstruct_hf.inference.fitness import PROPERTIES, UNKNOWN, UNLIKE, USUAL, fit_features, judge

RNG = np.random.default_rng(0)


def scans(count: int, shift: float = 0.0) -> tuple[list[np.ndarray], list[dict[str, float]]]:
    """Pooled features that lie in a few directions, and properties."""
    axes = np.random.default_rng(1).normal(size=(3, 32))
    rows = [RNG.normal(size=3) @ axes + RNG.normal(scale=0.1, size=32) + shift for _ in range(count)]
    return rows, [{name: float(RNG.uniform(1, 2)) for name in PROPERTIES} for _ in range(count)]


def sigmoid(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-values))


def test_overconfident_probabilities_get_temperature_and_bias_and_sound_ones_stay() -> None:
    logits = RNG.normal(0.3, 2, 600)
    labels = (RNG.random(600) < sigmoid(logits)).astype(int)
    scores = np.stack([sigmoid(3 * logits + 2), sigmoid(logits), sigmoid(logits)], axis=1)
    rare = np.where(np.arange(600) < 3, 1, 0)
    fitted = fit_diseases(["loud", "sound", "rare"], scores, np.stack([labels, labels, rare], axis=1))
    assert set(fitted) == {"loud", "sound"}
    assert (fitted["sound"].temperature, fitted["sound"].bias) == (1.0, 0.0)
    loud = fitted["loud"]
    assert loud.temperature == pytest.approx(3, rel=0.25)
    assert loud.bias == pytest.approx(-2 / 3, abs=0.3)
    assert loud.ece_after is not None
    assert loud.ece_before is not None
    assert loud.ece_after < loud.ece_before - 0.02
    found = Calibration(fitted)
    after = np.array([found.probability("loud", float(one)) for one in scores[:, 0]])
    assert error_of(after[:, None], labels[:, None])["ece"] < error_of(scores[:, :1], labels[:, None])["ece"] / 2
    before, mean_after = pooled_ece(fitted) or (0, 0)
    assert mean_after < before


def test_unknown_labels_are_left_out_and_the_threshold_separates() -> None:
    scores = np.array([0.1, 0.12, 0.15, 0.2, 0.22, 0.3, 0.31, 0.33, 0.35, 0.4, 0.99])[:, None]
    labels = np.array([0] * 5 + [1] * 5 + [-1])[:, None]
    found = fit_diseases(["cyst"], scores, labels)["cyst"]
    assert found.scans == 10
    values = [Calibration({"cyst": found}).probability("cyst", float(one)) for one in scores[:10, 0]]
    assert [one >= found.threshold for one in values] == [False] * 5 + [True] * 5


def test_a_calibration_is_the_same_after_writing_and_reading(tmp_path: Path) -> None:
    written = Calibration({"cyst": DiseaseCalibration(0.3, 1.5, -0.2, 0.1, 0.05, 40)}, fit_features(*scans(30)))
    write_calibration(tmp_path, written)
    assert read_calibration(tmp_path) == written
    assert (tmp_path / CALIBRATION).stat().st_size < 2**20


def test_a_folder_without_a_calibration_leaves_probabilities_and_fitness_alone(tmp_path: Path) -> None:
    found = read_calibration(tmp_path)
    assert found == Calibration()
    assert found.probability("cyst", 0.123456789) == 0.123456789
    assert found.of("cyst").threshold == 0.5
    assert judge(found.features, np.zeros(3), {}).state == UNKNOWN


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        '{"diseases": {"cyst": {"hold": 1}}}',
        '{"diseases": {"cyst": {"temperature": 0}}}',
        '{"features": {}}',
        "{",
    ],
)
def test_a_damaged_calibration_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / CALIBRATION).write_text(text)
    with pytest.raises(CTInstructError, match=CALIBRATION):
        read_calibration(tmp_path)


def test_scans_like_the_others_pass_and_others_are_told_with_what_is_unusual() -> None:
    model = fit_features(*scans(200))
    usual = [judge(model, *one) for one in zip(*scans(100), strict=True)]
    assert np.mean([one.state == USUAL for one in usual]) >= 0.95
    assert np.mean([one.percentile for one in usual]) == pytest.approx(50, abs=12)
    rows, found = scans(20, shift=3.0)
    strange = {**found[0], "slice distance": 40.0, "share of lung": 0.0}
    verdict = judge(model, rows[0], strange)
    assert (verdict.state, verdict.fits, verdict.percentile) == (UNLIKE, False, 100.0)
    assert verdict.warning is not None
    assert "slices far apart (slice distance 40 mm" in verdict.warning
    assert "no lung" in verdict.warning
    assert all(judge(model, row, one).state == UNLIKE for row, one in zip(rows, found, strict=True))
    assert json.dumps(verdict.to_json())
