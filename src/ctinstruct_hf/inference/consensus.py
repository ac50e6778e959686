"""Several drafts of a report, of which the one is kept that agrees best with the model's other answers."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..data.statements import ReportReader, Statement
from ..data.templates import REPORT
from ..errors import CTInstructError
from .agreement import agreement
from .findings import Evidence, collect_evidence, findings_asked

MOST = 64
DRAFTS = 8  # of the demo and the page
TEMPERATURE = 0.8
_SEED = 0  # of the drafts, so that a scan has one report


def draft_reports(study: Any, count: int, max_new_tokens: int, generation: dict[str, Any]) -> list[str]:
    """The greedy report and `count - 1` that are sampled in one batch over the same reading of the images."""
    (first,) = study.write_plainly([REPORT[0]], max_new_tokens, generation)
    sampling = {"do_sample": True, "temperature": TEMPERATURE, "top_k": 0, **generation, "num_beams": 1}
    devices = [study.model.device] if study.model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(_SEED)
        others = study.write_plainly([REPORT[0]] * (count - 1), max_new_tokens, sampling) if count > 1 else []
    return [first, *others]


@torch.inference_mode()
def agreed_report(study: Any, count: int, max_new_tokens: int, generation: dict[str, Any]) -> str:
    """The draft whose findings agree best with the probabilities and the direct questions; see `Study.report`.

    Raises:
        CTInstructError: for a number of drafts that is not from 1 to 64.
    """
    if not isinstance(count, int) or not 1 <= count <= MOST:
        raise CTInstructError(f"consensus is {count!r}: give a number of drafts from 1 to {MOST}.")
    drafts = list(dict.fromkeys(draft_reports(study, count, max_new_tokens, generation)))
    if len(drafts) == 1:
        return drafts[0]
    names = findings_asked(study, None)
    evidence, reader = collect_evidence(study, names), ReportReader(names, study.names)
    return min(drafts, key=lambda draft: disagreement(reader.read(draft), evidence))  # the first of equals


def disagreement(statements: dict[str, Statement], evidence: dict[str, Evidence]) -> tuple[int, int, float]:
    """How many probabilities a report contradicts, how many direct answers, and how unlikely it is by the probabilities.

    What a report does not mention counts as absent.
    """
    by_probability, by_answer, unlikely = 0, 0, 0.0
    for name, statement in statements.items():
        found = evidence[name]
        there = statement.state == "present"
        state = "present" if there else "absent"
        verdict = agreement(state, found.probability, found.answer, threshold=found.threshold)
        by_probability += ("report", "probability") in verdict.disagree
        by_answer += ("report", "question") in verdict.disagree
        if found.probability is not None:
            unlikely -= math.log(max(found.probability if there else 1 - found.probability, 1e-6))
    return by_probability, by_answer, unlikely


__all__ = ["DRAFTS", "agreed_report", "disagreement", "draft_reports"]
