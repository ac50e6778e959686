"""From painted HU to a scan: partial volume, streaks, noise, and the grid of the scanner."""

from __future__ import annotations

import numpy as np

from ..processing.volume import CTVolume, VolumeSource
from .canvas import Canvas


def acquire(c: Canvas, rng: np.random.Generator) -> None:
    """Apply the scanner's effects to `c.hu` in place: partial volume, streaks from metal, noise with texture."""
    hu = c.hu
    for axis, n in enumerate(c.shape):
        if n > 2:
            front = [slice(None)] * 3
            back = [slice(None)] * 3
            middle = [slice(None)] * 3
            front[axis], back[axis], middle[axis] = slice(2, None), slice(None, -2), slice(1, -1)
            inner = hu[tuple(front)] + hu[tuple(back)]
            inner *= np.float32(0.2)
            inner += np.float32(0.6) * hu[tuple(middle)]
            hu[tuple(middle)] = inner
    metal = c.finding_masks.get("medical material")
    if metal is not None and metal.any():
        _streaks(c, metal, rng)
    sigma = float(rng.uniform(4, 24))
    noise = rng.standard_normal(c.shape, dtype=np.float32)
    for axis in (2, 1, 0):  # neighbours in plane share their noise, as after a smooth kernel
        if c.shape[axis] > 1:
            behind, ahead = [slice(None)] * 3, [slice(None)] * 3
            behind[axis], ahead[axis] = slice(None, -1), slice(1, None)
            noise[tuple(behind)] += np.float32(0.8 if axis else 0.4) * noise[tuple(ahead)]
    noise *= np.float32(sigma / max(float(noise[:1].std()), 1e-6))
    hu += noise
    np.clip(hu, -1024, 3071, out=hu)


def _streaks(c: Canvas, metal: np.ndarray, rng: np.random.Generator) -> None:
    """Alternating dark and bright rays in the slices that metal lies in."""
    for depth in np.flatnonzero(metal.any(axis=(1, 2))):
        rows, columns = np.nonzero(metal[depth])
        row, column = rows.mean(), columns.mean()
        y = (np.arange(c.shape[1], dtype=np.float32) - row)[:, None]
        x = (np.arange(c.shape[2], dtype=np.float32) - column)[None, :]
        strength = min(len(rows) / 60, 1.0) * 130
        rays = np.cos(np.arctan2(y, x) * 14 + rng.uniform(0, 6)) * strength
        rays *= np.exp(-np.hypot(x, y) * np.float32(c.spacing[2] / 60))
        c.hu[depth] += np.where(metal[depth], 0, rays).astype(np.float32)


def to_volume(c: Canvas) -> CTVolume:
    """HU as a volume in the scanner's coordinates, with the origin in its middle."""
    depth, height, width = c.spacing
    affine = np.diag([-width, -height, depth, 1.0])
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(c.shape[::-1]) - 1) / 2)
    shape = (c.shape[2], c.shape[1], c.shape[0])
    source = VolumeSource(shape, affine, np.array([[0, 1], [1, 1], [2, 1]]), name="phantom")
    return CTVolume(np.rint(c.hu).astype(np.int16), affine, source, [])
