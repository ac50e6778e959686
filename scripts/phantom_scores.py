"""What a stage-two model says about held-out phantoms, beside the metrics of `ctinstruct evaluate`: which findings its reports
mention, answers by kind of question, how choices are weighed, and whether answers follow the picture (the same scan with a finding
and without).

python scripts/phantom_scores.py --model runs/tiny-reports/model --predictions eval/predictions.jsonl [--pairs 40]
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import numpy as np

from ctinstruct_hf import Study
from ctinstruct_hf.data.phantom_text import with_article
from ctinstruct_hf.data.phantoms import FINDINGS
from ctinstruct_hf.data.reading import open_volume, phantom_of
from ctinstruct_hf.data.samples import ImageRef
from ctinstruct_hf.evaluation.predictions import read_predictions
from ctinstruct_hf.evaluation.scoring import findings_scores
from ctinstruct_hf.study import load_model

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


def mentioned(report: str) -> list[str]:
    """Findings that a report says are there."""
    sentences = re.split(r"(?<=\.)\s+", report.partition("Findings:")[2].partition("Impression:")[0].strip())
    present = [one for one in sentences if not re.match(r"(There is )?no\b", one, re.I)]
    return [name for name, words in WORDS.items() if any(re.search(words, one, re.I) for one in present)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--predictions", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--first", type=int, default=900_300, help="seed of the first pair")
    options = parser.parse_args()
    found = read_predictions(options.predictions)
    reports = [record for record in found.good if record.task == "report"]
    labels = [phantom_of(record.id.split("/")[0]).labels for record in reports]
    told = findings_scores([mentioned(record.prediction) for record in reports], labels, FINDINGS)
    print(f"findings in {len(reports)} reports: F1 {told['f1']:.3f}")
    for name, row in told["per_finding"].items():
        print(f"  {name:30s} precision {row['precision']:.2f} recall {row['recall']:.2f} F1 {row['f1']:.2f}")
    kinds: dict[str, list[bool]] = {}
    for record in found.good:
        if record.task == "question":
            asked = record.question
            kind = "side" if "which side" in asked else "count" if asked.startswith("How many") else "size" if asked.startswith("How large") else "presence and phase"  # fmt: skip
            kinds.setdefault(kind, []).append(record.prediction.strip() == record.reference.strip())
    for kind, right in kinds.items():
        print(f"questions, {kind}: exact {np.mean(right):.3f} of {len(right)}")
    weighed = [
        [one in record.prediction for one in re.findall(r"[a-z][a-z ]*\? (?:Yes|No)", record.reference)]
        for record in found.good
        if record.task == "multiple_choice"
    ]
    lists, choices = [all(one) for one in weighed], [right for one in weighed for right in one]
    print(f"choices weighed rightly: {sum(choices)} of {len(choices)}, whole lists {sum(lists)} of {len(lists)}")
    model = load_model(options.model)
    changed: dict[str, list[bool]] = {name: [] for name in FINDINGS}
    for number in range(options.pairs):
        name = FINDINGS[number % len(FINDINGS)]
        seed = options.first + number
        question = f"Is there {with_article(name)}?"
        answers = []
        for sign in "-+":
            path = f"phantom:trunk:{seed}:{sign}{name}"
            if sign == "+" and not phantom_of(path).labels[name]:
                break  # it does not fit into this scan
            answers.append(Study(open_volume(ImageRef(path)), *model).ask(question, max_new_tokens=12))
        if len(answers) == 2:
            changed[name].append(answers[0].lower().startswith("no") and answers[1].lower().startswith("yes"))
    kept = [one for values in changed.values() for one in values]
    print(f"counterfactual pairs answered No and Yes: {np.mean(kept):.3f} of {len(kept)}")
    for name, values in changed.items():
        print(f"  {name:30s} {sum(values)}/{len(values)}")


if __name__ == "__main__":
    main()
