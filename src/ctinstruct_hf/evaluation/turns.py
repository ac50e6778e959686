"""A conversation as jobs: each answer with its task, masks and labels, and with names as the model knows them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from ..data.choices import chosen_option, options_of
from ..data.instructions import with_names
from ..data.names import Names, spell
from ..data.samples import InstructionSample, parts_of, text_of
from ..data.templates import DISEASE_TOKEN, SEG_TOKEN
from ..errors import CTInstructError
from .jobs import Job


def turns_of(sample: InstructionSample, structures: Names, diseases: Names, names_masks: bool) -> Iterator[Job]:
    """The answers of a conversation, in order, about the images shown before each. An answer with masks and probabilities
    gives a job for each of the two.

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
        shown = sum(part["type"] == "image" for turn in sample.messages[:index] for part in parts_of(turn))
        name = f"{sample.id}/turn-{number}" if number else sample.id
        common = (sample, sample.images[:shown], index, asked.messages)
        if mine:
            yield Job(name, "segmentation", *common, masks=mine, known=known, notes=mask_notes)
        if judged:
            yield Job(name, "diagnosis", *common, labels=judged, known=of_diseases, notes=label_notes)
        if not mine and not judged:
            yield Job(name, _later_task(sample, index) if number else sample.task, *common)


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
        hit.given: hit.names[0] for hit in found if hit.known and len(hit.names) == 1 and hit.names[0] != hit.given
    }
    return known, [hit.note for hit in found if hit.note]


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


__all__ = ["turns_of"]
