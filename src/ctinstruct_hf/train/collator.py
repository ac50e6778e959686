"""From rows to batches: voxels are read here, in the loader's workers, and labels are put on the canvas."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..data.descriptions import describe_category
from ..data.mixture import Item, generator_of
from ..data.samples import AlignmentSample, MaskRef, from_row
from ..data.store import PatchStore, Prepared
from ..errors import CTInstructError

logger = logging.getLogger(__name__)


class SkippedSamples:
    """Counts samples that could not be read, over all workers of a process.

    Args:
        limit: more than this many end the training.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._count = multiprocessing.Value("l", 0)

    @property
    def count(self) -> int:
        return int(self._count.value)

    def add(self, name: str, error: Exception) -> None:
        """Raises CTInstructError when there are too many."""
        with self._count.get_lock():
            self._count.value += 1
        logger.warning("Sample '%s' is skipped: %s", name, error)
        if self.count > self.limit:
            raise CTInstructError(
                f"{self.count} samples could not be read, {self.limit} are allowed (max_skipped). The last: {error}"
            )


class AlignmentCollator:
    """Stage one: `AlignmentSample` rows to the arguments of `CTInstructForPretraining.forward`.

    Args:
        store: reads and keeps patches.
        tokenizer: of the text encoder.
        masks_per_image: how many structures of an image a batch asks for.
        absent_share: how often a structure that is known to be absent is asked for.
        max_length: tokens of a text; longer ones are cut.
        seed: of what is drawn: one text an image, the structures.
        max_skipped: unreadable samples that are passed over before training ends.
    """

    def __init__(
        self,
        store: PatchStore,
        tokenizer: Any,
        masks_per_image: int = 6,
        absent_share: float = 0.15,
        max_length: int = 256,
        seed: int = 0,
        max_skipped: int = 100,
    ) -> None:
        self.store, self.tokenizer = store, tokenizer
        tokenizer.padding_side = "right"  # encoders count positions from the left: padding there would shift them
        self.masks_per_image, self.absent_share, self.max_length = masks_per_image, absent_share, max_length
        self.seed = seed
        self.skipped = SkippedSamples(max_skipped)
        self._last_good: AlignmentSample | None = None

    def words(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """input_ids and attention_mask [texts, L]."""
        encoded = self.tokenizer(
            list(texts), return_tensors="pt", padding=True, truncation=True, max_length=self.max_length
        )
        return encoded["input_ids"], encoded["attention_mask"]

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        tasks = items[0].tasks
        read: list[tuple[AlignmentSample, Prepared, list[MaskRef], list[torch.Tensor], np.random.Generator]] = []
        for item in items:
            rng = generator_of(self.seed, item.draw)
            sample: AlignmentSample | None = None
            try:
                sample = from_row(item.row, "alignment")  # type: ignore[assignment]
                read.append(self._read(sample, tasks, rng))  # type: ignore[arg-type]
                self._last_good = sample
            except CTInstructError as error:
                self.skipped.add(item.row.get("id", "?") if sample is None else sample.id, error)
        if not read:
            if self._last_good is None:
                raise CTInstructError("No sample of a batch could be read, and none before it.")
            read.append(self._read(self._last_good, tasks, generator_of(self.seed, items[0].draw)))
        samples = [one[0] for one in read]
        batch: dict[str, Any] = {
            "pixel_values": torch.cat([one[1]["pixel_values"] for one in read]).float(),
            "patch_grid": torch.cat([one[1]["patch_grid"] for one in read]),
            "slice_mask": torch.cat([one[1]["slice_mask"] for one in read]),
        }
        if "contrastive" in tasks:
            self._add_texts(batch, samples, [one[4] for one in read])
        if "category" in tasks:
            self._add_categories(batch, samples)
        if "segmentation" in tasks:
            self._add_masks(batch, [one[2] for one in read], [one[3] for one in read])
        return batch

    def _read(
        self, sample: AlignmentSample, tasks: Sequence[str], rng: np.random.Generator
    ) -> tuple[AlignmentSample, Prepared, list[MaskRef], list[torch.Tensor], np.random.Generator]:
        prepared = self.store.image(sample.image)
        chosen = self.choose_masks(sample, rng) if "segmentation" in tasks else []
        return sample, prepared, chosen, [self.store.mask(sample.image, mask) for mask in chosen], rng

    def choose_masks(self, sample: AlignmentSample, rng: np.random.Generator) -> list[MaskRef]:
        """Structures to ask for: findings (those with a category label) as often as organs, some of them absent."""
        categories = {label.name for label in sample.labels}
        groups: dict[tuple[bool, bool], list[MaskRef]] = {}
        for mask in sample.masks:
            groups.setdefault((mask.name in categories, bool(mask.path)), []).append(mask)
        for group in groups.values():
            rng.shuffle(group)  # type: ignore[arg-type]
        chosen: list[MaskRef] = []
        while len(chosen) < self.masks_per_image and any(groups.values()):
            wanted = (bool(rng.integers(2)), bool(rng.random() >= self.absent_share))
            full = [key for key, group in groups.items() if group]
            if chosen and not any(present for _, present in full):
                break  # all that is there has been asked for
            # the group that was drawn, or the one most like it that still has something
            key = max(full, key=lambda one: (one == wanted, one[1] == wanted[1], one[0] == wanted[0]))
            chosen.append(groups[key].pop())
        return chosen

    def _add_texts(
        self, batch: dict[str, Any], samples: Sequence[AlignmentSample], rngs: Sequence[np.random.Generator]
    ) -> None:
        owners = [index for index, sample in enumerate(samples) if sample.texts]
        if not owners:
            return
        texts = [samples[index].texts[int(rngs[index].integers(len(samples[index].texts)))] for index in owners]
        batch["input_ids"], batch["attention_mask"] = self.words(texts)
        batch["text_images"] = torch.tensor(owners)

    def _add_categories(self, batch: dict[str, Any], samples: Sequence[AlignmentSample]) -> None:
        names = list(dict.fromkeys(label.name for sample in samples for label in sample.labels))
        if not names:
            return
        batch["class_input_ids"], batch["class_attention_mask"] = self.words(
            [describe_category(name) for name in names]
        )
        labels = torch.full((len(samples), len(names)), -1.0)
        for row, sample in enumerate(samples):
            for label in sample.labels:
                labels[row, names.index(label.name)] = label.value
        batch["class_labels"] = labels

    def _add_masks(
        self, batch: dict[str, Any], masks: Sequence[Sequence[MaskRef]], canvases: Sequence[Sequence[torch.Tensor]]
    ) -> None:
        names = [mask.name for group in masks for mask in group]
        owners = [index for index, group in enumerate(masks) for _ in group]
        labels = [canvas for group in canvases for canvas in group]
        if not names:  # a mask of padding only: all processes run the decoder, whose batch norm may wait for the others
            z, y, x, s = batch["patch_grid"][0].tolist()
            height, width = batch["pixel_values"].shape[-2:]
            names, owners = ["nothing"], [0]
            labels = [torch.full((z * s, y * height, x * width), -1, dtype=torch.int8)]
        batch["mask_input_ids"], batch["mask_attention_mask"] = self.words(names)
        batch["mask_images"] = torch.tensor(owners)
        batch["mask_labels"] = labels
