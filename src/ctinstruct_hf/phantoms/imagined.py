"""Reports and questions about random findings, without scans.

The `tiny` tokenizer and the `tiny` language model are trained on them before the first scan, in place of pretraining.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..data.cases import Case, ImageRef
from ..data.instructions import to_instructions
from ..data.parts import choices_from_labels, join_turns
from ..data.samples import to_row
from .dataset import words_of
from .structures import FINDINGS, ORGANS
from .wording import PhantomFinding, sides_of, write_questions, write_report

LOBES = ("right upper lobe", "right middle lobe", "right lower lobe", "left upper lobe", "left lower lobe")
PHASES = ("native", "arterial", "portal venous")
WORDS_ALONE = ("report", "caption", "question", "multiple_choice")  # masks and probabilities are no words


def imagine(rng: np.random.Generator) -> tuple[dict[str, int], list[PhantomFinding], str]:
    """Labels by finding, the findings that are present, and the contrast phase."""
    labels = {name: int(rng.random() < 0.4) for name in FINDINGS}
    found = [
        PhantomFinding(
            name,
            ("right", "left")[int(rng.integers(2))],
            int(rng.integers(8, 60)),
            LOBES[int(rng.integers(len(LOBES)))],
            ("small", "large")[int(rng.integers(2))],
        )
        for name, present in labels.items()
        if present
    ]
    return labels, found, PHASES[int(rng.integers(3))]


def imagined_conversation(seed: int, turns: int = 8) -> list[dict[str, Any]]:
    """Messages of up to `turns` questions and answers without an image; half of the conversations are multiple choice."""
    rng = np.random.default_rng([11, seed])
    labels, found, phase = imagine(rng)
    report = write_report(rng, labels, found, phase)
    questions = write_questions(rng, labels, found, ORGANS, phase)
    case = Case(
        id=f"imagined:{seed}",
        images=[ImageRef("imagined")],
        split="train",
        source="imagined",
        **words_of(report, questions, labels | sides_of(found)),
    )
    rows = [to_row(sample) for sample in to_instructions(case)]
    picked = choices_from_labels(rows, 1, turns) if rng.random() < 0.5 else []
    if not picked:  # nor is there a choice where nothing is present
        picked = join_turns([row for row in rows if row["task"] in WORDS_ALONE], turns, seed)
    return [
        {**turn, "content": [part for part in turn["content"] if part["type"] != "image"]}
        for turn in picked[0]["messages"]
    ]


__all__ = ["imagine", "imagined_conversation"]
