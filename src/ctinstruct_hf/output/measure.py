"""What a mask measures on the grid of the file that its scan came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK

from ..processing.volume import CTVolume

# nibabel's letter for the end of an axis -> the side of the patient
SIDES = {"L": "left", "R": "right", "A": "front", "P": "back", "S": "head", "I": "feet"}
_OPPOSITE = dict(zip("LRAPSI", "RLPAIS", strict=True))
_ANGLES = np.radians(np.arange(180))
# of a finding: what is nearer to each other than twice this is one component, and what is nearer to a component than this,
# along each axis, touches it; a component of less than this share of the largest, about half of its diameter, is a speck,
# which is not counted
JOIN_MM, SPECK = 5.0, 1 / 8
_MOST = 127  # components whose organ is looked for; a label map of the canvas holds no more
# around everything: where a finding lies that touches no organ
WALLS = ("muscle", "subcutaneous fat")
_ONE_SIDE = 0.8  # share of a finding on one side of the patient from which on it lies there


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
            if np.moveaxis(grid, axis, 0)[index].any():
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


def measure_finding(
    volume: CTVolume,
    mask: np.ndarray,
    organs: Mapping[str, np.ndarray] | None = None,
    to_organs: Callable[[np.ndarray], np.ndarray] = lambda labels: labels,
) -> dict[str, Any]:
    """Everything that `measure` gives of a mask, and what a report says of a finding.

    Args:
        volume: the scan.
        mask: bool (depth, height, width) on its grid.
        organs: {name: bool mask} among which the organ that a component lies in or touches is looked for.
        to_organs: brings a label map of the scan to the grid of `organs`, where that is another.

    Returns:
        `measure`'s, and "sd_hu"; "diameter_mm" and "perpendicular_mm", the longest axial diameter of the largest component
        and its perpendicular in the same slice; "slice" (from 1 at the feet) and "place_mm" (RAS), the middle of the mask
        where it is largest; "side" (left, right or both); "organ" of the largest component; "components", the largest first,
        each with its "volume_ml", "diameter_mm", "perpendicular_mm", "side", "organ", "place_mm" and "centre_mm". None where
        the mask is empty.
    """
    mask = np.asarray(mask, dtype=bool)
    found = measure(volume, mask)
    empty = dict.fromkeys(("sd_hu", "diameter_mm", "perpendicular_mm", "slice", "place_mm", "side", "organ"))
    if not mask.any():
        return {**found, **empty, "components": []}
    middle = _midline(volume)
    listed = []
    around = np.zeros(mask.shape, np.uint8)  # the number of the component that a voxel belongs to or is near
    for number, (start, part) in enumerate(components(mask, volume.spacing), start=1):
        if organs and number <= _MOST:
            box, near = _surroundings(start, part, _reach(volume.spacing), mask.shape)
            around[box][near] = number
        diameter, perpendicular = axial_diameters(part, volume.spacing)
        voxel = [first + index for first, index in zip(start, key_place(part), strict=True)]
        listed.append(
            {
                "volume_ml": round(int(part.sum()) * float(np.prod(volume.spacing)) / 1000, 3),
                "diameter_mm": round(diameter, 1),
                "perpendicular_mm": round(perpendicular, 1),
                "side": _side(part.sum(axis=(0, 1)), start[2], middle),
                "organ": None,
                "place_mm": in_patient(volume, voxel),
                "centre_mm": in_patient(
                    volume, [f + float(i.mean()) for f, i in zip(start, part.nonzero(), strict=True)]
                ),
            }
        )
    if organs:
        for one, organ in zip(listed, organs_of(to_organs(around), organs), strict=False):
            one["organ"] = organ
    key = key_place(mask)
    return {
        **found,
        "sd_hu": round(float(volume.hu[mask].std()), 1),
        "diameter_mm": listed[0]["diameter_mm"],
        "perpendicular_mm": listed[0]["perpendicular_mm"],
        "slice": key[0] + 1,
        "place_mm": in_patient(volume, key),
        "side": _side(mask.sum(axis=(0, 1)), 0, middle),
        "organ": listed[0]["organ"],
        "components": listed,
    }


def components(mask: np.ndarray, spacing: tuple[float, float, float]) -> list[tuple[tuple[int, int, int], np.ndarray]]:
    """The parts of a mask (depth, height, width), the largest first and without specks: each as the first voxel of its box
    and bool of the box. Parts that lie within `2 * JOIN_MM` of each other are one."""
    reach = _reach(spacing)
    box = box_of(mask)
    image = SimpleITK.GetImageFromArray(np.pad(mask[box], [(r, r) for r in reach]).astype(np.uint8))
    joined = SimpleITK.ConnectedComponent(SimpleITK.BinaryDilate(image, reach[::-1], SimpleITK.sitkBall), True)
    labels = SimpleITK.Mask(joined, image)
    shapes = SimpleITK.LabelShapeStatisticsImageFilter()
    shapes.Execute(labels)
    sizes = {label: shapes.GetNumberOfPixels(label) for label in shapes.GetLabels()}
    numbers = SimpleITK.GetArrayViewFromImage(labels)
    parts = []
    for label in sorted(sizes, key=lambda label: -sizes[label]):
        if sizes[label] < SPECK * max(sizes.values()):
            break
        x, y, z, width, height, depth = shapes.GetBoundingBox(label)
        z0, y0, x0 = (b.start + s - r for b, s, r in zip(box, (z, y, x), reach, strict=True))
        parts.append(((z0, y0, x0), numbers[z : z + depth, y : y + height, x : x + width] == label))
    return parts


def axial_diameters(mask: np.ndarray, spacing: tuple[float, float, float]) -> tuple[float, float]:
    """The longest diameter of a mask (depth, height, width) within an axial slice, and the extent across it there, in mm.

    Both reach from edge to edge of the outermost voxels: a row of n voxels is n voxels long.
    """
    return _longest(mask, spacing)[2:]


def diameter_lines(
    mask: np.ndarray, spacing: tuple[float, float, float]
) -> tuple[int, list[list[tuple[float, float]]]]:
    """Where the diameters of `measure_finding` lie: the axial slice (depth), and the longest diameter of the largest
    component and its perpendicular, each as two ends (height, width) in voxels. The mask is not empty."""
    (depth, height, width), part = components(mask, spacing)[0]
    level, angle, *_ = _longest(part, spacing)
    rows, columns = np.nonzero(part[level])
    _, dy, dx = spacing
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])  # its rows: along and across
    turned = turn @ [columns * dx, rows * dy]
    half = np.abs(turn * [dx, dy]).max(axis=1) / 2  # of a voxel
    low, high = turned.min(axis=1) - half, turned.max(axis=1) + half
    lines = []
    for axis in range(2):
        beside = turned[1 - axis][[turned[axis].argmin(), turned[axis].argmax()]].mean()
        ends = [[end, beside] if axis == 0 else [beside, end] for end in (low[axis], high[axis])]
        lines.append([(float(y / dy + height), float(x / dx + width)) for x, y in (turn.T @ end for end in ends)])
    return level + depth, lines


def _longest(mask: np.ndarray, spacing: tuple[float, float, float]) -> tuple[int, float, float, float]:
    """Slice, angle from the rows (radians), length and perpendicular of the longest axial diameter."""
    depths, rows = np.nonzero(mask.any(axis=2))
    _, dy, dx = spacing
    first = mask.argmax(axis=2)[depths, rows] * dx
    last = (mask.shape[2] - 1 - mask[:, :, ::-1].argmax(axis=2)[depths, rows]) * dx
    across, along = np.cos(_ANGLES), np.sin(_ANGLES)
    shift = (rows * dy)[:, None] * along
    ends = [edge[:, None] * across + shift for edge in (first, last)]
    starts = np.flatnonzero(np.diff(depths, prepend=-1))  # of each slice
    extents = np.maximum.reduceat(np.maximum(*ends), starts) - np.minimum.reduceat(np.minimum(*ends), starts)
    extents += np.maximum(abs(dx * across), abs(dy * along))
    level, angle = np.unravel_index(extents.argmax(), extents.shape)
    across_it = float(extents[level, (angle + 90) % 180])
    return int(depths[starts[level]]), float(_ANGLES[angle]), float(extents[level, angle]), across_it


def organs_of(around: np.ndarray, organs: Mapping[str, np.ndarray]) -> list[str | None]:
    """The organ that most of the voxels in and around each component belong to; one of `WALLS` only where there is no other.

    Args:
        around: numbers of components from 1 on, 0 elsewhere, on the grid of the organs.
        organs: {name: bool mask}.

    Returns:
        one for each number up to the highest; None for a component without an organ near it.
    """
    voxels = np.flatnonzero(around > 0)  # padding of a canvas is -1
    numbers = around.ravel()[voxels]
    highest = int(numbers.max(initial=0))
    shared = {
        name: np.bincount(numbers[organ.ravel()[voxels]], minlength=highest + 1) for name, organ in organs.items()
    }
    names: list[str | None] = []
    for number in range(1, highest + 1):
        near = [name for name in organs if shared[name][number]]
        organs_near = [name for name in near if name not in WALLS]
        names.append(max(organs_near or near, key=lambda name: shared[name][number], default=None))
    return names


def _reach(spacing: Sequence[float]) -> list[int]:
    """`JOIN_MM` in voxels (depth, height, width)."""
    return [max(1, round(JOIN_MM / mm)) for mm in spacing]


def _surroundings(
    start: Sequence[int], part: np.ndarray, reach: Sequence[int], shape: Sequence[int]
) -> tuple[tuple[slice, ...], np.ndarray]:
    """A component and what lies within its reach along each axis: the box on the grid, and bool of the box."""
    image = SimpleITK.GetImageFromArray(np.pad(part, [(r, r) for r in reach]).astype(np.uint8))
    near = SimpleITK.GetArrayViewFromImage(SimpleITK.BinaryDilate(image, list(reach[::-1]), SimpleITK.sitkBox)) > 0
    low = [first - r for first, r in zip(start, reach, strict=True)]
    box = tuple(
        slice(max(first, 0), min(first + length, size))
        for first, length, size in zip(low, near.shape, shape, strict=True)
    )
    return box, near[tuple(slice(b.start - first, b.stop - first) for b, first in zip(box, low, strict=True))]


def box_of(mask: np.ndarray) -> tuple[slice, ...]:
    """The smallest box around a mask of three axes that is not empty."""
    inside = [np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    return tuple(slice(int(found[0]), int(found[-1]) + 1) for found in inside)


def key_place(mask: np.ndarray) -> tuple[int, int, int]:
    """(depth, height, width): the middle of a mask in the slice where it is largest."""
    level = int(np.argmax([np.count_nonzero(plane) for plane in mask]))
    rows, columns = np.nonzero(mask[level])
    return level, int(rows.mean()), int(columns.mean())


def in_patient(volume: CTVolume, place: Sequence[float]) -> list[float]:
    """RAS mm of a voxel (depth, height, width)."""
    return [round(float(mm), 2) for mm in (volume.affine @ [*place[::-1], 1.0])[:3]]


def _midline(volume: CTVolume) -> float:
    """The middle of the patient along the width, in voxels."""
    columns = (volume.hu[::4, ::4] > -400).sum(axis=(0, 1))
    return float(columns @ np.arange(len(columns)) / columns.sum()) if columns.any() else (len(columns) - 1) / 2


def _side(columns: np.ndarray, start: int, middle: float) -> str:
    """Where voxels lie, counted by column from `start` on: the patient's left is where columns are higher."""
    left = float(columns[np.arange(start, start + len(columns)) > middle].sum() / columns.sum())
    return "left" if left >= _ONE_SIDE else "right" if left <= 1 - _ONE_SIDE else "both"


__all__ = [
    "SIDES",
    "WALLS",
    "axial_diameters",
    "box_of",
    "components",
    "cut_off",
    "diameter_lines",
    "in_patient",
    "key_place",
    "measure",
    "measure_finding",
    "organs_of",
    "stored",
]
