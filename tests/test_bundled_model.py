"""What the bundled model reaches on held-out phantoms; its aims, and the table in docs/instruct.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ctinstruct_hf.evaluation.predictions import read_predictions
from ctinstruct_hf.evaluation.run import RunOptions, run_model
from ctinstruct_hf.evaluation.scoring import score_predictions
from ctinstruct_hf.inference.study import BUNDLED_MODEL, load_model
from ctinstruct_hf.phantoms import FINDINGS
from tests.conftest import script
from tests.evaluation.test_text import needs_wordnet


@pytest.fixture(scope="module")
def phantom_scores() -> Any:
    return script("phantom_scores")


def test_answers_follow_the_picture(phantom_scores: Any) -> None:
    """The same scan with a finding and without: the answer to the same question changes."""
    changed = phantom_scores.ask_pairs(load_model(None, "cpu"), 2 * len(FINDINGS), 900_300)
    pairs = [one for values in changed.values() for one in values]
    assert len(pairs) >= 24
    assert np.mean(pairs) >= 0.85, changed


def test_a_report_tells_what_is_there_and_denies_the_rest(phantom_scores: Any) -> None:
    told = phantom_scores.mentioned(
        "Technique: Unenhanced CT. Findings: A 12 mm nodule is seen in the left upper lobe. No pleural effusion or kidney stone is seen. "
        "There is no emphysema. There is a 30 mm hypodense lesion in the liver. Impression: Cardiomegaly."
    )
    assert told == ["lung nodule", "liver lesion"]


@pytest.mark.slow
@needs_wordnet
def test_every_aim_is_reached(phantom_scores: Any, tmp_path: Path) -> None:
    found = read_predictions(
        run_model(str(BUNDLED_MODEL), "phantoms:trunk:900600-900680", tmp_path / "out", RunOptions())
    )
    by_task = {one.task: one for one in score_predictions(found, bootstraps=10).tasks}

    def mean(task: str, metric: str) -> float:
        return float(by_task[task].metrics[metric].mean)

    kinds = {kind: np.mean(right) for kind, right in phantom_scores.by_kind(found.good).items()}
    dice = {name: row["dice"] for name, row in by_task["segmentation"].details["per_structure"].items()}
    reached = {
        "METEOR of reports": (mean("report", "meteor"), 0.6),
        "mentions in reports": (phantom_scores.reported(found.good)["f1"], 0.8),
        "multiple choice": (mean("multiple_choice", "accuracy"), 0.85),
        "short questions": (kinds["presence and phase"], 0.8),
        "side": (kinds["side"], 0.75),
        "count": (kinds["count"], 0.75),
        "AUC": (mean("diagnosis", "auc"), 0.9),
        "Dice of organs": (np.mean([one for name, one in dice.items() if name not in FINDINGS]), 0.9),
        "Dice of findings": (np.mean([one for name, one in dice.items() if name in FINDINGS]), 0.55),
        "absent left empty": (mean("segmentation", "absent_left_empty"), 0.9),
    }
    assert not {name: value for name, (value, aim) in reached.items() if value < aim}, reached
