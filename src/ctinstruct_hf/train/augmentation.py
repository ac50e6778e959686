"""Scans and their masks changed together by MONAI, so that a few of them teach as many would: turned, scaled, shifted, cropped, and
changed in HU. Never mirrored: left and right are names. Off unless a recipe asks for it; not in the paper."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch

from ..data.store import Prepared
from ..errors import CTInstructError


@dataclass(frozen=True)
class Augmentation:
    """How far a sample may be from the scan it is made of; each is drawn evenly from 0 (or 1) to the value on both sides.

    Attributes:
        share: of samples that are changed, 0 to 1; the others are the scan itself.
        turn: degrees around the body's long axis.
        scale: share of the size, in each axis.
        shift: share of the canvas, in each axis.
        slices: a sample is so many neighbouring slices of the scan, cropped anywhere; 0 keeps all. A step costs in proportion, and
            as the U-Net reads slices one by one, many parts of scans teach more than a few whole ones.
        contrast: share by which the differences of HU are larger or smaller.
        brightness: HU, of which the range of the canvas holds 2,000.
        noise: standard deviation in HU, at most.
        blur: standard deviation in voxels, at most.
    """

    share: float = 0.9
    turn: float = 10.0
    scale: float = 0.15
    shift: float = 0.08
    slices: int = 0
    contrast: float = 0.15
    brightness: float = 30.0
    noise: float = 25.0
    blur: float = 0.7

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            most = {"share": 1.0, "turn": 180.0, "scale": 0.9, "contrast": 0.9, "shift": 0.5}.get(name)
            whole = name == "slices"
            if (
                isinstance(value, bool)
                or not isinstance(value, int if whole else int | float)
                or not 0 <= value <= (most or math.inf)
            ):
                limit = f" to {most:g}" if most is not None else ""
                raise CTInstructError(
                    f"augmentation: {name} is {value!r}: give a {'whole ' * whole}number from 0{limit}."
                )
        try:
            import monai.transforms  # noqa: F401
        except ImportError as error:
            raise CTInstructError("augmentation needs MONAI: pip install 'ctinstruct-hf[eval]'.") from error

    @classmethod
    def of(cls, settings: dict[str, Any] | bool) -> Augmentation:
        """From a recipe: `true` for the defaults, or a mapping.

        Raises:
            CTInstructError: for what is no mapping, unknown keys, or values out of range.
        """
        known = [field.name for field in fields(cls)]
        if settings is True:
            return cls()
        if not isinstance(settings, dict):
            raise CTInstructError(f"augmentation is {settings!r}: write true, or {{turn: 10, …}}.")
        if unknown := sorted(set(settings) - set(known)):
            raise CTInstructError(f"augmentation has unknown {', '.join(unknown)}: known are {', '.join(known)}.")
        return cls(**settings)

    def __call__(
        self, prepared: Prepared, masks: Sequence[torch.Tensor], rng: np.random.Generator
    ) -> tuple[Prepared, list[torch.Tensor]]:
        """A sample as it might have been scanned.

        Args:
            prepared: of a `PatchStore`; it is not changed.
            masks: int8 [D, H, W] each on its canvas, 1 inside, 0 outside, −1 padding.
            rng: of this sample.

        Returns:
            The patches and the masks of the changed scan, in a grid of their own; what comes from outside of the canvas is the
            lowest value, and −1 in the masks.
        """
        grid = [int(length) for length in prepared["patch_grid"][0]]
        rows, kept = prepared["pixel_values"], to_slices(prepared["slice_mask"], grid)
        canvas, moved = to_canvas(rows.float(), grid), torch.stack(list(masks)) if len(masks) else None
        lowest, highest = float(canvas.min()), float(canvas.max())
        if rng.random() < self.share:
            canvas, moved = self._in_space(canvas - lowest, moved, rng)
            canvas = self._in_hu(canvas + lowest, rng, 2000 / max(highest - lowest, 1e-6)).clamp(lowest, highest)
        window, grid = self._window(kept, grid, rng)
        return {
            "pixel_values": to_rows(canvas[window], grid).to(rows.dtype),
            "patch_grid": torch.tensor([grid]),
            "slice_mask": from_slices(kept[window], grid),
        }, [] if moved is None else list(moved[:, window])

    def _in_space(
        self, canvas: torch.Tensor, masks: torch.Tensor | None, rng: np.random.Generator
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A canvas whose lowest value is 0, and masks, turned, scaled and shifted alike; outside is 0, and −1."""
        from monai.transforms import Affine  # type: ignore[attr-defined]

        angle = math.radians(rng.uniform(-self.turn, self.turn))
        scale = rng.uniform(1 - self.scale, 1 + self.scale) * rng.uniform(1 - self.scale / 3, 1 + self.scale / 3, 3)
        shift = [rng.uniform(-self.shift, self.shift) * length for length in canvas.shape]
        moves = Affine(
            rotate_params=(angle, 0.0, 0.0), scale_params=scale.tolist(), translate_params=shift, padding_mode="zeros",
            image_only=True,
        )  # fmt: skip
        image = torch.as_tensor(moves(canvas[None], mode="bilinear"))[0]
        if masks is None:
            return image, None
        labels = torch.as_tensor(moves(masks.float() + 1, mode="nearest"))  # so that outside is padding
        return image, (labels.round() - 1).to(torch.int8)

    def _in_hu(self, canvas: torch.Tensor, rng: np.random.Generator, hu_per_unit: float) -> torch.Tensor:
        from monai.transforms import GaussianSmooth, ScaleIntensity, ShiftIntensity  # type: ignore[attr-defined]

        image: Any = canvas[None]
        if self.blur:
            image = GaussianSmooth(sigma=float(rng.uniform(0, self.blur)))(image)
        image = ScaleIntensity(minv=None, maxv=None, factor=float(rng.uniform(-self.contrast, self.contrast)))(image)
        image = ShiftIntensity(offset=float(rng.uniform(-self.brightness, self.brightness)) / hu_per_unit)(image)
        noise = rng.uniform(0, self.noise) / hu_per_unit
        random = torch.from_numpy(rng.standard_normal(canvas.shape, dtype=np.float32))
        return torch.as_tensor(image)[0] + float(noise) * random

    def _window(self, kept: torch.Tensor, grid: list[int], rng: np.random.Generator) -> tuple[slice, list[int]]:
        """Which slices of the canvas a sample is, of those that hold anything of the scan, and the grid of its patches."""
        z, y, x, s = grid
        count = min(self.slices, z * s) if self.slices else z * s
        if count > s:
            count -= count % s
        there = kept.nonzero().flatten()
        first, behind = (int(there[0]), int(there[-1]) + 1) if len(there) else (0, len(kept))
        last = max(behind - count, first)
        start = min(int(rng.integers(first, last + 1)), len(kept) - count)
        deep = min(count, s)
        return slice(start, start + count), [count // deep, y, x, deep]


def to_canvas(rows: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
    """[N, patch height, patch width] in the order of `pixel_values` -> [D, H, W]."""
    z, y, x, s = grid
    patches = rows.unflatten(0, (z, y, x, s))  # [z, y, x, s, h, w]
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3).flatten(0, 1)


def to_rows(canvas: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
    """The inverse of `to_canvas`."""
    z, y, x, s = grid
    patches = canvas.unflatten(2, (x, -1)).unflatten(1, (y, -1)).unflatten(0, (z, s))  # [z, s, y, h, x, w]
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(0, 3).contiguous()


def to_slices(mask: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
    """`slice_mask` [N] -> bool [D]: which slices of the canvas hold anything of the scan."""
    z, y, x, s = grid
    return mask.unflatten(0, (z, y * x, s)).any(1).flatten()


def from_slices(kept: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
    """bool [D] -> `slice_mask` [N]."""
    z, y, x, s = grid
    return kept.unflatten(0, (z, s))[:, None].expand(z, y * x, s).flatten().contiguous()


__all__ = ["Augmentation"]
