"""Whether what a system says about one finding holds together: its report, a probability, a direct question, a mask."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from ..errors import CTInstructError

SOURCES = ("report", "probability", "question", "mask")
REPORT_STATES = {"present": True, "absent": False, "not mentioned": None}
THRESHOLD = 0.5  # of a probability, where none was chosen on validation data


@dataclass(frozen=True)
class Agreement:
    """What each source says about one finding.

    Attributes:
        says: {source: there or not}, in the order of `SOURCES`; without the sources that say nothing.
    """

    says: dict[str, bool]

    @property
    def consistent(self) -> bool | None:
        """Whether all sources say the same; None where fewer than two say something."""
        return None if len(self.says) < 2 else len(set(self.says.values())) == 1

    @property
    def disagree(self) -> list[tuple[str, str]]:
        """Every two sources that contradict each other."""
        return [pair for pair in combinations(self.says, 2) if self.says[pair[0]] != self.says[pair[1]]]

    def __str__(self) -> str:
        """ "consistent", "unchecked" (fewer than two sources), or "present by probability, mask; absent by report"."""
        if self.consistent is None:
            return "unchecked"
        if self.consistent:
            return "consistent"
        sides = {
            word: ", ".join(name for name, value in self.says.items() if value is there)
            for word, there in (("present", True), ("absent", False))
        }
        return "; ".join(f"{word} by {names}" for word, names in sides.items())


def agreement(
    report: str | None = None,
    probability: float | None = None,
    question: str | bool | None = None,
    mask: Any = None,
    threshold: float = THRESHOLD,
) -> Agreement:
    """Compare what is known about one finding, of any system; None where a source is not there.

    Args:
        report: present, absent or not mentioned; the last says nothing.
        probability: of the finding, 0…1; the finding is there from `threshold` on.
        question: the answer to "Is there …?" as text or as yes or no; a text that is neither says nothing.
        mask: of the finding: an array, its number of voxels, or whether it has any.
        threshold: chosen on validation data, see `ctinstruct calibrate`.

    Raises:
        CTInstructError: for another state of the report, or a probability outside 0…1.
    """
    if report is not None and report not in REPORT_STATES:
        raise CTInstructError(f"report is '{report}': use {', '.join(REPORT_STATES)}.")
    if probability is not None and not 0 <= probability <= 1:
        raise CTInstructError(f"probability is {probability}: give a number from 0 to 1.")
    statements = {
        "report": None if report is None else REPORT_STATES[report],
        "probability": None if probability is None else bool(probability >= threshold),
        "question": yes_or_no(question) if isinstance(question, str) else question,
        "mask": None if mask is None else bool(np.any(mask)),
    }
    return Agreement({name: value for name, value in statements.items() if value is not None})


def yes_or_no(answer: str) -> bool | None:
    """What an answer begins with: "Yes, a nodule is seen." is True, "No." is False, anything else None."""
    first = re.match(r"\W*(yes|no)\b", answer, re.I)
    return None if first is None else first[1].lower() == "yes"


__all__ = ["REPORT_STATES", "SOURCES", "THRESHOLD", "Agreement", "agreement", "yes_or_no"]
