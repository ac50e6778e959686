"""Questions with lettered choices. They come among a data set's questions, which `question` asks in their order."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .. import templates
from ..cases import Question
from ..task import Task


def phrase_choice(question: Question, truth: Mapping[str, int], rng: np.random.Generator) -> tuple[str, str]:
    """(question with its choices, answer); choices of known findings are weighed one by one."""
    if question.question in templates.WHICH and set(question.choices) <= set(truth):
        there = [truth[choice] == 1 for choice in question.choices]
        answer = templates.weigh_choices(question.choices, there, [question.answer])
    else:
        answer = templates.answer_choice(question.choices, question.answer)
    return templates.ask_choice(question.question, question.choices, rng), answer


TASK = Task(lambda case, rng, max_structures: iter(()), scored_as="multiple_choice", rank=5)
