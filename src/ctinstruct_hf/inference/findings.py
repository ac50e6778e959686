"""Everything that a model says about each finding, side by side: probability, report, a direct question, mask, and whether
they agree."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..data.statements import ReportReader, Statement
from ..data.templates import PRESENCE, with_article
from ..errors import CTInstructError
from ..output.measure import WALLS, measure_finding
from ..processing.any_resolution import logits_inside
from .agreement import agreement
from .calibration import calibration_of

_TOGETHER = 16  # questions in a batch, and masks in a pass of the decoder
# organs among which the one that a finding lies in is looked for, of those that the model can mark
HOSTS = ("left lung", "right lung", "trachea", "heart", "aorta", "esophagus", "liver", "spleen", "stomach", "left kidney",
         "right kidney", "pancreas", "urinary bladder", *WALLS)  # fmt: skip
_NUMBERS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NEW_TOKENS = 24
_SIZE_MM, _SIZE_SHARE = 5.0, 0.3  # by which a size in words may differ from the mask's


@dataclass(frozen=True)
class Evidence:
    """What a model says about one finding besides its report.

    Attributes:
        name: as the model knows it.
        probability, threshold: of its disease head, and from where on it counts as there; None where it has no head for it.
        question, answer: asked directly.
    """

    name: str
    probability: float | None
    threshold: float
    question: str
    answer: str


def findings_asked(study: Any, names: str | Sequence[str] | None) -> list[str]:
    """The names given, or every finding of the model's lists.

    Raises:
        CTInstructError: for a model without lists, no name, or one that the model neither has a head for nor can mark.
    """
    if names is None:
        names = list(dict.fromkeys(study.model.config.disease_names))
        if not names:
            raise CTInstructError("The model has no lists of findings: give names.")
    names = [names] if isinstance(names, str) else list(dict.fromkeys(names))
    if not names:
        raise CTInstructError("names is empty: give the name of a finding at least.")
    for name in names:
        if not (has_head(study, name) or study.structures.find(name).known):
            nearest = study.diseases.find(name).nearest
            hint = f": did you mean {' or '.join(nearest)}?" if nearest else "."
            raise CTInstructError(f"The model knows no finding '{name}'{hint}")
    return names


def has_head(study: Any, name: str) -> bool:
    """Whether a disease head answers for a finding."""
    return study.model.config.disease_head == "shared" or study.diseases.find(name).known


def collect_evidence(study: Any, names: Sequence[str]) -> dict[str, Evidence]:
    """Probabilities and direct answers of findings; what was asked before about the same study is kept."""
    missing = [name for name in names if name not in study.evidence]
    heads = [name for name in missing if has_head(study, name)]
    probabilities = study.diagnose(heads) if heads else {}
    questions = []
    for name in missing:
        found = study.diseases.find(name) if name in heads else study.structures.find(name)
        questions.append((name, found.names[0], PRESENCE[0].format(article=with_article(found.names[0]))))
    calibration = calibration_of(study.model)
    for start in range(0, len(questions), _TOGETHER):
        asked = questions[start : start + _TOGETHER]
        answers = study.write_plainly([question for _, _, question in asked], _NEW_TOKENS, {})
        for (name, known, question), answer in zip(asked, answers, strict=True):
            threshold = calibration.of(known).threshold
            study.evidence[name] = Evidence(known, probabilities.get(name), threshold, question, answer)
    return {name: study.evidence[name] for name in names}


@torch.inference_mode()
def find_findings(study: Any, names: str | Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """The table of findings; see `Study.findings`."""
    asked = findings_asked(study, names)
    report = study.report() if study.results.report is None else study.results.report
    evidence = collect_evidence(study, asked)
    statements = ReportReader(asked, study.names).read(report)
    masks = finding_masks(study, asked)
    rows = {}
    for name in asked:
        found, statement, mask = evidence[name], statements[name], masks.get(name)
        voxels = None if mask is None else mask["voxels"]
        verdict = agreement(statement.state, found.probability, found.answer, voxels, found.threshold)
        rows[name] = {
            "probability": None if found.probability is None else round(found.probability, 4),
            "threshold": found.threshold,
            "report": statement.state,
            "sentences": sentences_of(report, statement),
            "question": found.question,
            "answer": found.answer,
            "mask": mask,
            "says": verdict.says,
            "agreement": str(verdict),
            "disagree": [list(pair) for pair in verdict.disagree],
            "remarks": remarks(study, name, [report[start:stop] for start, stop in statement.spans], mask),
        }
    study.results.findings = {**study.results.findings, **rows}
    return rows


def sentences_of(report: str, statement: Statement) -> list[dict[str, Any]]:
    """The sentences of a statement with their characters in the report."""
    return [{"start": start, "end": stop, "text": report[start:stop]} for start, stop in statement.spans]


def remarks(study: Any, name: str, sentences: Sequence[str], mask: dict[str, Any] | None) -> list[str]:
    """Where words and mask differ about a finding that has both: its size, its side, and how many there are."""
    if mask is None or not mask["voxels"] or not sentences:
        return []
    found = []
    sizes = [float(mm) for sentence in sentences for mm in re.findall(r"(\d+(?:\.\d+)?)\s*mm\b", sentence)]
    size = mask["diameter_mm"]
    if sizes and abs(max(sizes) - size) > max(_SIZE_MM, _SIZE_SHARE * size):
        found.append(f"the report says {max(sizes):g} mm, the mask measures {size:.0f} mm")
    sides = {side.lower() for sentence in sentences for side in re.findall(r"\b(left|right)\b", sentence, re.I)}
    if len(sides) == 1 and mask["side"] not in ("both", *sides):
        found.append(f"the report says {sides.pop()}, the mask is on the {mask['side']}")
    count = len(mask["components"])
    for question, answer in study.results.answers:
        asked = re.match(r"how many (.+?) are there", question.strip(), re.I)
        number = answer.strip(" .").lower()
        same = asked and study.structures.find(asked[1]).names == study.structures.find(name).names
        if same and number in _NUMBERS and _NUMBERS.index(number) != count:
            found.append(f"asked how many, the model says {number}, the mask has {count}")
    return found


@torch.inference_mode()
def finding_masks(study: Any, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What the mask of each finding measures, of those that the model can mark; masks that are not empty go to the results."""
    found = {name: study.structures.find(name) for name in names}
    wanted = {name: one.names for name, one in found.items() if one.known}
    if not wanted:
        return {}
    findings = list(dict.fromkeys(known for several in wanted.values() for known in several))
    hosts = [organ for organ in HOSTS if study.structures.find(organ).known]
    image_processor, volume = study.processor.image_processor, study.volume
    fit = image_processor.fit_of(volume)
    painted: dict[str, np.ndarray] = {}
    surety: dict[str, float] = {}
    organs: dict[str, np.ndarray] = {}  # on the canvas
    listed = list(dict.fromkeys([*findings, *hosts]))
    for start in range(0, len(listed), 2 * _TOGETHER):
        part = listed[start : start + 2 * _TOGETHER]
        logits = study.mask_logits(part, together=True)
        cropped = logits_inside(logits, fit)
        inside = cropped > 0
        for number, name in enumerate(part):
            if name in findings:
                painted[name] = image_processor.mask_from_canvas(logits[number], volume, name=name)
                if painted[name].any():
                    surety[name] = float(cropped[number][inside[number]].float().sigmoid().mean())
            if name in hosts:
                organs[name] = inside[number].cpu().numpy()

    def to_organs(labels: np.ndarray) -> np.ndarray:
        return logits_inside(image_processor.labels_to_canvas(labels, volume), fit).numpy()

    rows = {}
    for name, several in wanted.items():
        mask = np.logical_or.reduce([painted[known] for known in several])
        there = [surety[known] for known in several if known in surety]
        rows[name] = measure_finding(volume, mask, organs, to_organs)
        rows[name]["mean_probability"] = round(float(np.mean(there)), 4) if there else None
        if there:
            study.results.masks[name] = mask
    return rows


__all__ = [
    "Evidence",
    "collect_evidence",
    "find_findings",
    "finding_masks",
    "findings_asked",
    "has_head",
    "sentences_of",
]
