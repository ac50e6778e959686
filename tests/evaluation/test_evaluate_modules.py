"""Our metrics through the `evaluate` library, from their folders, without a network."""

from __future__ import annotations

import numpy as np
import pytest

from ctinstruct_hf import CTInstructError
from ctinstruct_hf.evaluation.metrics import METRICS, metric_path

evaluate = pytest.importorskip("evaluate", reason="the `eval` extra is not installed")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def load(name: str):  # type: ignore[no-untyped-def]
    return evaluate.load(metric_path(name))


def test_texts() -> None:
    told = load("report_text").compute(predictions=["a small nodule"], references=["a small nodule"], metrics=["bleu1", "rouge1"])  # fmt: skip
    assert told == {"bleu1": 1.0, "rouge1": 1.0}


def test_clinical_efficacy() -> None:
    told = load("clinical_efficacy").compute(
        predictions=["There is emphysema.", "No effusion."], references=["Emphysema.", "Pleural effusion."]
    )
    assert told["per_finding"]["emphysema"]["f1"] == 1.0
    assert told["per_finding"]["pleural effusion"]["recall"] == 0.0


def test_choices() -> None:
    told = load("choice_accuracy").compute(predictions=["B", "(A) x"], references=["y", "y"], options=[["x", "y"], ["x", "y"]])  # fmt: skip
    assert told["accuracy"] == 0.5


def test_diagnosis() -> None:
    told = load("multilabel_diagnosis").compute(predictions=[[0.9], [0.2], [0.8]], references=[[1], [0], [1]])
    assert told["auc"] == 1.0
    assert told["f1"] == 1.0


def test_dice() -> None:
    mask = np.zeros((2, 3, 4), np.int8)
    mask[0, 0, :2] = 1
    half = mask.copy()
    half[0, 0, 1] = 0
    told = load("volume_dice").compute(predictions=[half.tolist(), (mask * 0).tolist()], references=[mask.tolist(), (mask * 0).tolist()])  # fmt: skip
    assert told["dice"] == pytest.approx(2 / 3)
    assert told["both_empty"] == 1


def test_retrieval() -> None:
    told = load("image_text_retrieval").compute(predictions=np.eye(6).tolist(), references=np.eye(6).tolist(), k=[1])
    assert told == {"ir@1": 1.0, "tr@1": 1.0}


def test_emission() -> None:
    assert load("emission_rate").compute(predictions=[True, True, False, False]) == {"emitted": 0.5}


def test_every_module_is_named() -> None:
    assert len(METRICS) >= 6
    for name in METRICS:
        assert metric_path(name).endswith(f"{name}.py")
    with pytest.raises(CTInstructError, match="is not known"):
        metric_path("bertscore")
