"""What a mask measures on the grid of the file that its scan came from."""

from __future__ import annotations

from typing import Any

import nibabel as nib
import numpy as np

from ..processing.volume import CTVolume

# nibabel's letter for the end of an axis -> the side of the patient
SIDES = {"L": "left", "R": "right", "A": "front", "P": "back", "S": "head", "I": "feet"}
_OPPOSITE = dict(zip("LRAPSI", "RLPAIS", strict=True))


def stored(volume: CTVolume, mask: np.ndarray) -> np.ndarray:
    """A mask bool (depth, height, width) as bool (i, j, k) of the source; a view where the volume was not resampled."""
    turned = volume.in_file_axes(np.asarray(mask, dtype=bool))
    return turned if volume.source.resampling is None else volume.source.resampling.mask_back(turned)


def cut_off(volume: CTVolume, grid: np.ndarray) -> list[str]:
    """Sides of the patient (head, feet, front, back, right, left) where a mask (i, j, k) reaches the edge of the scan.

    An axis of one voxel has no sides.
    """
    sides = []
    for axis, code in enumerate(nib.aff2axcodes(volume.source.affine)):
        if grid.shape[axis] == 1 or code is None:
            continue
        for index, letter in ((0, _OPPOSITE[code]), (-1, code)):
            if grid.take(index, axis=axis).any():
                sides.append(SIDES[letter])
    return sorted(sides, key=list(SIDES.values()).index)


def measure(volume: CTVolume, mask: np.ndarray) -> dict[str, Any]:
    """Voxels on the source's grid, their volume in ml, the mean HU inside, and the sides where the scan cuts it off."""
    grid = stored(volume, mask)
    voxels = int(np.count_nonzero(grid))
    per_voxel = abs(float(np.linalg.det(volume.source.affine[:3, :3])))
    inside = volume.hu[mask]
    return {
        "file": None,
        "volume_ml": round(voxels * per_voxel / 1000, 3),
        "mean_hu": round(float(inside.mean()), 1) if inside.size else None,
        "voxels": voxels,
        "cut_off": cut_off(volume, grid),
    }


__all__ = ["SIDES", "cut_off", "measure", "stored"]
