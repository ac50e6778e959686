"""A record to be made: which answer of which sample, and what is right."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..data.samples import AnySample, ImageRef, Label, MaskRef
from ..files import whole_folder
from .predictions import Record


@dataclass
class Job:
    """A record to be made.

    Attributes:
        id, task: of the record.
        sample: of the data.
        images: that the answer can see; jobs with the same images are answered together.
        turn: index of the answer in `messages`.
        messages: the whole conversation, with names as the model knows them.
        masks, labels: that are right, named as in the data.
        known: {name in the data: name of the model} where they differ.
        notes: on names that the model may not know.
    """

    id: str
    task: str
    sample: AnySample
    images: list[ImageRef]
    turn: int = 0
    messages: list[dict[str, Any]] = field(default_factory=list)
    masks: list[MaskRef] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    known: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def record(self, **values: Any) -> Record:
        """The record of this job."""
        sample = self.sample
        scan = hashlib.sha256(repr(self.images).encode()).hexdigest()[:16]
        return Record(self.id, self.task, sample.source, sample.split, scan=scan, meta=dict(sample.meta), **values)

    @property
    def asked(self) -> list[str]:
        """The names of masks, or of labels, as the model knows them."""
        return [self.known.get(target.name, target.name) for target in self.masks or self.labels]

    def write_masks(
        self, logits: Sequence[torch.Tensor | None], image_processor: Any, volume: Any, output: Path, suffix: str = ""
    ) -> list[str | None]:
        """Write masks from logits [D, H, W] on the canvas, on the scan's grid; their names relative to `output`."""
        from ..output.nifti import save_mask

        stem = hashlib.sha256(f"{self.task}/{self.id}".encode()).hexdigest()[:16]
        files: list[str | None] = []
        with whole_folder(output / "masks") as draft:
            for number, (name, canvas) in enumerate(zip(self.asked, logits, strict=True)):
                file = f"{stem}-{number}{suffix}.nii.gz"
                files.append(None if canvas is None else f"masks/{file}")
                if canvas is not None:
                    save_mask(volume, image_processor.mask_from_canvas(canvas, volume, name=name), draft / file)
        return files

    def mask_entries(self, files: Sequence[str | None]) -> list[dict[str, Any]]:
        """The record's masks, from the files of the predicted masks."""
        return [
            {"name": mask.name, "prediction": file, "reference": {"path": mask.path, "values": list(mask.values)}}
            for mask, file in zip(self.masks, files, strict=True)
        ]


__all__ = ["Job"]
