"""Tilted or unevenly spaced slices and sheared axes -> an upright, even grid, and masks back.

Slices lie at distances along their common normal, each shifted within its plane. Upright means no shift; even means
equal distances. In-plane axes come first: arrays here are (i, j, k) with k the slices.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class SliceResampling:
    """Positions of the stored slices, and the grid to which they are resampled.

    Attributes:
        distances: [K] mm of each stored slice along the normal, ascending from 0.
        shifts: [K, 2] in-plane shift of each stored slice in voxels (i, j), against the upright grid.
        step: mm between slices of the even grid.
        count: slices of the even grid.
    """

    distances: np.ndarray
    shifts: np.ndarray
    step: float
    count: int

    @property
    def margins(self) -> tuple[int, int, int, int]:
        """Voxels added before and after i and j, so that shifted slices stay inside."""
        low = np.floor(self.shifts.min(axis=0)).astype(int)
        high = np.ceil(self.shifts.max(axis=0)).astype(int)
        return int(-low[0]), int(high[0]), int(-low[1]), int(high[1])

    def forward(self, stored: np.ndarray, fill: float, nearest: bool = False) -> np.ndarray:
        """HU on the even, upright grid, linear between neighbours; labels with `nearest`."""
        before_i, after_i, before_j, after_j = self.margins
        shape = (stored.shape[0] + before_i + after_i, stored.shape[1] + before_j + after_j)
        even = np.empty((*shape, self.count), dtype=np.float32, order="F")
        upright: dict[int, np.ndarray] = {}

        def slice_of(index: int) -> np.ndarray:
            if index not in upright:
                canvas = np.full(shape, fill, dtype=np.float32)
                canvas[before_i : before_i + stored.shape[0], before_j : before_j + stored.shape[1]] = stored[
                    ..., index
                ]
                shift = np.rint(self.shifts[index]) if nearest else self.shifts[index]
                upright[index] = shifted(canvas, float(shift[0]), float(shift[1]), fill)
                for old in [key for key in upright if key < index - 1]:
                    del upright[old]
            return upright[index]

        for k in range(self.count):
            distance = min(k * self.step, float(self.distances[-1]))
            upper = int(np.clip(np.searchsorted(self.distances, distance), 1, len(self.distances) - 1))
            low, high = self.distances[upper - 1], self.distances[upper]
            weight = float(np.clip((distance - low) / (high - low), 0.0, 1.0))
            weight = round(weight) if nearest else weight
            if weight == 0.0:
                even[..., k] = slice_of(upper - 1)
            elif weight == 1.0:
                even[..., k] = slice_of(upper)
            else:
                even[..., k] = (1 - weight) * slice_of(upper - 1) + weight * slice_of(upper)
        return even

    def mask_back(self, even: np.ndarray) -> np.ndarray:
        """A mask from the even, upright grid to the stored slices, nearest neighbour."""
        before_i, after_i, before_j, after_j = self.margins
        rows, columns = even.shape[0] - before_i - after_i, even.shape[1] - before_j - after_j
        stored = np.zeros((rows, columns, len(self.distances)), dtype=even.dtype, order="F")
        nearest = np.clip(np.rint(self.distances / self.step).astype(int), 0, self.count - 1)
        for k, source in enumerate(nearest):
            i = np.rint(np.arange(rows) + before_i + self.shifts[k, 0]).astype(int)
            j = np.rint(np.arange(columns) + before_j + self.shifts[k, 1]).astype(int)
            inside_i, inside_j = (i >= 0) & (i < even.shape[0]), (j >= 0) & (j < even.shape[1])
            picked = even[..., source][np.ix_(i.clip(0, even.shape[0] - 1), j.clip(0, even.shape[1] - 1))]
            stored[..., k] = np.where(inside_i[:, None] & inside_j[None, :], picked, 0)
        return stored


@dataclass
class ShearResampling:
    """Sheared axes, made perpendicular axis by axis.

    Attributes:
        steps: (order of the axes, resampling): the last axis of the order is straightened against the first two.
    """

    steps: list[tuple[tuple[int, int, int], SliceResampling]]

    def forward(self, stored: np.ndarray, fill: float, nearest: bool = False) -> np.ndarray:
        """HU on the upright grid, linear between neighbours; labels with `nearest`."""
        for order, step in self.steps:
            stored = step.forward(stored.transpose(order), fill, nearest).transpose(np.argsort(order))
        return stored

    def mask_back(self, upright: np.ndarray) -> np.ndarray:
        """A mask from the upright grid to the stored grid, nearest neighbour."""
        for order, step in reversed(self.steps):
            upright = step.mask_back(upright.transpose(order)).transpose(np.argsort(order))
        return upright


def without_shear(
    affine: np.ndarray, shape: tuple[int, ...]
) -> tuple[np.ndarray, tuple[int, int, int], ShearResampling] | None:
    """Upright affine and shape, and the way there, where j drifts along i, or k within their plane, by half a voxel.

    Args:
        affine: 4 x 4, voxel (i, j, k) -> mm; its axes span space.
        shape: voxels along (i, j, k).
    """
    affine, sizes = affine.copy(), list(shape)
    steps: list[tuple[tuple[int, int, int], SliceResampling]] = []
    for axis, order in ((1, (0, 2, 1)), (2, (0, 1, 2))):
        sides = affine[:3, :axis]  # those that are perpendicular by now
        drift = np.zeros(2)  # voxels along the first two axes of the order, a step of `axis`
        for number, side in enumerate(sides.T):
            drift[number] = affine[:3, axis] @ side / (side @ side)
        if np.abs(drift).max() * (sizes[axis] - 1) < 0.5:
            continue
        affine[:3, axis] -= sides @ drift[:axis]
        step = float(np.linalg.norm(affine[:3, axis]))
        lines = np.arange(sizes[axis])
        resampling = SliceResampling(lines * step, drift[None] * lines[:, None], step, sizes[axis])
        margins = resampling.margins
        for number, side in enumerate(order[:2]):
            affine[:3, 3] -= margins[2 * number] * affine[:3, side]
            sizes[side] += margins[2 * number] + margins[2 * number + 1]
        steps.append((order, resampling))
    return (affine, (sizes[0], sizes[1], sizes[2]), ShearResampling(steps)) if steps else None


def shifted(image: np.ndarray, shift_i: float, shift_j: float, fill: float) -> np.ndarray:
    """A 2D image moved by a fraction of voxels along both axes, linear, `fill` coming in."""
    for axis, shift in ((0, shift_i), (1, shift_j)):
        if abs(shift) < 1e-6:
            continue
        whole = int(np.floor(shift))
        part = np.float32(shift - whole)
        first = _moved(image, whole, axis, fill)
        image = first if part == 0 else (1 - part) * first + part * _moved(image, whole + 1, axis, fill)
    return image


def _moved(image: np.ndarray, steps: int, axis: int, fill: float) -> np.ndarray:
    moved = np.full_like(image, fill)
    if abs(steps) >= image.shape[axis]:
        return moved
    to: list[slice] = [slice(None), slice(None)]
    start: list[slice] = [slice(None), slice(None)]
    to[axis] = slice(max(steps, 0), image.shape[axis] + min(steps, 0))
    start[axis] = slice(max(-steps, 0), image.shape[axis] - max(steps, 0))
    moved[tuple(to)] = image[tuple(start)]
    return moved
