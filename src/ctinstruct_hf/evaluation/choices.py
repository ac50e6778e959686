"""Accuracy of multiple choice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..data.choices import chosen_option, options_of
from ..errors import CTInstructError


def choice_accuracy(answers: Sequence[str], right: Sequence[str], options: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Accuracy of multiple choice, in 0…1.

    Args:
        answers: of a system, in any of the usual forms.
        right: the right answers, likewise.
        options: the choices of each question.

    Returns:
        {"accuracy", "unreadable": indices of answers that name no option (they count as wrong), "correct": [bool]}.

    Raises:
        CTInstructError: for lists of different length, or a right answer that is not among its options.
    """
    if not len(answers) == len(right) == len(options):
        raise CTInstructError(f"There are {len(answers)} answers, {len(right)} right ones and {len(options)} options.")
    correct, unreadable = [], []
    for index, (answer, truth, choices) in enumerate(zip(answers, right, options, strict=True)):
        wanted, given = chosen_option(truth, choices), chosen_option(answer, choices)
        if wanted is None:
            raise CTInstructError(f"right answer {index}, '{truth}', is not among its options.")
        if given is None:
            unreadable.append(index)
        correct.append(given == wanted)
    accuracy = float(np.mean(correct)) if correct else float("nan")
    return {"accuracy": accuracy, "unreadable": unreadable, "correct": correct}


__all__ = ["choice_accuracy", "chosen_option", "options_of"]
