"""Any resolution: a volume of any size on a canvas of whole patches, and logits from the canvas back (section 3.2).

All sizes are in the volume's axes (depth, height, width); patches lie along them as Z, Y, X.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F

Size = tuple[int, int, int]


class Slices(Protocol):
    """A volume [D, H, W] of which slices are taken: a tensor, or what makes them when they are asked for."""

    @property
    def shape(self) -> torch.Size: ...

    def __getitem__(self, index: Any) -> torch.Tensor: ...


@dataclass(frozen=True)
class CanvasFit:
    """The fit of a volume to its canvas.

    Attributes:
        volume: (depth, height, width) voxels of the volume.
        start, size: the box of the volume that is fitted; all of it unless it was cropped to its foreground.
        resized: the box after the resize.
        offset: first voxel of the resized box on the canvas.
        patch: (depth, height, width) voxels of a patch.
        grid: patches (Z, Y, X) along depth, height and width.
        corners: resize between the centres of the corner voxels (the release) instead of between their outer faces.
        antialias: a voxel that is larger than those of the volume is a weighted mean of all that it covers, instead of the
            two nearest along each axis.
    """

    volume: Size
    start: Size
    size: Size
    resized: Size
    offset: Size
    patch: Size
    grid: Size
    corners: bool = False
    antialias: bool = False

    @property
    def canvas(self) -> Size:
        """(depth, height, width) voxels of the canvas."""
        return tuple(count * side for count, side in zip(self.grid, self.patch, strict=True))  # type: ignore[return-value]

    @property
    def rows(self) -> int:
        """Slices of all patches: rows of `pixel_values`, and image tokens."""
        return math.prod(self.grid) * self.patch[0]

    def voxel_volume(self, spacing: Sequence[float]) -> float:
        """mL of a voxel of the canvas, from the volume's mm (depth, height, width)."""
        return math.prod(spacing) * math.prod(self.size) / math.prod(self.resized) / 1000

    def slice_mask(self) -> torch.Tensor:
        """bool [Z, Y, X, S], False where a slice of a patch holds nothing of the volume."""
        masks = []
        for axis in range(3):
            voxels = torch.arange(self.canvas[axis]).view(self.grid[axis], self.patch[axis])
            inside = (voxels >= self.offset[axis]) & (voxels < self.offset[axis] + self.resized[axis])
            masks.append(inside if axis == 0 else inside.any(1))
        depth, height, width = masks
        return depth[:, None, None, :] & height[None, :, None, None] & width[None, None, :, None]


@lru_cache(maxsize=256)
def choose_grid(shape: Size, patch: Size, max_patches: int) -> Size:
    """Patches (Z, Y, X) of the best canvas: it keeps most voxels after an aspect-preserving resize, then wastes least.

    Args:
        shape: (depth, height, width) of the volume.
        patch: the same of a patch.
        max_patches: the most patches a canvas may have.
    """
    best: tuple[int, int] | None = None
    chosen = (1, 1, 1)
    for y in range(1, max_patches + 1):
        for x in range(1, max_patches // y + 1):
            for z in range(1, max_patches // (y * x) + 1):
                canvas = (z * patch[0], y * patch[1], x * patch[2])
                scale = min(side / length for side, length in zip(canvas, shape, strict=True))
                kept = min(math.prod(int(length * scale) for length in shape), math.prod(shape))
                score = (kept, kept - math.prod(canvas))
                if best is None or score > best:
                    best, chosen = score, (z, y, x)
    return chosen


def fit_to_canvas(
    volume: Size,
    patch: Size,
    max_patches: int,
    fit: str = "aspect",
    box: tuple[Size, Size] | None = None,
    zoom: tuple[float, float, float] = (1.0, 1.0, 1.0),
    antialias: bool = False,
) -> CanvasFit:
    """Choose the canvas of a volume and lay it in the middle.

    Args:
        volume: (depth, height, width) voxels. A single slice gets patches of depth 1.
        patch, max_patches: see `choose_grid`.
        fit: `aspect` scales all axes alike; `released` repeats the released code, which stretches square volumes.
        box: (start, size) of the part to fit; all by default.
        zoom: voxels after a change of spacing per voxel before, along each axis; all 1 for the stored spacing.
        antialias: see `CanvasFit`.
    """
    start, size = box or ((0, 0, 0), volume)
    if volume[0] == 1:
        patch = (1, patch[1], patch[2])
    shape: Size = tuple(max(1, round(length * factor)) for length, factor in zip(size, zoom, strict=True))  # type: ignore[assignment]
    grid = choose_grid(shape, patch, max_patches)
    canvas = tuple(count * side for count, side in zip(grid, patch, strict=True))
    resized = (released_size if fit == "released" else aspect_size)(shape, canvas)  # type: ignore[arg-type]
    offset = tuple((side - length) // 2 for side, length in zip(canvas, resized, strict=True))
    return CanvasFit(volume, start, size, resized, offset, patch, grid, fit == "released", antialias)  # type: ignore[arg-type]


def aspect_size(shape: Size, canvas: Size) -> Size:
    """The largest size on the canvas with the shape's aspect; the axis that limits it fills the canvas exactly."""
    scale = min(side / length for side, length in zip(canvas, shape, strict=True))
    return tuple(  # type: ignore[return-value]
        min(side, max(1, round(length * scale))) for side, length in zip(canvas, shape, strict=True)
    )


def released_size(shape: Size, canvas: Size) -> Size:
    """The released code's size, slips included; every axis is rounded up and cut at the canvas.

    Where the width's scale is strictly the smallest, the depth takes the height's scale instead; where no in-plane
    scale is strictly the smallest, all axes take the depth's, which stretches square volumes.
    """
    depth, height, width = (side / length for side, length in zip(canvas, shape, strict=True))
    scales, limiting = (depth, depth, depth), 0
    if height < width and height < depth:
        scales, limiting = (height, height, height), 1
    elif width < height and width < depth:
        scales, limiting = (height, width, width), 2
    sizes = [min(math.ceil(length * scale), side) for side, length, scale in zip(canvas, shape, scales, strict=True)]
    sizes[limiting] = canvas[limiting]
    return tuple(sizes)  # type: ignore[return-value]


def axis_positions(source: int, target: int, corners: bool) -> torch.Tensor:
    """Positions of the target's cells on the source's axis, in source cells: float64 [target]."""
    cells = torch.arange(target, dtype=torch.float64)
    if corners:
        return cells * ((source - 1) / max(target - 1, 1))
    return ((cells + 0.5) * (source / target) - 0.5).clamp(0, source - 1)


def axis_weights(
    source: int, target: int, corners: bool = False, antialias: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Linear resampling along an axis: for each target cell the source cells and their weights, int64 and float32
    [target, cells].

    With `antialias` a target cell larger than a source cell takes all source cells in its reach, with a triangular weight
    (as `torch.nn.functional.interpolate` does in a plane).
    """
    if antialias and target < source:
        width = source / target
        centres = (torch.arange(target, dtype=torch.float64) + 0.5)[:, None] * width
        cells = (centres - width + 0.5).floor() + torch.arange(math.ceil(2 * width) + 1)
        weights = (1 - (cells + 0.5 - centres).abs() / width).clamp(min=0)
        weights[(cells < 0) | (cells >= source)] = 0
        return cells.long().clamp(0, source - 1), (weights / weights.sum(1, keepdim=True)).float()
    positions = axis_positions(source, target, corners)
    lower = positions.floor().long().clamp(max=source - 1)
    upper = (lower + 1).clamp(max=source - 1)
    return torch.stack([lower, upper], 1), torch.stack([1 - (positions - lower), positions - lower], 1).float()


def resized_slices(
    volume: Slices, size: Size, corners: bool = False, chunk: int = 4, antialias: bool = False
) -> Iterator[tuple[int, torch.Tensor]]:
    """Trilinear resize, a few slices at a time, so that nothing of the volume's size is made.

    Args:
        volume: [D, H, W], any dtype.
        size: the new (depth, height, width).
        corners, antialias: see `CanvasFit`.
        chunk: new slices per step.

    Yields:
        (first new slice, float32 [n, height, width]).
    """
    cells, weights = axis_weights(volume.shape[0], size[0], corners, antialias)
    shares = weights / weights.cumsum(1).clamp(min=1e-12)  # of a cell beside all before it
    in_plane: dict[int, torch.Tensor] = {}
    for first in range(0, size[0], chunk):
        last = min(first + chunk, size[0])
        needed = sorted(set(cells[first:last][weights[first:last] > 0].tolist()) | set(cells[first:last, 0].tolist()))
        fresh = [index for index in needed if index not in in_plane]
        for old in [index for index in in_plane if index < needed[0]]:
            del in_plane[old]
        if fresh:
            stack = (
                volume[fresh].float()
                if len(fresh) != fresh[-1] - fresh[0] + 1
                else volume[fresh[0] : fresh[-1] + 1].float()
            )
            if stack.shape[1:] != size[1:]:
                stack = F.interpolate(
                    stack[:, None], size=size[1:], mode="bilinear", align_corners=corners, antialias=antialias
                )[:, 0]
            in_plane.update(zip(fresh, stack, strict=True))
        slices = torch.stack([in_plane[index] for index in cells[first:last, 0].tolist()])
        for column in range(1, cells.shape[1]):
            share = shares[first:last, column]
            if bool((share > 0).any()):
                # a cell of weight 0 may be missing: any slice stands in for it
                others = [in_plane.get(index, slices[0]) for index in cells[first:last, column].tolist()]
                slices.lerp_(torch.stack(others), share[:, None, None])
        yield first, slices


def place_on_canvas(box: Slices, fit: CanvasFit, fill: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The fitted box resized (linear) onto its canvas, cut into patches.

    Args:
        box: [D, H, W] the part of the volume that `fit.start` and `fit.size` name.
        fit: where it goes.
        fill: the value of padding.

    Returns:
        [N, patch height, patch width]: slices of patches in the order of `pixel_values`.
    """
    (z, y, x), (s, h, w) = fit.grid, fit.patch
    patches = torch.full((z, y, x, s, h, w), fill, dtype=dtype)
    for first, slices in resized_slices(box, fit.resized, fit.corners, antialias=fit.antialias):
        write_slices(patches, slices, first + fit.offset[0], fit)
    return patches.view(-1, h, w)


def write_slices(patches: torch.Tensor, slices: torch.Tensor, depth: int, fit: CanvasFit) -> None:
    """Write [n, height, width] at canvas depth `depth` into patches [Z, Y, X, S, h, w]."""
    (_, rows, columns), (s, h, w) = fit.grid, fit.patch
    _, top, left = fit.offset
    for index, image in enumerate(slices):
        plane, layer = divmod(depth + index, s)
        for row in range(rows):
            up, down = max(top, row * h), min(top + image.shape[0], (row + 1) * h)
            for column in range(columns):
                near, far = max(left, column * w), min(left + image.shape[1], (column + 1) * w)
                if up < down and near < far:
                    patches[
                        plane, row, column, layer, up - row * h : down - row * h, near - column * w : far - column * w
                    ] = image[up - top : down - top, near - left : far - left]


def labels_on_canvas(labels: torch.Tensor, fit: CanvasFit) -> torch.Tensor:
    """A label volume on the canvas, nearest voxel, −1 where the canvas is padding: int8 [D, H, W]."""
    canvas = torch.full(fit.canvas, -1, dtype=torch.int8)
    index = []
    for axis in range(3):
        positions = axis_positions(fit.size[axis], fit.resized[axis], fit.corners)
        index.append((positions + 0.5).floor().long().clamp(max=fit.size[axis] - 1) + fit.start[axis])
    picked = labels[index[0]][:, index[1]][:, :, index[2]].to(torch.int8)
    logits_inside(canvas, fit).copy_(picked)
    return canvas


def logits_inside(logits: torch.Tensor, fit: CanvasFit) -> torch.Tensor:
    """The part of the canvas [..., D, H, W] that is the volume and not padding, a view."""
    depth, height, width = (slice(first, first + length) for first, length in zip(fit.offset, fit.resized, strict=True))
    return logits[..., depth, height, width]


def mask_from_canvas(logits: torch.Tensor, fit: CanvasFit, threshold: float = 0.0) -> torch.Tensor:
    """Canvas logits [D, H, W] back on the volume's grid, linear, above the threshold: bool (depth, height, width)."""
    inside = logits_inside(logits, fit).float()
    mask = torch.zeros(fit.volume, dtype=torch.bool)
    if not bool((inside > threshold).any()):
        return mask
    start, size = fit.start, fit.size
    box = mask[start[0] : start[0] + size[0], start[1] : start[1] + size[1], start[2] : start[2] + size[2]]
    for first, slices in resized_slices(inside, size, fit.corners):
        box[first : first + len(slices)] = (slices > threshold).cpu()
    return mask
