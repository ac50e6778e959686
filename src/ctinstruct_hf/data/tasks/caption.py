"""A sentence about the image: its caption, or the impression of its report."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .. import templates
from ..cases import Case
from ..task import Request, Task


def requests(case: Case, rng: np.random.Generator, max_structures: int) -> Iterator[Request]:
    report = case.texts.get("report") or case.texts.get("findings")
    caption = case.texts.get("caption") or (case.texts.get("impression") if report else None)
    if caption:
        yield Request(templates.draw(rng, templates.CAPTION), caption)


TASK = Task(requests, scored_as="caption", rank=2)
