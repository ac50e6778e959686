"""What a task is: the requests that it makes of a case, and how answers to them are scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .cases import Case, Label, MaskRef


@dataclass(frozen=True)
class Request:
    """A question or instruction with its right answer.

    Attributes:
        masks: one per `<SEG>` of the answer.
        labels: one per `<disease_confidence>` of the answer.
        follows: whether it goes on with the conversation before it.
        task: where it is another than the one that makes the request.
    """

    question: str
    answer: str
    masks: Sequence[MaskRef] = ()
    labels: Sequence[Label] = ()
    follows: bool = False
    task: str = ""


@dataclass(frozen=True)
class Task:
    """One kind of instruction. A file of `tasks/` holds one as `TASK`; the file's name is the task's.

    Attributes:
        requests: (case, generator of the phrasings, how many structures to ask for) -> requests, as far as the case has what
            they need.
        scored_as: the task of `evaluation.predictions` whose metrics score the answers: `report`, `question` … for text,
            `multiple_choice`, `segmentation`, `diagnosis`.
        rank: tasks of a lower rank come first.
    """

    requests: Callable[[Case, np.random.Generator, int], Iterator[Request]]
    scored_as: str
    rank: int


def pick(rng: np.random.Generator, options: Sequence[Any], count: int) -> list[Any]:
    """Up to `count` of them, in random order."""
    order = rng.permutation(len(options))[:count]
    return [options[int(index)] for index in order]
