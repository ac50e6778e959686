"""A conversation as single answers: each with its own task, masks and labels, and with names as the model knows them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..data.cases import Label, MaskRef
from ..data.choices import chosen_option, options_of
from ..data.instructions import with_names
from ..data.names import Names, spell
from ..data.samples import InstructionSample, parts_of, text_of
from ..data.templates import DISEASE_TOKEN, SEG_TOKEN
from ..errors import CTInstructError


@dataclass
class Turn:
    """One answer of a conversation.

    Attributes:
        index: of the answer in `messages`.
        number: 0 for the first answer.
        task: of `predictions.SCORED_TASKS`.
        messages: the whole conversation, with names as the model knows them.
        masks, labels: of this answer, named as in the data.
        known: {name in the data: name of the model} where they differ.
        notes: on names that the model may not know.
    """

    index: int
    number: int
    task: str
    messages: list[dict[str, Any]]
    masks: list[MaskRef] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    known: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def turns_of(sample: InstructionSample, structures: Names, diseases: Names, names_masks: bool) -> Iterator[Turn]:
    """The answers of a conversation, in order; one with masks and probabilities comes once for each of the two.

    Args:
        structures, diseases: what the model knows, see `data.names`.
        names_masks: whether the model's answers name the structure of each `<SEG>`.
    """
    known, mask_notes = _resolve(structures, (mask.name for mask in sample.masks))
    of_diseases, label_notes = _resolve(diseases, (label.name for label in sample.labels))
    asked = _renamed(sample, {**known, **of_diseases}, structures)
    if names_masks:
        asked = with_names(asked)
    masks, labels = iter(sample.masks), iter(sample.labels)
    answers = [index for index, turn in enumerate(sample.messages) if turn["role"] == "assistant"]
    for number, index in enumerate(answers):
        answer = text_of(sample.messages[index])
        mine = [next(masks) for _ in range(answer.count(SEG_TOKEN))]
        judged = [next(labels) for _ in range(answer.count(DISEASE_TOKEN))]
        if mine:
            yield Turn(index, number, "segmentation", asked.messages, masks=mine, known=known, notes=mask_notes)
        if judged:
            yield Turn(index, number, "diagnosis", asked.messages, labels=judged, known=of_diseases, notes=label_notes)
        if not mine and not judged:
            task = sample.task if number == 0 else _later_task(sample, index)
            yield Turn(index, number, task, asked.messages)


def _later_task(sample: InstructionSample, index: int) -> str:
    """Multiple choice where the question lists choices and the answer names one; else a question."""
    try:
        options = options_of(text_of(sample.messages[index - 1]))
    except CTInstructError:
        return "question"
    named = chosen_option(text_of(sample.messages[index]), options) is not None
    return "multiple_choice" if named else "question"


def _resolve(names: Names, given: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """{name in the data: known name} where they differ, and notes; a union of several structures stays as written."""
    found = [names.find(name) for name in dict.fromkeys(given)]
    known = {
        one.given: one.names[0] for one in found if one.known and len(one.names) == 1 and one.names[0] != one.given
    }
    return known, [one.note for one in found if one.note]


def _renamed(sample: InstructionSample, known: Mapping[str, str], structures: Names) -> InstructionSample:
    """The sample with known names in its texts and masks; phrasings stay, unless a mask's name is written otherwise."""
    masks = [replace(mask, name=known.get(mask.name, mask.name)) for mask in sample.masks]
    wanted = iter(mask.name for mask in masks)
    messages = []
    for index, turn in enumerate(sample.messages):
        parts = [
            {**part, "text": spell(part.get("text") or "", known)} if part["type"] == "text" else part
            for part in parts_of(turn)
        ]
        if turn["role"] == "user" and index + 1 < len(sample.messages):
            count = text_of(sample.messages[index + 1]).count(SEG_TOKEN)
            names = [next(wanted) for _ in range(count)]
            text = text_of({"content": parts})
            if any(name in structures.known and name not in text for name in names):
                parts = [
                    *(part for part in parts if part["type"] != "text"),
                    {"type": "text", "text": structures.question(text)[0]},
                ]
        messages.append({**turn, "content": parts})
    return replace(sample, messages=messages, masks=masks)


__all__ = ["Turn", "turns_of"]
