"""Probabilities of a list of diseases."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .. import templates
from ..cases import Case, Label
from ..task import Request, Task


def requests(case: Case, rng: np.random.Generator, max_structures: int) -> Iterator[Request]:
    if case.labels:
        known = {label.name: label for label in case.labels}
        ordered = [known.get(name, Label(name, -1)) for name in case.diseases] or list(case.labels)
        names = [label.name for label in ordered]
        yield Request(templates.ask_diagnosis(names, rng), templates.answer_diagnosis(names), labels=ordered)


TASK = Task(requests, scored_as="diagnosis", rank=4)
