"""All masks of an open study as one label map, which the viewer draws at once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import nibabel as nib
import numpy as np

from ..processing.volume import CTVolume
from .masks import PackedMasks


class LabelMap:
    """A label map on the scan's own grid: 0 outside, n the n-th structure of the study, uint8 (uint16 from 256 structures on).
    Where structures share a voxel, the later one has it.

    Args:
        volume: the scan.
        path: the NIfTI that `update` writes.
    """

    def __init__(self, volume: CTVolume, path: Path) -> None:
        self.volume, self.path = volume, path
        self._labels = np.zeros(volume.hu.shape, np.uint8)
        self._drawn: list[tuple[str, object]] = []

    def update(self, masks: Mapping[str, np.ndarray]) -> None:
        """Write the masks as they are now; only new ones are drawn, unless earlier ones changed."""
        assert isinstance(masks, PackedMasks)
        current = masks.versions()
        if current == self._drawn:
            return
        dtype = np.uint8 if len(current) < 256 else np.uint16
        first = len(self._drawn) if current[: len(self._drawn)] == self._drawn else 0
        if first == 0:
            self._labels[:] = 0
        self._labels = self._labels.astype(dtype, copy=False)
        for number, (name, _) in enumerate(current[first:], start=first + 1):
            np.copyto(self._labels, dtype(number), where=masks[name])
        draft = self.path.with_name("new_" + self.path.name)
        nib.save(self.volume.to_source(self._labels), draft)
        os.replace(draft, self.path)
        self._drawn = current


__all__ = ["LabelMap"]
