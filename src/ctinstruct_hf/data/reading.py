"""From the references in a row to voxels: volumes, label volumes, made-up scans."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import nibabel as nib
import numpy as np

from ..errors import CTInstructError
from ..processing.volume import CTVolume, clean_hu
from ..processing.volume_reading import read_volume
from .phantoms import FINDINGS, Phantom, make_phantom
from .samples import ImageRef, MaskRef

SLICE_KINDS = ("slice", "focus")
# what slices of `focus` go through in turn: what is small or pale more often, and a level of chance
_FOCUS: tuple[str | None, ...] = (
    *FINDINGS, *["lung nodule"] * 2, *["lymphadenopathy"] * 3, *["liver lesion"] * 7, *[None] * 3
)  # fmt: skip
PHANTOM_KINDS = ("trunk", "cropped", "whole", *SLICE_KINDS)


@dataclass(frozen=True)
class PhantomRef:
    """A made-up scan by kind and seed, written `phantom:trunk:12`, or `phantom:trunk:12:-lung nodule` without a finding.

    `trunk` is 64 x 128 x 128 voxels of the whole chest and upper abdomen, `cropped` 32 x 128 x 128 of any part of it,
    `whole` 128 x 160 x 160, `slice` one axial slice of 128 x 128 at a level of chance, `focus` one at the level of a finding,
    in two of three made to be there and in the third made not to be: lesions three times as often as most, nodules twice;
    one in six is at a level of chance.
    """

    kind: str
    seed: int
    changes: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        parts = [f"{'+' if there else '-'}{name}" for name, there in self.changes]
        return ":".join(["phantom", self.kind, str(self.seed), *parts])

    @classmethod
    def parse(cls, text: str) -> PhantomRef:
        parts = text.split(":")
        names = [part[1:] for part in parts[3:]]
        if len(parts) < 3 or parts[1] not in PHANTOM_KINDS or not parts[2].isdigit() or not set(names) <= set(FINDINGS):
            raise CTInstructError(f"'{text}' is no made-up scan: write phantom:<{'|'.join(PHANTOM_KINDS)}>:<seed>.")
        return cls(parts[1], int(parts[2]), tuple((part[1:], int(part[0] == "+")) for part in parts[3:]))

    def make(self) -> Phantom:
        """The scan; field of view and spacing are drawn from the seed too."""
        rng = np.random.default_rng([self.seed, 77])
        changes = dict(self.changes)
        if self.kind == "whole":
            return make_phantom(self.seed, findings=changes)
        field = rng.uniform(330, 420)
        if self.kind in SLICE_KINDS:
            spacing = (5.0, field / 128, field / 128)
            turn, place = divmod(self.seed, len(_FOCUS))
            through = _FOCUS[place] if self.kind == "focus" else None
            if through is not None:
                changes = {through: int(turn % 3 > 0), **changes}
            return make_phantom(self.seed, (1, 128, 128), spacing, kind="slice", findings=changes, through=through)
        if self.kind == "cropped":
            field = rng.uniform(300, 420)
            return make_phantom(
                self.seed, (32, 128, 128), (rng.uniform(2.2, 4.0), field / 128, field / 128), findings=changes
            )
        length = rng.uniform(300, 350)
        return make_phantom(self.seed, (64, 128, 128), (length / 64, field / 128, field / 128), findings=changes)


def is_phantom(path: str) -> bool:
    return path.startswith("phantom:")


@lru_cache(maxsize=4)
def phantom_of(path: str) -> Phantom:
    """The made-up scan of a reference, kept while its masks are asked for."""
    return PhantomRef.parse(path).make()


def open_volume(image: ImageRef) -> CTVolume:
    """The volume that a reference names, in HU with true spacing.

    Raises:
        CTInstructError: naming the file.
    """
    if is_phantom(image.path):
        return phantom_of(image.path).volume
    spacing = tuple(image.spacing) or None
    scaled = (image.slope, image.intercept) != (1.0, 0.0)
    if image.layout:
        array = _array_of(image)
        return read_volume(
            array * np.float32(image.slope) + np.float32(image.intercept), spacing=spacing or (1.0, 1.0, 1.0)
        )
    volume = read_volume(image.path, spacing=spacing, keep_padding=scaled)
    if scaled:
        hu = volume.hu * np.float32(image.slope) + np.float32(image.intercept)
        if float(image.slope).is_integer() and float(image.intercept).is_integer():
            hu = np.rint(hu).astype(np.int32)
        volume.hu = clean_hu(hu, Path(image.path).name, volume.warnings, in_place=True)
    if spacing and volume.source.kind != "array":
        volume.affine = volume.affine.copy()
        goal = np.array(spacing[::-1])
        volume.affine[:3, :3] *= goal / np.linalg.norm(volume.affine[:3, :3], axis=0)
    return volume


def _array_of(image: ImageRef) -> np.ndarray:
    """An array file of another layout in the axes of `CTVolume.hu`."""
    name = Path(image.path).name
    try:
        array = np.load(image.path, allow_pickle=False, mmap_mode="r")
    except Exception as error:
        raise CTInstructError(f"{name} is no readable numpy file: {error}") from error
    if array.ndim == 3:
        array = array[None]
    if array.ndim != 4:
        raise CTInstructError(f"{name} has shape {array.shape}: expected a channel and three axes.")
    first = np.asarray(array[0], dtype=np.float32)
    return first.transpose(2, 0, 1) if image.layout == "chwd" else first


def open_labels(path: str, volume: CTVolume) -> np.ndarray:
    """A label file in the axes of `volume.hu`: int16 (depth, height, width).

    Raises:
        CTInstructError: where it lies on another grid or has labels outside 0…127.
    """
    name = Path(path).name
    stored = read_volume(path, spacing=volume.spacing, labels=True)
    if stored.shape != volume.shape:
        raise CTInstructError(f"{name} has shape {stored.shape}, its image {volume.shape}: they must be equal.")
    if volume.source.kind != "array":
        turn = nib.aff2axcodes(stored.affine), nib.aff2axcodes(volume.affine)
        if turn[0] != turn[1]:
            raise CTInstructError(f"{name} lies along {turn[0]}, its image along {turn[1]}: they must be equal.")
    labels = np.rint(stored.hu).astype(np.int16)
    if labels.min() < 0 or labels.max() > 127:
        raise CTInstructError(f"{name} has labels {labels.min()} to {labels.max()}: expected 0 to 127.")
    return labels


def open_mask(mask: MaskRef, volume: CTVolume) -> np.ndarray:
    """One structure in the axes of `volume.hu`: bool (depth, height, width); all False where it is known to be absent."""
    if not mask.path:
        return np.zeros(volume.shape, bool)
    if is_phantom(mask.path):
        masks = phantom_of(mask.path).masks
        if mask.name not in masks:
            raise CTInstructError(f"phantoms have no structure '{mask.name}'.")
        return masks[mask.name]
    labels = open_labels(mask.path, volume)
    return np.isin(labels, mask.values) if mask.values else labels > 0
