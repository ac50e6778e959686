"""What a stage-two model says about held-out phantoms, beside the metrics of `ctinstruct evaluate`: which findings its reports
mention, answers by kind of question, how choices are weighed, and whether answers follow the picture (the same scan with a finding
and without).

python scripts/phantom_scores.py --model runs/tiny-reports/model --predictions eval/predictions.jsonl [--pairs 40]
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ctinstruct_hf import Study
from ctinstruct_hf.data.templates import with_article
from ctinstruct_hf.evaluation.predictions import Record, read_predictions
from ctinstruct_hf.evaluation.scoring import findings_scores
from ctinstruct_hf.inference.study import load_model
from ctinstruct_hf.phantoms import FINDINGS, phantom_of

# what names each finding in a phantom's report
WORDS = {
    "lung nodule": "nodule",
    "pleural effusion": "pleural effusion",
    "consolidation": "consolidation",
    "emphysema": "emphysem",
    "cardiomegaly": "cardiomegaly",
    "arterial wall calcification": "calcification",
    "pericardial effusion": "pericardial effusion",
    "atelectasis": "atelectasis",
    "hiatal hernia": "hiatal hernia",
    "medical material": "pacemaker|medical material",
    "lymphadenopathy": "lymph node|lymphadenopathy",
    "kidney stone": "stone|calculus",
    "liver lesion": "liver",
}

# how a question starts -> its kind
KINDS = {"On which side": "side", "How many": "count", "How large": "size"}


def mentioned(report: str) -> list[str]:
    """Findings that a report says are there."""
    sentences = re.split(r"(?<=\.)\s+", report.partition("Findings:")[2].partition("Impression:")[0].strip())
    present = [one for one in sentences if not re.match(r"(There is )?no\b", one, re.I)]
    return [name for name, words in WORDS.items() if any(re.search(words, one, re.I) for one in present)]


def reported(records: Sequence[Record]) -> dict[str, Any]:
    """Findings that reports mention against those that are there: {f1, per_finding …} of `findings_scores`."""
    reports = [record for record in records if record.task == "report"]
    labels = [phantom_of(record.id.split("/")[0]).labels for record in reports]
    return findings_scores([mentioned(record.prediction) for record in reports], labels, FINDINGS)


def by_kind(records: Sequence[Record]) -> dict[str, list[bool]]:
    """Whether each question was answered to the letter: {side | count | size | presence and phase: …}."""
    kinds: dict[str, list[bool]] = {}
    for record in records:
        if record.task == "question":
            asked = (name for words, name in KINDS.items() if record.question.startswith(words))
            kind = next(asked, "presence and phase")
            kinds.setdefault(kind, []).append(record.prediction.strip() == record.reference.strip())
    return kinds


def weighed(records: Sequence[Record]) -> list[list[bool]]:
    """Of each question of choice, whether each of its options was weighed rightly."""
    return [
        [one in record.prediction for one in re.findall(r"[a-z][a-z ]*\? (?:Yes|No)", record.reference)]
        for record in records
        if record.task == "multiple_choice"
    ]


def ask_pairs(model: tuple[Any, Any], count: int, first: int) -> dict[str, list[bool]]:
    """Of pairs of the same scan with a finding and without, whether the question for it is answered Yes and No.

    Args:
        model: of `load_model`.
        count: pairs, of one finding after the other; where one does not fit into its scan, there are fewer.
        first: seed of the first pair.
    """
    changed: dict[str, list[bool]] = {name: [] for name in FINDINGS}
    for number in range(count):
        name = FINDINGS[number % len(FINDINGS)]
        scans = {sign: f"phantom:trunk:{first + number}:{sign}{name}" for sign in "-+"}
        if not phantom_of(scans["+"]).labels[name]:
            continue
        question = f"Is there {with_article(name)}?"
        told = {
            sign: Study(phantom_of(path).volume, *model).ask(question, max_new_tokens=12).lower()
            for sign, path in scans.items()
        }
        changed[name].append(told["-"].startswith("no") and told["+"].startswith("yes"))
    return changed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--predictions", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--first", type=int, default=900_300, help="seed of the first pair")
    options = parser.parse_args()
    records = read_predictions(options.predictions).good
    told = reported(records)
    print(f"findings in {sum(record.task == 'report' for record in records)} reports: F1 {told['f1']:.3f}")
    for name, row in told["per_finding"].items():
        print(f"  {name:30s} precision {row['precision']:.2f} recall {row['recall']:.2f} F1 {row['f1']:.2f}")
    for kind, right in by_kind(records).items():
        print(f"questions, {kind}: exact {np.mean(right):.3f} of {len(right)}")
    lists = weighed(records)
    choices = [right for one in lists for right in one]
    print(
        f"choices weighed rightly: {sum(choices)} of {len(choices)}, whole lists {sum(map(all, lists))} of {len(lists)}"
    )
    changed = ask_pairs(load_model(options.model), options.pairs, options.first)
    kept = [one for values in changed.values() for one in values]
    print(f"counterfactual pairs answered No and Yes: {np.mean(kept):.3f} of {len(kept)}")
    for name, values in changed.items():
        print(f"  {name:30s} {sum(values)}/{len(values)}")


if __name__ == "__main__":
    main()
