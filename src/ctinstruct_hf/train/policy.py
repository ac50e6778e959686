"""A model whose words are taught by rewards (TRL's GRPOTrainer): each scan is read and encoded once, and has a number from then on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import BatchFeature

from ..evaluation.text import label_report
from ..modeling.vision_ctinstruct import CTInstructVisionOutput
from ..processing.image_processing_ctinstruct import flatten_images
from ..processing.processing_ctinstruct import IMAGE_TOKEN, CTInstructProcessor


class NumberedScans:
    """The tokens of a frozen tower by the number of a scan; a batch's `pixel_values` are the numbers [images, 1], which trainers can
    split and shuffle as they like.

    Args:
        model: a `CTInstructForConditionalGeneration` whose tower is frozen; it then takes such batches.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.numbers: dict[str, int] = {}
        self.features: list[CTInstructVisionOutput] = []
        self._encode = model.model.get_image_features
        model.model.vision_tower.requires_grad_(False).eval()
        model.model.get_image_features = self._look_up

    @torch.no_grad()
    def number_of(self, image: Any, processor: CTInstructProcessor) -> int:
        """The number of a scan by its path, which is read where it is new."""
        if image not in self.numbers:
            batch = processor.image_processor([image], return_tensors="pt").to(self.model.device)
            features = self._encode(batch["pixel_values"], batch["patch_grid"], batch["slice_mask"], return_dict=True)
            self.features.append(
                CTInstructVisionOutput(last_hidden_state=features.last_hidden_state, patch_grid=batch["patch_grid"])
            )
            self.numbers[image] = len(self.numbers)
        return self.numbers[image]

    def _look_up(self, pixel_values: torch.Tensor, *args: Any, **kwargs: Any) -> CTInstructVisionOutput:
        found = [self.features[number] for number in pixel_values[:, 0].tolist()]
        return CTInstructVisionOutput(
            last_hidden_state=torch.cat([one.last_hidden_state for one in found]),
            patch_grid=torch.cat([torch.as_tensor(one.patch_grid) for one in found]),
        )


class NumbersScans(CTInstructProcessor):
    """A processor whose `pixel_values` are numbers of `NumberedScans`; made of another one by `number_scans`."""

    scans: NumberedScans

    def _process_images(self, images: Any, **kwargs: Any) -> tuple[BatchFeature, list[str]]:
        numbers = [self.scans.number_of(image, self) for image in flatten_images(images)]
        counts = [len(self.scans.features[number].last_hidden_state) for number in numbers]
        return BatchFeature({"pixel_values": torch.tensor(numbers)[:, None]}), [IMAGE_TOKEN * count for count in counts]


def number_scans(model: Any, processor: CTInstructProcessor) -> NumbersScans:
    """The processor for a model that is taught by rewards; model and processor then know a scan by its number.

    Args:
        model: a `CTInstructForConditionalGeneration`; its tower is frozen.
        processor: of the model.
    """
    template: Any = processor.chat_template
    numbering = NumbersScans(
        processor.image_processor, processor.tokenizer, template, disease_lists=processor.disease_lists
    )
    numbering.scans = NumberedScans(model)
    return numbering


def findings_f1(completions: Sequence[Any], report: Sequence[str], **columns: Any) -> list[float]:
    """A reward for TRL: F1 of the findings that a written report and the data set's (the column `report`) say are there, by
    `label_report`; 1 where neither has any."""
    scores = []
    for written, truth in zip(completions, report, strict=True):
        text = written if isinstance(written, str) else written[-1]["content"]
        found, there = ({name for name, value in label_report(one).items() if value} for one in (text, truth))
        scores.append(2 * len(found & there) / (len(found) + len(there)) if found or there else 1.0)
    return scores


__all__ = ["NumberedScans", "NumbersScans", "findings_f1", "number_scans"]
