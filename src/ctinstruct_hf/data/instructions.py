"""From a case to samples: one for stage one, several conversations for stage two (section 3.3)."""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import Any

import numpy as np

from . import templates
from .cases import META, Case, MaskRef
from .samples import AlignmentSample, InstructionSample, parts_of
from .tasks import TASKS


def to_alignment(case: Case, number: int = 0) -> AlignmentSample:
    """One image with whatever of texts, labels and masks the case has; structures that it labels but lacks have an empty mask.

    Args:
        case: its texts are about all of its images, its labels and masks about the first.
        number: of the image.
    """
    texts = [case.texts[name] for name in ("report", "findings", "impression", "caption") if case.texts.get(name)]
    return AlignmentSample(
        id=f"{case.id}/{number}" if number else case.id,
        image=case.images[number],
        split=case.split,
        source=case.source,
        patient=case.patient,
        texts=list(dict.fromkeys(texts)),
        labels=[] if number else list(case.labels),
        masks=[] if number else [*case.masks, *(MaskRef(name) for name in case.absent)],
        meta=_known_meta(case),
    )


def _known_meta(case: Case) -> dict[str, str]:
    return {key: value for key, value in case.meta.items() if key in META}


def to_instructions(case: Case, seed: int = 0, segmentations: int = 4) -> list[InstructionSample]:
    """Conversations about a case: of every task what the case has, in the order of `TASKS`.

    Args:
        case: with texts, labels, masks, questions.
        seed: of the phrasings and choices, with the case's id.
        segmentations: how many requests for masks of structures that are there.
    """
    rng = np.random.default_rng([seed, zlib.crc32(case.id.encode())])
    samples: list[InstructionSample] = []
    for name, task in TASKS.items():
        for request in task.requests(case, rng, segmentations):
            answer = {"role": "assistant", "content": [{"type": "text", "text": request.answer}]}
            if request.follows and samples:
                asked = {"role": "user", "content": [{"type": "text", "text": request.question}]}
                samples[-1].messages += [asked, answer]
                continue
            content: list[dict[str, Any]] = [{"type": "image"} for _ in case.images]
            kind = request.task if request.task in TASKS else name
            samples.append(
                InstructionSample(
                    id=f"{case.id}/{kind}-{len(samples)}",
                    images=list(case.images),
                    messages=[
                        {"role": "user", "content": [*content, {"type": "text", "text": request.question}]},
                        answer,
                    ],
                    task=kind,
                    split=case.split,
                    source=case.source,
                    patient=case.patient,
                    masks=list(request.masks),
                    labels=list(request.labels),
                    meta=_known_meta(case),
                )
            )
    return samples


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
