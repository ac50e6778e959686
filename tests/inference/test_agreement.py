"""Whether report, probability, question and mask say the same about a finding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ctinstruct_hf import CTInstructError
from ctinstruct_hf.inference.agreement import agreement, yes_or_no


@pytest.mark.parametrize(
    ("sources", "consistent", "words"),
    [
        ({"report": "present", "probability": 0.9, "question": "Yes.", "mask": 12}, True, "consistent"),
        ({"report": "absent", "probability": 0.1, "question": "No, none.", "mask": 0}, True, "consistent"),
        (
            {"report": "absent", "probability": 0.91, "question": "Yes.", "mask": 12},
            False,
            "present by probability, question, mask; absent by report",
        ),
        ({"report": "not mentioned", "probability": 0.9}, None, "unchecked"),
        ({"report": "not mentioned", "probability": 0.9, "question": "Two."}, None, "unchecked"),
        ({"probability": 0.3, "mask": np.ones(3, bool)}, False, "present by mask; absent by probability"),
        ({"probability": 0.3, "mask": np.ones(3, bool), "threshold": 0.2}, True, "consistent"),
        ({"report": "present", "question": False}, False, "present by report; absent by question"),
        ({}, None, "unchecked"),
    ],
)
def test_sources_agree_or_are_named(sources: dict[str, Any], consistent: bool | None, words: str) -> None:
    found = agreement(**sources)
    assert found.consistent is consistent
    assert str(found) == words


def test_every_contradicting_pair_is_listed() -> None:
    found = agreement("absent", 0.9, "Yes.", 0)
    assert found.disagree == [
        ("report", "probability"), ("report", "question"), ("probability", "mask"), ("question", "mask"),
    ]  # fmt: skip


@pytest.mark.parametrize(("wrong", "words"), [({"report": "maybe"}, "maybe"), ({"probability": 1.2}, "1.2")])
def test_what_is_no_state_is_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(CTInstructError, match=words):
        agreement(**wrong)


@pytest.mark.parametrize(
    ("answer", "meaning"),
    [("Yes, a nodule is seen.", True), (" NO.", False), ("None", None), ("Two.", None), ("yesterday", None)],
)
def test_only_yes_and_no_answer_a_question(answer: str, meaning: bool | None) -> None:
    assert yes_or_no(answer) is meaning
