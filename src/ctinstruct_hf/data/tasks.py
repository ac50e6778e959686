"""From a case to samples: one for stage one, several conversations for stage two (section 3.3)."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from . import templates
from .samples import META, TASKS, AlignmentSample, Case, InstructionSample, Label, MaskRef, parts_of


def to_alignment(case: Case) -> AlignmentSample:
    """Whatever of texts, labels and masks the case has; structures that it labels but lacks have an empty mask."""
    texts = [case.texts[name] for name in ("report", "findings", "impression", "caption") if case.texts.get(name)]
    return AlignmentSample(
        id=case.id,
        image=case.images[0],
        split=case.split,
        source=case.source,
        patient=case.patient,
        texts=list(dict.fromkeys(texts)),
        labels=list(case.labels),
        masks=[*case.masks, *(MaskRef(name) for name in absent_structures(case))],
        meta=_known_meta(case),
    )


def _known_meta(case: Case) -> dict[str, str]:
    return {key: value for key, value in case.meta.items() if key in META}


def absent_structures(case: Case) -> list[str]:
    """What the data set labels and this case does not have."""
    there = {mask.name for mask in case.masks}
    return [name for name in case.structures if name not in there]


def to_instructions(
    case: Case,
    seed: int = 0,
    segmentations: int = 4,
    absent: int = 1,
) -> list[InstructionSample]:
    """Conversations about a case: the paper's six kinds, as far as the case has what they need.

    Args:
        case: with texts, labels, masks, questions.
        seed: of the phrasings and choices, with the case's id.
        segmentations: how many requests for masks of structures that are there.
        absent: how many requests for a structure that is known to be absent: its mask is empty.
    """
    rng = np.random.default_rng([seed, zlib.crc32(case.id.encode())])
    samples: list[InstructionSample] = []

    def add(task: str, asked: str, answer: str, masks: Sequence[MaskRef] = (), labels: Sequence[Label] = ()) -> None:
        pictures: list[dict[str, Any]] = [{"type": "image"} for _ in case.images]
        samples.append(
            InstructionSample(
                id=f"{case.id}/{task}-{len(samples)}",
                images=list(case.images),
                messages=[
                    {"role": "user", "content": [*pictures, {"type": "text", "text": asked}]},
                    {"role": "assistant", "content": [{"type": "text", "text": answer}]},
                ],
                task=task,
                split=case.split,
                source=case.source,
                patient=case.patient,
                masks=list(masks),
                labels=list(labels),
                meta=_known_meta(case),
            )
        )

    report = case.texts.get("report") or case.texts.get("findings")
    if report:
        add("report", templates.draw(rng, templates.REPORT), report)
    caption = case.texts.get("caption") or (case.texts.get("impression") if report else None)
    if caption:
        add("caption", templates.draw(rng, templates.CAPTION), caption)
    for mask in _pick(rng, case.masks, segmentations):
        add(
            "segmentation",
            templates.ask_segmentation([mask.name], rng),
            templates.answer_segmentation([mask.name]),
            [mask],
        )
    if len(case.masks) > 2 and segmentations:
        several = _pick(rng, case.masks, int(rng.integers(2, 4)))
        names = [mask.name for mask in several]
        add("segmentation", templates.ask_segmentation(names, rng), templates.answer_segmentation(names), several)
    for name in _pick(rng, absent_structures(case), absent):
        add(
            "segmentation",
            templates.ask_segmentation([name], rng),
            templates.answer_segmentation([name]),
            [MaskRef(name)],
        )
    if case.labels:
        known = {label.name: label for label in case.labels}
        ordered = [known.get(name, Label(name, -1)) for name in case.diseases] or list(case.labels)
        names = [label.name for label in ordered]
        add("diagnosis", templates.ask_diagnosis(names, rng), templates.answer_diagnosis(names), labels=ordered)
        for label in _pick(rng, [label for label in case.labels if label.value >= 0], 2):
            add(
                "question",
                *templates.ask_presence(templates.with_article(label.name), label.name, label.value == 1, rng),
            )
    truth = {label.name: label.value for label in case.labels if label.value >= 0}
    for question in case.questions:
        task = question.kind if question.kind in TASKS else "question"
        asked, answer = question.question, question.answer
        if question.choices:
            if question.question in templates.WHICH and set(question.choices) <= set(truth):
                there = [truth[choice] == 1 for choice in question.choices]
                answer = templates.weigh_choices(question.choices, there, [answer])
            else:
                answer = templates.answer_choice(question.choices, answer)
            asked = templates.ask_choice(asked, question.choices, rng)
        if question.follows and samples:
            samples[-1].messages += [
                {"role": "user", "content": [{"type": "text", "text": asked}]},
                {"role": "assistant", "content": [{"type": "text", "text": answer}]},
            ]
        else:
            add(task, asked, answer)
    return samples


def _pick(rng: np.random.Generator, options: Sequence[Any], count: int) -> list[Any]:
    """Up to `count` of them, in random order."""
    order = rng.permutation(len(options))[:count]
    return [options[int(index)] for index in order]


def with_names(sample: InstructionSample) -> InstructionSample:
    """The sample with answers "Sure, it is <SEG>." naming their structure."""
    plain = templates.answer_segmentation([""])
    names = iter(mask.name for mask in sample.masks)
    messages = []
    for turn in sample.messages:
        parts = []
        for part in parts_of(turn):
            text = part.get("text") or ""
            asked = text.count(templates.SEG_TOKEN) if turn["role"] == "assistant" else 0
            own = [name for _, name in zip(range(asked), names, strict=False)]
            parts.append(
                {**part, "text": templates.answer_segmentation(own, named=True)} if text == plain and own else part
            )
        messages.append({**turn, "content": parts})
    return replace(sample, messages=messages)
