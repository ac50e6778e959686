"""The canvas of a phantom: coordinates of every voxel in the patient, and the arrays that are painted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .structures import ORGANS

FIELD_MM = (320.0, 384.0, 384.0)


class Canvas:
    """Coordinates of every voxel in the patient (mm) and the arrays [D, H, W] that are painted."""

    def __init__(
        self, rng: np.random.Generator, shape: tuple[int, int, int], spacing: tuple[float, float, float]
    ) -> None:
        self.rng = rng
        self.shape = shape
        self.spacing = spacing
        # the scan's middle in the patient, and the patient's rotation
        free = max(0.0, FIELD_MM[0] - shape[0] * spacing[0]) / 2  # a short scan may lie anywhere in the trunk
        self.centre = np.array(
            [rng.uniform(-8, 8), rng.uniform(-8, 8), rng.uniform(-12, 22) + rng.uniform(-free, free)]
        )
        build = rng.uniform(0.92, 1.08) * rng.uniform(0.95, 1.05, 3)  # the patient's size: breadth, depth, length
        # from mm of the scanner to mm of the patient
        self.turn = (_rotation(*np.radians(rng.normal(0, 2.0, 3))) / build[:, None]).astype(np.float32)
        self.back = np.linalg.inv(self.turn)
        depth, height, width = [
            ((np.arange(n) - (n - 1) / 2) * mm).astype(np.float32) for n, mm in zip(shape, spacing, strict=True)
        ]
        axes = [width[None, None, :], height[None, :, None], depth[:, None, None]]  # x, y, z of the scanner
        # with a smooth warp, so that no organ is an exact ellipsoid
        self.x, self.y, self.z = (self._coordinate(axes, row, 4.0) for row in range(3))
        self.hu = np.full(shape, -1000.0, dtype=np.float32)
        self.organs = np.zeros(shape, dtype=np.uint8)
        self.finding_masks: dict[str, np.ndarray] = {}
        self.side_masks: dict[tuple[str, str], np.ndarray] = {}  # by (finding, side), for findings with a side
        self.heart_size = 1.0

    def move_to(self, level: float) -> None:
        """Put the scan's middle at this height of the patient, mm."""
        shift = level - float(self.z.mean())
        self.z += np.float32(shift)
        self.centre[2] += shift  # `box` must look for body parts there too

    def _coordinate(self, axes: list[np.ndarray], row: int, height: float) -> np.ndarray:
        """One coordinate of the patient at every voxel, with two waves of `height` mm and half of it."""
        plane = self.turn[row, 0] * axes[0] + self.turn[row, 1] * axes[1] + np.float32(self.centre[row])
        total = plane + self.turn[row, 2] * axes[2]
        for length in (190.0, 95.0):
            phases = self.rng.uniform(0, 2 * np.pi, 3).astype(np.float32)
            k = np.float32(2 * np.pi / length)
            wave = np.sin(k * axes[0] + phases[0]) * np.cos(k * axes[1] + phases[1]) * np.float32(height * length / 190)
            total += wave * np.sin(k * axes[2] + phases[2])
        return total

    def box(self, low: np.ndarray, high: np.ndarray, margin: float = 10.0) -> tuple[slice, slice, slice] | None:
        """The voxels that may hold a body part between two corners (x, y, z) in the patient."""
        corners = np.array([[a, b, c] for a in (low[0], high[0]) for b in (low[1], high[1]) for c in (low[2], high[2])])
        scanner = (corners - self.centre) @ self.back.T
        first, last = scanner.min(0) - margin, scanner.max(0) + margin
        spans = []
        for axis, n, mm in (
            (2, self.shape[0], self.spacing[0]),
            (1, self.shape[1], self.spacing[1]),
            (0, self.shape[2], self.spacing[2]),
        ):
            start = int(np.floor(first[axis] / mm + (n - 1) / 2))
            stop = int(np.ceil(last[axis] / mm + (n - 1) / 2)) + 1
            start, stop = max(start, 0), min(stop, n)
            if start >= stop:
                return None
            spans.append(slice(start, stop))
        return spans[0], spans[1], spans[2]

    def ellipsoid(
        self, centre: Sequence[float] | np.ndarray, axes: Sequence[float] | np.ndarray
    ) -> tuple[tuple[slice, slice, slice], np.ndarray] | None:
        """(box, inside) of an ellipsoid in the patient."""
        c, a = np.array(centre), np.array(axes)
        box = self.box(c - a, c + a)
        if box is None:
            return None
        distance = np.square((self.x[box] - np.float32(c[0])) * np.float32(1 / a[0]))
        distance += np.square((self.y[box] - np.float32(c[1])) * np.float32(1 / a[1]))
        distance += np.square((self.z[box] - np.float32(c[2])) * np.float32(1 / a[2]))
        return box, distance < 1

    def tube(
        self,
        start: Sequence[float] | np.ndarray,
        end: Sequence[float] | np.ndarray,
        first_radius: float,
        last_radius: float,
    ) -> tuple[tuple[slice, slice, slice], np.ndarray] | None:
        """(box, inside) of a straight tube between two points in the patient, with round ends."""
        a, b = np.array(start), np.array(end)
        box = self.box(np.minimum(a, b) - first_radius, np.maximum(a, b) + first_radius)
        if box is None:
            return None
        along = (b - a).astype(np.float32)
        x, y, z = (field[box] - np.float32(at) for field, at in zip((self.x, self.y, self.z), a, strict=True))
        share = np.clip((x * along[0] + y * along[1] + z * along[2]) / np.square(along).sum(), 0, 1)
        distance = np.square(x - share * along[0])
        distance += np.square(y - share * along[1])
        distance += np.square(z - share * along[2])
        return box, distance < np.square(np.float32(first_radius) + share * np.float32(last_radius - first_radius))

    def organ(self, name: str, box: tuple[slice, slice, slice], inside: np.ndarray, hu: float) -> None:
        self.organs[box][inside] = ORGANS.index(name) + 1
        self.hu[box][inside] = hu

    def finding(
        self,
        name: str,
        box: tuple[slice, slice, slice],
        inside: np.ndarray,
        hu: float | None,
        side: str = "",
        displaces_lung: bool = False,
    ) -> int:
        """Mark a finding and set its HU; the number of its voxels. With `displaces_lung` these are no longer lung."""
        masks = [self.finding_masks.setdefault(name, np.zeros(self.shape, bool))]
        if side:
            masks.append(self.side_masks.setdefault((name, side), np.zeros(self.shape, bool)))
        for mask in masks:
            mask[box] |= inside
        if displaces_lung:
            self.organs[box][inside & self.is_organ(box, "left lung", "right lung")] = ORGANS.index("body") + 1
        if hu is not None:
            self.hu[box][inside] = hu
        return int(inside.sum())

    def keep_middle(self) -> None:
        """Keep the middle of the three slices."""
        self.shape = (1, *self.shape[1:])
        self.hu, self.organs = self.hu[1:2].copy(), self.organs[1:2].copy()
        self.finding_masks = {name: mask[1:2].copy() for name, mask in self.finding_masks.items()}
        self.side_masks = {key: mask[1:2].copy() for key, mask in self.side_masks.items()}

    def is_organ(self, box: tuple[slice, slice, slice], *names: str) -> np.ndarray:
        labels = self.organs[box]
        found = labels == ORGANS.index(names[0]) + 1
        for name in names[1:]:
            found |= labels == ORGANS.index(name) + 1
        return found


def _rotation(a: float, b: float, c: float) -> np.ndarray:
    rx = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    ry = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    rz = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    return rx @ ry @ rz
