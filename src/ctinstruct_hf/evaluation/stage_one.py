"""Answers of a model of stage one: retrieval, categories and masks by name, from alignment rows."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device

from ..data.descriptions import tokenize
from ..data.reading import open_volume
from ..data.samples import AlignmentSample
from ..data.store import PatchStore
from ..inference.models import load_stage_one
from .alignment import questions_of
from .jobs import Job
from .predictions import Record


class StageOne:
    """A model of stage one, in float32."""

    rows = "alignment"
    tasks = ("retrieval", "diagnosis", "segmentation")

    def __init__(self, folder: Path, device: str | None) -> None:
        self.model: Any
        self.model, self.processor, tokenizer = load_stage_one(folder, device)
        self.store = PatchStore(self.processor, None)
        tokenizer.padding_side = "right"  # as it was trained: encoders count positions from the left
        self.words = functools.partial(tokenize, tokenizer)

    def jobs_of(self, sample: AlignmentSample) -> Iterator[Job]:
        """A job for each task that the sample can be scored by."""
        if sample.texts:
            yield Job(sample.id, "retrieval", sample, [sample.image])
        if any(label.value >= 0 for label in sample.labels):
            yield Job(sample.id, "diagnosis", sample, [sample.image])
        if sample.masks:
            yield Job(sample.id, "segmentation", sample, [sample.image], masks=sample.masks)

    def answer(self, jobs: Sequence[Job], output: Path) -> list[Record]:
        """Records of jobs about the same image, in a single pass for each sample."""
        by_sample: dict[str, list[Job]] = {}
        for job in jobs:
            by_sample.setdefault(job.id, []).append(job)
        return [record for group in by_sample.values() for record in self._answer(group, output)]

    @torch.inference_mode()
    def _answer(self, jobs: Sequence[Job], output: Path) -> list[Record]:
        sample: Any = jobs[0].sample
        tasks = [job.task for job in jobs]
        batch = questions_of(
            self.store.image(sample.image),
            self.words,
            sample.texts[:1] if "retrieval" in tasks else [],
            sample.labels if "diagnosis" in tasks else [],
            sample.masks if "segmentation" in tasks else [],
        )
        outputs = self.model(**send_to_device(batch, self.model.device))
        records = []
        for job in jobs:
            values: dict[str, Any]
            if job.task == "retrieval":
                values = {
                    name: [round(value, 6) for value in getattr(outputs, name)[0].float().tolist()]
                    for name in ("image_features", "text_features")
                }
            elif job.task == "diagnosis":
                scores = outputs.category_logits[0].float().sigmoid().tolist()
                values = {
                    "probabilities": {label.name: score for label, score in zip(sample.labels, scores, strict=True)},
                    "labels": {label.name: label.value for label in sample.labels},
                }
            else:
                volume = open_volume(sample.image)
                files = job.write_masks(outputs.mask_logits, self.processor, volume, output)
                values = {"masks": job.mask_entries(files)}
            records.append(job.record(**values))
        return records


__all__ = ["StageOne"]
