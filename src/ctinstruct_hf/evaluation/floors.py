"""When a mask is left empty: a floor for each structure, found on scans whose truth is known.

A decoder that was trained mostly on structures that are there marks something wherever it is asked. How much of a scan it
marks, and how surely, still tells where there is something: from that each structure gets its floor.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..data.cases import MaskRef
from ..data.reading import open_mask
from ..errors import CTInstructError
from ..files import write_whole
from ..inference.study import Study
from ..processing.any_resolution import logits_inside
from .segmentation import volume_dice

VOLUMES = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # mL that are looked at
LEAST = 5  # scans with the structure, and as many without, that a floor needs
GAIN = 0.02  # that it needs, in the mean of Dice and of the share of absent ones left empty


@dataclass
class Marked:
    """What a model marked when it was asked for one structure of one scan.

    Attributes:
        dice: with the truth; None where the structure is absent.
        volume: mL marked, the logit being above 0.
        levels: the logit that each of `VOLUMES` has above it.
    """

    dice: float | None
    volume: float
    levels: tuple[float, ...]

    @classmethod
    def of(cls, study: Study, logits: torch.Tensor, truth: np.ndarray) -> Marked:
        """From logits [D, H, W] on the canvas and the truth (depth, height, width) of the scan."""
        processor, volume = study.processor.image_processor, study.volume
        fit = processor.fit_of(volume)
        inside = logits_inside(logits, fit).float().flatten()
        voxel = fit.voxel_volume(volume.spacing)
        counts = [min(max(round(least / voxel), 1), inside.numel()) for least in VOLUMES]
        highest = inside.topk(max(counts)).values
        dice = volume_dice(processor.mask_from_canvas(logits, volume), truth) if truth.any() else None
        return cls(
            dice,  # type: ignore[arg-type]  # of one mask: a number
            processor.volume_above(logits, volume, 0.0, fit),
            tuple(float(highest[count - 1]) for count in counts),
        )


def find_floor(found: Sequence[Marked]) -> list[float] | None:
    """[mL, logit] that serves best: the mean of Dice where the structure is there and of the share left empty where it is
    not; None where too few scans tell, or nothing is won."""
    there = np.array([one.dice is not None for one in found], bool)
    if min(there.sum(), (~there).sum()) < LEAST:
        return None
    dice = np.array([one.dice or 0.0 for one in found])
    empty = np.array([one.volume == 0 for one in found])

    def worth(kept: np.ndarray) -> float:
        return float((dice * kept)[there].mean() + (empty | ~kept)[~there].mean()) / 2

    best, chosen = worth(np.ones(len(found), bool)) + GAIN, None
    for place, values in enumerate(np.array([[*one.levels, one.volume] for one in found]).T):
        for floor in _between(values):
            value = worth(values > floor)
            if value > best:
                best, chosen = value, [VOLUMES[place], floor] if place < len(VOLUMES) else [floor, 0.0]
    return None if chosen is None else [round(one, 3) for one in chosen]


def _between(values: np.ndarray) -> list[float]:
    """The middles between neighbours."""
    ordered = np.unique(values)
    return [float(one) for one in (ordered[1:] + ordered[:-1]) / 2]


def mark(study: Study, masks: Sequence[MaskRef]) -> Iterator[tuple[str, Marked]]:
    """What the model marks of each structure of a scan whose masks are known, empty ones among them, by its name."""
    for mask, logits in zip(masks, study.mask_logits([mask.name for mask in masks]), strict=True):
        yield mask.name, Marked.of(study, logits, open_mask(mask, study.volume))


def write_floors(folder: Path, floors: dict[str, list[float]]) -> None:
    """Into the processor's file of a model's folder; what was there goes.

    Raises:
        CTInstructError: where the folder has no such file.
    """
    path = folder / "processor_config.json"
    if not path.exists():
        raise CTInstructError(f"{folder} has no processor_config.json: give the folder of a stage-two model.")
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["image_processor"]["mask_floors"] = floors
    write_whole(path, json.dumps(settings, indent=2, sort_keys=True) + "\n")


__all__ = ["Marked", "find_floor", "mark", "write_floors"]
