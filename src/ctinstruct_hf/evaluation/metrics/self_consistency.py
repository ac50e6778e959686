"""How often what a system says about one finding of one scan contradicts itself: report, probability, mask, direct question."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from ctinstruct_hf.data.labeller import FINDINGS
from ctinstruct_hf.data.names import Names
from ctinstruct_hf.data.statements import ReportReader
from ctinstruct_hf.evaluation.metric import Metric, module_of
from ctinstruct_hf.evaluation.predictions import Record
from ctinstruct_hf.evaluation.scores import Settings, TaskScores
from ctinstruct_hf.evaluation.segmentation import read_prediction
from ctinstruct_hf.inference.agreement import SOURCES, THRESHOLD, agreement

# what a question that asks for nothing but presence has beside the name: "Is there any sign of …?"
_ASKED = re.compile(
    r"\b(?:is|are|was|were|there|any|an?|the|in|on|of|this|that|scan|ct|image|study|patient|signs?|evidence|presence|present|"
    r"visible|seen|see|can|could|be|do|does|did|you|shows?|have|has|detected|identified|observed|noted|exist)\b|[^\w\s-]",
    re.IGNORECASE,
)


def score(scores: TaskScores, records: Sequence[Record], settings: Settings) -> None:
    """Of every finding of a scan that two sources say something about; `report / probability` and so on, of these two."""
    listed = dict.fromkeys(name for record in records for name in record.probabilities)
    found: dict[str, dict[str, float]] = defaultdict(dict)
    per_finding: dict[str, list[float]] = defaultdict(list)
    for scan, name, sources in _sources(records, [*listed] or list(FINDINGS), settings):
        compared = agreement(**sources, threshold=settings.limits.get(name, THRESHOLD))
        if compared.consistent is None:
            continue
        key = f"{scan}: {name}"
        found["contradictory"][key] = float(not compared.consistent)
        per_finding[name].append(found["contradictory"][key])
        for pair in combinations(compared.says, 2):
            found[" / ".join(pair)][key] = float(pair in compared.disagree)
    scores.per_sample |= found
    scores.count = len(found["contradictory"])
    scores.details["per_finding"] = {name: {"contradictory": float(np.mean(row))} for name, row in per_finding.items()}
    if scores.count:
        thresholds = "those of the diagnosis" if settings.limits else THRESHOLD
        scores.notes.append(
            f"samples are findings that two sources speak of; thresholds of probabilities: {thresholds}"
        )


def _sources(
    records: Sequence[Record], names: Sequence[str], settings: Settings
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(scan, finding, {source: what it says}) of everything that records say about these findings."""
    known, reader = Names(names), ReportReader(names)
    found: dict[tuple[str, str], dict[str, Any]] = defaultdict(dict)
    for record in records:
        scan = record.scan or record.id.split("/")[0]
        if record.task == "report":
            for name, statement in reader.read(record.prediction).items():
                found[scan, name].setdefault("report", statement.state)
        elif record.task == "question":
            asked = known.find(" ".join(_ASKED.sub(" ", record.question).split()))
            if asked.known and len(asked.names) == 1:
                found[scan, asked.names[0]].setdefault("question", record.prediction)
        for name, probability in record.probabilities.items():
            found[scan, name].setdefault("probability", probability)
        for mask in record.masks:
            named = known.find(str(mask["name"]))
            if named.known and len(named.names) == 1 and "prediction" in mask:
                found[scan, named.names[0]].setdefault("mask", bool(read_prediction(mask, settings.folder)[0].any()))
    for (scan, name), sources in found.items():
        yield scan, name, sources


def compute(predictions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of findings with what the sources say: "present", "absent" or "" each."""
    states = {"present": True, "absent": False}
    consistent = [
        agreement(
            report=row["report"] or None,
            probability={"present": 1.0, "absent": 0.0}.get(row["probability"]),
            question=states.get(row["question"]),
            mask=states.get(row["mask"]),
        ).consistent
        for row in predictions
    ]
    checked = [one for one in consistent if one is not None]
    return {"contradictory": float(np.mean([not one for one in checked])) if checked else float("nan")}


_PAIRS = tuple(" / ".join(pair) for pair in combinations(SOURCES, 2))
METRIC = Metric(
    {"consistency": (("Contradictory", "contradictory"), *((pair.capitalize(), pair) for pair in _PAIRS))},
    score,
    items=(("Contradictory", "contradictory"),),
    rows=lambda details: details.get("per_finding", {}),
)
MODULE = module_of(
    __doc__,
    lambda datasets: {
        "predictions": {name: datasets.Value("string") for name in ("report", "probability", "question", "mask")}
    },
    compute,
)
