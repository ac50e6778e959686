"""The report of a phantom, and questions about it with answers: words from findings, by seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.templates import WHICH, draw, join_names, with_article
from .structures import SIDED

_NUMBERS = ("None", "One", "Two", "Three", "Four", "Five", "Six")


@dataclass(frozen=True)
class PhantomFinding:
    """A present finding.

    Attributes:
        name: of `FINDINGS`.
        side: right, left, both or "" where it has none.
        size: mm, 0 where it has none.
        region: a lobe or another region, "" where it has none.
        extent: small or large, "" where it has none.
    """

    name: str
    side: str = ""
    size: int = 0
    region: str = ""
    extent: str = ""


def sides_of(findings: Sequence[PhantomFinding]) -> dict[str, int]:
    """{"<finding> on the right": 0 or 1, …} for both sides of every one of `SIDED`."""
    present = {(finding.name, finding.side) for finding in findings}
    return {f"{name} on the {side}": int((name, side) in present) for name in SIDED for side in ("right", "left")}


# sentences about a present finding: {size}, {region}, {side}, {extent} are filled in
_PRESENT: dict[str, tuple[str, ...]] = {
    "lung nodule": (
        "A {size} mm nodule is seen in the {region}.",
        "There is a lung nodule of {size} mm in the {region}.",
    ),
    "pleural effusion": (
        "A {extent} pleural effusion is seen on the {side} side.",
        "There is a {extent} {side} pleural effusion.",
    ),
    "consolidation": (
        "Consolidation with air bronchograms is seen in the {region}.",
        "There is consolidation in the {region}.",
    ),
    "emphysema": (
        "Emphysema is seen in the upper lobes.",
        "There are emphysematous changes in the upper lobes of both lungs.",
    ),
    "cardiomegaly": ("The heart is enlarged, consistent with cardiomegaly.", "There is cardiomegaly."),
    "arterial wall calcification": (
        "Calcifications are seen in the wall of the aorta.",
        "There is arterial wall calcification of the aorta.",
    ),
    "pericardial effusion": (
        "A pericardial effusion of {size} mm is seen.",
        "There is a pericardial effusion up to {size} mm.",
    ),
    "atelectasis": ("Linear atelectasis is seen in the {region}.", "There is band-like atelectasis in the {region}."),
    "hiatal hernia": ("A hiatal hernia is seen.", "There is a sliding hiatal hernia of {size} mm."),
    "medical material": (
        "A cardiac pacemaker is seen in the {side} chest wall.",
        "There is medical material: a pacemaker on the {side} side.",
    ),
    "lymphadenopathy": (
        "Enlarged mediastinal lymph nodes up to {size} mm are seen.",
        "There is mediastinal lymphadenopathy with nodes up to {size} mm.",
    ),
    "kidney stone": (
        "A {size} mm stone is seen in the {side} kidney.",
        "There is a {size} mm calculus in the {side} kidney.",
    ),
    "liver lesion": (
        "A hypodense liver lesion of {size} mm is seen.",
        "There is a {size} mm hypodense lesion in the liver.",
    ),
}
_ABSENT = ("No {names} is seen.", "There is no {names}.", "No {names} is observed.")
_PHASE = {
    "native": "Unenhanced CT of the chest and upper abdomen.",
    "arterial": "Contrast-enhanced CT of the chest and upper abdomen in the arterial phase.",
    "portal venous": "Contrast-enhanced CT of the chest and upper abdomen in the portal venous phase.",
}


def write_report(
    rng: np.random.Generator, labels: dict[str, int], findings: Sequence[PhantomFinding], phase: str
) -> str:
    """Technique, findings (present ones each in a sentence, absent ones together) and impression."""
    sentences = [draw(rng, _PRESENT[finding.name]).format(**finding.__dict__) for finding in findings]
    absent = [name for name, present in labels.items() if not present]
    for group in (absent[:4], absent[4:8], absent[8:]):
        if group:
            sentences.append(draw(rng, _ABSENT).format(names=join_names(group, "or")))
    present = [name for name, there in labels.items() if there]
    impression = f"{join_names(present).capitalize()}." if present else "No abnormality."
    return f"Technique: {_PHASE[phase]} Findings: {' '.join(sentences)} Impression: {impression}"


def write_questions(
    rng: np.random.Generator,
    labels: dict[str, int],
    findings: Sequence[PhantomFinding],
    structures: Sequence[str],
    phase: str,
) -> list[dict[str, Any]]:
    """Questions with their answers: presence of every finding, sides, counts, sizes, the phase, multiple choice."""
    questions: list[dict[str, Any]] = []

    def add(question_type: str, question: str, answer: str, about: str, choices: Sequence[str] = ()) -> None:
        questions.append(
            {"kind": question_type, "question": question, "answer": answer, "about": about, "choices": list(choices)}
        )

    for name, there in labels.items():
        asked = draw(rng, ("Is there {name}?", "Is {name} present?", "Does this scan show {name}?")).format(
            name=with_article(name)
        )
        add("short", asked, "Yes." if there else "No.", name)
    for name in SIDED:
        sides = sorted({finding.side for finding in findings if finding.name == name})
        if labels[name] and sides:
            answer = "Both sides." if len(sides) > 1 else f"{sides[0].capitalize()}."
            add("side", f"On which side is the {name}?", answer, name)
    count = sum(finding.name == "lung nodule" for finding in findings)
    add("count", "How many lung nodules are there?", f"{_NUMBERS[count]}.", "lung nodule")
    effusions = sum(finding.name == "pleural effusion" for finding in findings)
    add("count", "How many sides have a pleural effusion?", f"{_NUMBERS[effusions]}.", "pleural effusion")
    for name in ("lung nodule", "liver lesion", "kidney stone"):
        sizes = [finding.size for finding in findings if finding.name == name]
        if sizes:
            add("size", f"How large is the largest {name}?", f"{max(sizes)} mm.", name)
    add("short", "Which contrast phase is this?", f"{phase.capitalize()}.", "phase")
    present = [name for name, there in labels.items() if there]
    absent = [name for name, there in labels.items() if not there]
    for question, of_these, others in ((WHICH[0], present, absent), (WHICH[1], absent, present)):
        if of_these and len(others) >= 3:
            right = draw(rng, of_these)
            wrong = list(rng.permutation(others)[:3])
            choices = [str(name) for name in rng.permutation([right, *wrong])]
            add("multiple_choice", question, right, right, choices)
    return questions
