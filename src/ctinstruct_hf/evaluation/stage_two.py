"""Answers of a model of stage two to every question of a conversation, about the images shown before it.

Text is generated greedily, earlier turns as in the data. Masks and probabilities are read twice: from the special tokens of
the answer as the data writes it ("Sure, it is <SEG>."), whose words hold only the names that were asked for, and from the
answer that the model generates.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..data.names import disease_names, structure_names
from ..data.reading import open_volume
from ..data.samples import ImageRef, InstructionSample, text_of
from ..data.templates import DISEASE_TOKEN, SEG_TOKEN
from ..errors import CTInstructError
from ..inference.encoded import Reply
from ..inference.models import load_model
from ..inference.study import Study
from .choices import options_of
from .emission import as_asked, tokens_of_names
from .jobs import Job
from .predictions import SCORED_TASKS, Record
from .turns import turns_of


class StageTwo:
    """A model of stage two."""

    rows = "instructions"
    tasks = tuple(task for task in SCORED_TASKS if task != "retrieval")

    def __init__(
        self,
        model: str,
        device: str | None,
        dtype: str | None,
        revision: str | None,
        max_new_tokens: int,
        num_beams: int = 1,
        quantize: str | None = None,
    ) -> None:
        self.model, self.processor = load_model(model, device, dtype, revision, quantize)
        self.structures, self.diseases = structure_names(self.model, self.processor), disease_names(self.model)
        self.generation = {"max_new_tokens": max_new_tokens, **({"num_beams": num_beams} if num_beams > 1 else {})}
        self._opened: tuple[list[ImageRef], Study] | None = None

    def jobs_of(self, sample: InstructionSample) -> Iterator[Job]:
        """A job per answer of a conversation."""
        return turns_of(sample, self.structures, self.diseases, self.model.config.names_masks)

    def answer(self, jobs: Sequence[Job], output: Path) -> list[Record]:
        """Records of jobs about the same images, in a single batch."""
        study = self._study(jobs[0].images)
        heads = [job for job in jobs if job.task in ("segmentation", "diagnosis")]
        texts = [job for job in jobs if job not in heads]
        return [*self._heads(study, heads, output), *self._texts(study, texts)]

    def _study(self, images: list[ImageRef]) -> Study:
        """The study of these images; the last study is kept."""
        if not images:
            raise CTInstructError("No image is shown before this answer.")
        if self._opened is None or self._opened[0] != images:
            self._opened = None  # free its memory before the next is opened
            self._opened = images, Study([open_volume(image) for image in images], self.model, self.processor)
        return self._opened[1]

    def _heads(self, study: Study, jobs: Sequence[Job], output: Path) -> list[Record]:
        """Masks or probabilities, from the data's answers and from the model's."""
        questions = [job.messages[: job.turn] for job in jobs]
        right = [text_of(job.messages[job.turn]) for job in jobs]
        answers = study.write(questions, **self.generation) if jobs else []
        # equal answers give equal masks and probabilities: they are read once
        others = [row for row, answer in enumerate(answers) if not self._is(answer, right[row])]
        replies = study.outputs_of_answers(
            [*zip(questions, right, strict=True), *((questions[row], answers[row]) for row in others)]
        )
        free = dict(zip(others, replies[len(jobs) :], strict=True))
        records = []
        for row, (job, given) in enumerate(zip(jobs, replies, strict=False)):
            values = (
                self._probabilities(job, given, free.get(row))
                if job.task == "diagnosis"
                else self._masks(job, given, free.get(row), study, output)
            )
            records.append(job.record(question=_question(job), **values))
        return records

    def _is(self, answer: str, right: str) -> bool:
        """Whether a generated answer is the right one, up to its closing token."""
        return answer.startswith(right) and answer[len(right) :].strip() in (
            "",
            *self.processor.tokenizer.all_special_tokens,
        )

    def _masks(self, job: Job, given: Reply, free: Reply | None, study: Study, output: Path) -> dict[str, Any]:
        write = functools.partial(
            job.write_masks, image_processor=self.processor.image_processor, volume=study.volume, output=output
        )
        files = write(given.masks)
        entries = job.mask_entries(files)
        found: list[int | None] = list(range(len(job.masks)))
        if free is not None:
            found = tokens_of_names(free.text, SEG_TOKEN, job.asked, self.structures.known)
            files = write([None if index is None else free.masks[index] for index in found], suffix="-free")
        for entry, file in zip(entries, files, strict=True):
            entry |= {} if file is None else {"free": file}
        return {"masks": entries, "free": self._free(SEG_TOKEN, found, free or given)}

    def _probabilities(self, job: Job, given: Reply, free: Reply | None) -> dict[str, Any]:
        names = [label.name for label in job.labels]
        if len(given.probabilities) != len(names):
            raise CTInstructError(
                f"The answer has {len(names)} <disease_confidence> tokens: name as many diseases of one of the model's lists "
                f"in the question, or give the number of one of its lists ({', '.join(self.processor.disease_lists)})."
            )
        found: list[int | None] = list(range(len(names)))
        if free is not None:
            found = tokens_of_names(free.text, DISEASE_TOKEN, job.asked, self.diseases.known)
        values = (free or given).probabilities
        emitted = {
            name: values[index]
            for name, index in zip(names, found, strict=True)
            if index is not None and index < len(values)
        }
        return {
            "probabilities": dict(zip(names, given.probabilities, strict=True)),
            "labels": {label.name: label.value for label in job.labels},
            "free": {**self._free(DISEASE_TOKEN, found, free or given), "probabilities": emitted},
        }

    def _free(self, token: str, found: Sequence[int | None], reply: Reply) -> dict[str, Any]:
        answer = self.processor.write_out(reply.text, reply.probabilities)
        return {"answer": answer, "as_asked": as_asked(reply.text, token, found)}

    def _texts(self, study: Study, jobs: Sequence[Job]) -> list[Record]:
        """Generated answers."""
        chosen = [job.task == "multiple_choice" for job in jobs]
        options = [
            options_of(text_of(job.messages[job.turn - 1])) if choice else []
            for job, choice in zip(jobs, chosen, strict=True)
        ]
        answers = study.write([job.messages[: job.turn] for job in jobs], **self.generation) if jobs else []
        return [
            job.record(
                question=_question(job),
                prediction=self.processor.write_out(answer),
                reference=text_of(job.sample.messages[job.turn]),  # type: ignore[union-attr]  # of stage two
                options=listed,
            )
            for job, answer, listed in zip(jobs, answers, options, strict=True)
        ]


def _question(job: Job) -> str:
    """The question, in the words of the data."""
    return text_of(job.sample.messages[job.turn - 1])  # type: ignore[union-attr]  # of stage two


__all__ = ["StageTwo"]
