"""Spread, intervals and tests against independent computations."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as scipy_stats
from sklearn.metrics import brier_score_loss, roc_auc_score

from ctinstruct_hf import CTInstructError
from ctinstruct_hf.evaluation.diagnosis import calibration
from ctinstruct_hf.evaluation.significance import (
    age_group,
    bootstrap_auc,
    bootstrap_mean,
    by_group,
    paired_test,
    resample,
    stars,
    thickness_group,
)

RNG = np.random.default_rng(0)


def test_a_bootstrap_interval_is_near_the_normal_one() -> None:
    values = RNG.normal(0.6, 0.2, 400)
    found = bootstrap_mean(np.r_[values, np.nan])
    assert found.count == 400
    assert found.mean == pytest.approx(values.mean())
    assert found.sd == pytest.approx(values.std(ddof=1))
    half = 1.96 * values.std(ddof=1) / 20
    assert found.low == pytest.approx(values.mean() - half, abs=0.004)
    assert found.high == pytest.approx(values.mean() + half, abs=0.004)
    with pytest.raises(CTInstructError, match="no scores"):
        bootstrap_mean([float("nan")])


def test_bootstrapped_areas_are_scikit_learns_on_the_drawn_samples() -> None:
    labels = (RNG.random((120, 3)) < 0.3).astype(int)
    labels[:5, 0] = -1
    labels[:, 2] = 0
    scores = np.round(np.clip(labels * 0.2 + RNG.random((120, 3)) * 0.8, 0, 1), 1)  # many ties
    each, mean = bootstrap_auc(scores, labels, times=200, seed=4)
    known = labels[:, 0] >= 0
    assert each[0].mean == pytest.approx(roc_auc_score(labels[known, 0], scores[known, 0]))
    assert np.isnan(each[2].mean)
    assert mean.mean == pytest.approx((each[0].mean + each[1].mean) / 2)
    drawn = resample(120, 200, seed=4)
    areas = [roc_auc_score(np.repeat(labels[:, 1], row), np.repeat(scores[:, 1], row)) for row in drawn]
    assert each[1].low == pytest.approx(np.percentile(areas, 2.5))
    assert each[1].high == pytest.approx(np.percentile(areas, 97.5))


def test_the_paired_test_is_scipys_permutation() -> None:
    first = RNG.normal(0.5, 0.1, 9)
    second = first + RNG.normal(0.05, 0.05, 9)
    theirs = scipy_stats.permutation_test(
        (first, second), lambda a, b, axis: np.mean(a - b, axis=axis), permutation_type="samples", vectorized=True
    )
    assert paired_test(first, second) == pytest.approx(theirs.pvalue)
    large = RNG.normal(0.5, 0.1, 300)
    assert paired_test(large, large + 0.02 + RNG.normal(0, 0.02, 300)) < 0.001
    assert paired_test(large, large + RNG.normal(0, 0.02, 300)) > 0.01
    assert paired_test(large, large) == 1.0
    with pytest.raises(CTInstructError, match="same samples"):
        paired_test([1, 2], [1])


def test_stars_are_the_papers() -> None:
    assert [stars(p) for p in (0.2, 0.049, 0.0099)] == ["", "*", "**"]


def test_groups_by_metadata() -> None:
    meta = [{"sex": "M", "age": "061Y"}, {"sex": "F", "age": "6M"}, {"sex": "F"}, {"slice_thickness": "0.8"}]
    found = by_group([0.2, 0.4, 0.6, 1.0], meta)
    assert set(found) == {"sex", "age", "slice_thickness"}
    assert found["sex"]["female"].mean == pytest.approx(0.5)
    assert found["sex"]["unknown"].count == 1
    assert found["age"]["60-79"].count == 1
    assert [age_group("45"), age_group("6M"), age_group("?")] == ["40-59", "0-19", "unknown"]
    assert [thickness_group(mm) for mm in ("1.0", "2", "5", "x")] == ["<= 1 mm", "1-2.5 mm", "> 2.5 mm", "unknown"]
    assert by_group([0.5], [{}]) == {}


def test_calibration_by_hand() -> None:
    scores = np.array([[0.05], [0.15], [0.95], [1.0], [0.5]])
    labels = np.array([[0], [1], [1], [1], [-1]])
    found = calibration(scores, labels)
    assert found["ece"] == pytest.approx((0.05 + 0.85 + 2 * 0.025) / 4)
    assert found["brier"] == pytest.approx(brier_score_loss(labels[:4, 0], scores[:4, 0]))
    assert [row["count"] for row in found["bins"]] == [1, 1, 2]
    perfect = RNG.random(20_000)
    assert calibration(perfect, (RNG.random(20_000) < perfect).astype(int))["ece"] < 0.02
