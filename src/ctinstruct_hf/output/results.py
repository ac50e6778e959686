"""What a scan was asked and what came out, and what goes with it into files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class Results:
    """What a study was asked and what came out, in the order of asking.

    Attributes:
        report, answers, diagnosis: text, (question, answer), {disease: probability}.
        masks: {structure: bool (depth, height, width)} on the volume's grid.
        unknown: names of masks that the model was never taught.
        findings: {finding: a row of `Study.findings`}.
        fitness: whether the scan is like those that the model was calibrated on, see `Study.fitness`; None: not looked at.
        notes: what `save_results` had to say the last time.
        failures: {output type: why} that it could not write then.
    """

    report: str | None = None
    answers: list[tuple[str, str]] = field(default_factory=list)
    diagnosis: dict[str, float] = field(default_factory=dict)
    masks: dict[str, np.ndarray] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    findings: dict[str, dict[str, Any]] = field(default_factory=dict)
    fitness: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Origin:
    """What made the results: a model, and how it saw the scan.

    Attributes:
        model: its name, without the path of this machine.
        fingerprint, commit: of its files; None where it was not read from a folder, or from the Hub.
        facts: {heading: what it saw of the scan}, for the page.
        diseases: that it has a head for, the first ones first.
        scan_warnings, model_warnings: what must be noted of the scan and the names asked for, and of the model.
    """

    model: str
    fingerprint: str | None = None
    commit: str | None = None
    facts: dict[str, str] = field(default_factory=dict)
    diseases: Sequence[str] = ()
    scan_warnings: Sequence[str] = ()
    model_warnings: Sequence[str] = ()


__all__ = ["Origin", "Results"]
