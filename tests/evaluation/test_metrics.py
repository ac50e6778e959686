"""Metrics against values worked out independently."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import f1_score, precision_score, roc_auc_score

from ctinstruct_hf import CTInstructError
from ctinstruct_hf.evaluation.diagnosis import best_thresholds, multilabel_scores
from ctinstruct_hf.evaluation.retrieval import recall_at_k
from ctinstruct_hf.evaluation.segmentation import released_dice, volume_dice


def test_recall_by_hand() -> None:
    images = np.eye(4)
    texts = images[[0, 1, 3, 2]]  # the last two are swapped
    assert recall_at_k(images, texts, k=(1, 4)) == {"ir@1": 0.5, "ir@4": 1.0, "tr@1": 0.5, "tr@4": 1.0}


def test_recall_of_constant_and_random_features_is_nothing_or_chance() -> None:
    assert recall_at_k(np.ones((20, 3)), np.ones((20, 3)))["ir@5"] == 0.0
    rng = np.random.default_rng(0)
    scores = recall_at_k(rng.normal(size=(2000, 8)), rng.normal(size=(2000, 8)), pool=200)
    assert scores["ir@5"] == pytest.approx(5 / 200, abs=0.012)
    assert scores["tr@10"] == pytest.approx(10 / 200, abs=0.016)


def test_recall_refuses_what_does_not_fit() -> None:
    with pytest.raises(CTInstructError, match="must be equal"):
        recall_at_k(np.ones((3, 2)), np.ones((2, 2)))
    with pytest.raises(CTInstructError, match="finite"):
        recall_at_k(np.full((2, 2), np.nan), np.ones((2, 2)))


def test_diagnosis_against_scikit_learn() -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, (80, 3))
    probabilities = np.clip(labels * 0.3 + rng.random((80, 3)) * 0.7, 0, 1)
    scores = multilabel_scores(probabilities, labels, [0.3, 0.5, 0.6], ["a", "b", "c"])
    for column, (name, limit) in enumerate(zip("abc", (0.3, 0.5, 0.6), strict=True)):
        predicted = probabilities[:, column] >= limit
        row = scores["per_disease"][name]
        assert row["auc"] == pytest.approx(roc_auc_score(labels[:, column], probabilities[:, column]))
        assert row["f1"] == pytest.approx(f1_score(labels[:, column], predicted))
        assert row["precision"] == pytest.approx(precision_score(labels[:, column], predicted))
    assert scores["f1"] == pytest.approx(np.mean([row["f1"] for row in scores["per_disease"].values()]))
    best = best_thresholds(probabilities, labels)
    grid = np.arange(1000) / 1000
    for column in range(3):
        all_f1 = [f1_score(labels[:, column], probabilities[:, column] >= limit) for limit in grid]
        assert f1_score(labels[:, column], probabilities[:, column] >= best[column]) == pytest.approx(max(all_f1))


def test_unknown_labels_are_left_out_and_one_class_has_no_auc() -> None:
    scores = multilabel_scores([[0.9, 0.9], [0.2, 0.8], [0.6, 0.7]], [[1, 1], [0, 1], [-1, 1]], names=["a", "b"])
    assert scores["per_disease"]["a"]["accuracy"] == 1.0
    assert scores["undefined_auc"] == ["b"]
    assert scores["auc"] == 1.0
    assert multilabel_scores([0.9, 0.1], [1, 0], "test_set")["thresholds_from"] == "test_set"


@pytest.mark.parametrize(("probabilities", "labels", "told"), [
    ([[0.1], [np.nan]], [[1], [0]], r"NaN in rows \[1\]"),
    ([[1.2]], [[1]], "between 0 and 1"),
    ([[0.2]], [[2]], "labels must be"),
    ([[0.2]], [[1, 0]], "must be equal"),
])  # fmt: skip
def test_bad_predictions_are_refused(probabilities: list, labels: list, told: str) -> None:
    with pytest.raises(CTInstructError, match=told):
        multilabel_scores(probabilities, labels)


def test_dice_by_hand_and_of_many_labels_at_once() -> None:
    truth = np.zeros((4, 5, 6), np.uint8)
    truth[:2] = 1
    truth[2, :3] = 7
    found = np.roll(truth, 1, axis=2)
    found[0] = 0
    expected = {}
    for name, value in {"liver": 1, "spleen": 7, "absent": 9}.items():
        a, b = found == value, truth == value
        expected[name] = 2 * (a & b).sum() / (a.sum() + b.sum()) if (a.sum() + b.sum()) else float("nan")
    scores = volume_dice(found, truth, {"liver": 1, "spleen": 7, "absent": 9})
    assert scores["liver"] == pytest.approx(expected["liver"])
    assert scores["spleen"] == pytest.approx(expected["spleen"])
    assert np.isnan(scores["absent"])
    assert volume_dice(found == 1, truth == 1) == pytest.approx(expected["liver"])
    assert volume_dice(np.zeros((2, 2, 2)), np.ones((2, 2, 2))) == 0.0
    with pytest.raises(CTInstructError, match="must be equal"):
        volume_dice(np.zeros((2, 2)), np.zeros((3, 2)))


def test_the_releases_dice_praises_an_empty_prediction_of_a_small_organ() -> None:
    truth = np.zeros((64, 64, 32))
    truth[30:34, 30:34, 10:14] = 1
    empty = np.zeros_like(truth)
    assert volume_dice(empty, truth) == 0.0
    assert released_dice(empty, truth) > 0.99
    assert released_dice(truth, truth) == pytest.approx(1.0)
