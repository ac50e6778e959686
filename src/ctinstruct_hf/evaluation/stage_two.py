"""A model that speaks, asked every question of a conversation about the images shown up to it.

Text is generated greedily, earlier turns as in the data. Masks and probabilities are read from the special tokens of the
answer as the data writes it ("Sure, it is <SEG>."): its words hold nothing but the names that were asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..data.names import disease_names, structure_names
from ..data.reading import open_volume
from ..data.samples import ImageRef, InstructionSample, parts_of, text_of
from ..errors import CTInstructError
from ..inference.models import load_model
from ..inference.study import Study
from .choices import options_of
from .jobs import Job
from .predictions import TASKS, Record
from .turns import turns_of


class StageTwo:
    """A model of stage two."""

    rows = "instructions"
    tasks = tuple(task for task in TASKS if task != "retrieval")

    def __init__(
        self, model: str, device: str | None, dtype: str | None, revision: str | None, max_new_tokens: int
    ) -> None:
        self.model, self.processor = load_model(model, device, dtype, revision)
        self.structures, self.diseases = structure_names(self.model, self.processor), disease_names(self.model)
        self.max_new_tokens = max_new_tokens
        self._opened: tuple[list[ImageRef], Study] | None = None

    def jobs_of(self, sample: InstructionSample) -> Iterator[Job]:
        """One per answer of a conversation."""
        for turn in turns_of(sample, self.structures, self.diseases, self.model.config.names_masks):
            shown = sum(
                part["type"] == "image" for message in sample.messages[: turn.index] for part in parts_of(message)
            )
            yield Job(
                sample.id if not turn.number else f"{sample.id}/turn-{turn.number}",
                turn.task,
                sample,
                sample.images[:shown],
                turn.index,
                turn.messages,
                turn.masks,
                turn.labels,
                turn.known,
                turn.notes,
            )

    def answer(self, jobs: Sequence[Job], output: Path) -> list[Record]:
        """Records of jobs about the same images: all in one batch."""
        study = self._study(jobs[0].images)
        heads = [job for job in jobs if job.task in ("segmentation", "diagnosis")]
        texts = [job for job in jobs if job not in heads]
        return [*self._heads(study, heads, output), *self._texts(study, texts)]

    def _study(self, images: list[ImageRef]) -> Study:
        """The study of these images; the last one is kept."""
        if not images:
            raise CTInstructError("No image is shown before this answer.")
        if self._opened is None or self._opened[0] != images:
            self._opened = None  # its memory is free before the next one takes its own
            self._opened = images, Study([open_volume(image) for image in images], self.model, self.processor)
        return self._opened[1]

    def _heads(self, study: Study, jobs: Sequence[Job], output: Path) -> list[Record]:
        """Masks or probabilities from the answers as the data writes them."""
        given = study.read([(job.messages[: job.turn], text_of(job.messages[job.turn])) for job in jobs])
        records = []
        for job, reply in zip(jobs, given, strict=True):
            values: dict[str, Any]
            if job.task == "diagnosis":
                if len(reply.probabilities) != len(job.labels):
                    raise CTInstructError(
                        f"The answer has {len(job.labels)} <disease_confidence> tokens: name as many diseases of one of the "
                        f"model's lists in the question, or give a list's number ({', '.join(self.processor.disease_lists)})."
                    )
                values = {
                    "probabilities": {
                        label.name: value for label, value in zip(job.labels, reply.probabilities, strict=True)
                    },
                    "labels": {label.name: label.value for label in job.labels},
                }
            else:
                image_processor = self.processor.image_processor
                values = {"masks": job.write_masks(reply.masks, image_processor, study.volume, output)}
            records.append(job.record(question=_question(job), **values))
        return records

    def _texts(self, study: Study, jobs: Sequence[Job]) -> list[Record]:
        """Generated answers."""
        chosen = [job.task == "multiple_choice" for job in jobs]
        options = [
            options_of(text_of(job.messages[job.turn - 1])) if choice else []
            for job, choice in zip(jobs, chosen, strict=True)
        ]
        replies = study.reply([job.messages[: job.turn] for job in jobs], self.max_new_tokens) if jobs else []
        return [
            job.record(
                question=_question(job),
                prediction=self.processor.write_out(reply.text),
                reference=text_of(job.sample.messages[job.turn]),  # type: ignore[union-attr]  # of stage two
                options=listed,
            )
            for job, reply, listed in zip(jobs, replies, options, strict=True)
        ]


def _question(job: Job) -> str:
    """What was asked, in the words of the data."""
    return text_of(job.sample.messages[job.turn - 1])  # type: ignore[union-attr]  # of stage two


__all__ = ["StageTwo"]
