"""Whether a labelled finding is there, and the questions of the data set, choices among them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .. import templates
from ..cases import Case
from ..task import Request, Task, pick
from .multiple_choice import phrase_choice


def requests(case: Case, rng: np.random.Generator, max_structures: int) -> Iterator[Request]:
    truth = {label.name: label.value for label in case.labels if label.value >= 0}
    for name in pick(rng, list(truth), 2):
        yield Request(*templates.ask_presence(templates.with_article(name), name, truth[name] == 1, rng))
    for question in case.questions:
        asked, answer = question.question, question.answer
        if question.choices:
            asked, answer = phrase_choice(question, truth, rng)
        yield Request(asked, answer, follows=question.follows, task=question.kind)


TASK = Task(requests, scored_as="question", rank=6)
