"""The whole report."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .. import templates
from ..cases import Case
from ..task import Request, Task


def requests(case: Case, rng: np.random.Generator, max_structures: int) -> Iterator[Request]:
    report = case.texts.get("report") or case.texts.get("findings")
    if report:
        yield Request(templates.draw(rng, templates.REPORT), report)


TASK = Task(requests, scored_as="report", rank=1)
