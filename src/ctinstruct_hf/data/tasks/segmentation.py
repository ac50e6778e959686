"""Masks of structures by name: one at once, several, and one that is known to be absent, whose mask is empty."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .. import templates
from ..cases import Case, MaskRef
from ..task import Request, Task, pick


def requests(case: Case, rng: np.random.Generator, max_structures: int) -> Iterator[Request]:
    def ask(masks: list[MaskRef]) -> Request:
        names = [mask.name for mask in masks]
        return Request(templates.ask_segmentation(names, rng), templates.answer_segmentation(names), masks)

    for mask in pick(rng, case.masks, max_structures):
        yield ask([mask])
    if len(case.masks) > 2 and max_structures:
        yield ask(pick(rng, case.masks, int(rng.integers(2, 4))))
    for name in pick(rng, case.absent, 1):
        yield ask([MaskRef(name)])


TASK = Task(requests, scored_as="segmentation", rank=3)
