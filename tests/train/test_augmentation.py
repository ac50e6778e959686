"""Scans and their masks are changed together, and only by what a patient's scan may differ in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ctinstruct_hf import CTInstructError
from ctinstruct_hf.train.augmentation import Augmentation, to_canvas, to_rows

GRID = [2, 1, 2, 4]  # patches along depth, height, width, and slices of a patch: a canvas of 8 x 32 x 64


def scan() -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """Two bright blocks, on the left and on the right, and their masks; the last two slices are padding."""
    canvas = torch.full((8, 32, 64), -1.0)
    masks = [torch.zeros((8, 32, 64), dtype=torch.int8) for _ in range(2)]
    for mask, columns in zip(masks, (slice(8, 24), slice(40, 56)), strict=True):
        canvas[1:5, 8:24, columns] = 0.4
        mask[1:5, 8:24, columns] = 1
        mask[6:] = -1
    kept = torch.ones(2 * 1 * 2 * 4, dtype=torch.bool).unflatten(0, (2, 2, 4))
    kept[1, :, 2:] = False
    rows = to_rows(canvas, GRID).half()
    return {"pixel_values": rows, "patch_grid": torch.tensor([GRID]), "slice_mask": kept.flatten()}, masks


STILL = dict.fromkeys(("turn", "scale", "shift", "contrast", "brightness", "noise", "blur"), 0.0)


def test_canvas_and_rows_are_inverse() -> None:
    prepared, _ = scan()
    rows = prepared["pixel_values"]
    canvas = to_canvas(rows, GRID)
    assert canvas.shape == (8, 32, 64)
    assert torch.equal(to_rows(canvas, GRID), rows)
    assert float(canvas[2, 10, 45]) == pytest.approx(0.4, abs=1e-3)


@pytest.mark.parametrize("change", [{"turn": 30.0}, {"scale": 0.3}, {"shift": 0.2}, {}])
def test_masks_go_with_their_scan_and_left_stays_left(change: dict[str, float]) -> None:
    prepared, masks = scan()
    before = prepared["pixel_values"].clone()
    changed = Augmentation(share=1.0, **{**STILL, **change})
    for seed in range(8):
        new, moved = changed(prepared, masks, np.random.default_rng(seed))
        canvas = to_canvas(new["pixel_values"].float(), GRID)
        bright = canvas > -0.3
        marked = (moved[0] > 0) | (moved[1] > 0)
        overlap = 2 * (bright & marked).sum() / (bright.sum() + marked.sum())
        assert overlap > 0.9
        columns = [(mask > 0).nonzero()[:, 2].float().mean() for mask in moved]
        assert columns[0] < columns[1]
        assert all(set(mask.unique().tolist()) <= {-1, 0, 1} and mask.dtype == torch.int8 for mask in moved)
        assert bool((moved[0][canvas == -1] < 1).all())
    assert torch.equal(prepared["pixel_values"], before)
    if not change:
        assert torch.equal(moved[0], masks[0])


def test_what_comes_from_outside_is_air_that_no_mask_counts() -> None:
    prepared, masks = scan()
    new, moved = Augmentation(share=1.0, **{**STILL, "shift": 0.5})(prepared, masks, np.random.default_rng(3))
    outside = moved[0] < 0
    assert outside.sum() > (masks[0] < 0).sum()
    assert float(to_canvas(new["pixel_values"].float(), GRID)[outside].max()) == -1.0


@pytest.mark.parametrize(("slices", "depths"), [(2, [1, 2]), (4, [1, 4]), (5, [1, 4]), (30, [2, 4])])
def test_a_sample_is_some_neighbouring_slices_with_their_masks(slices: int, depths: list[int]) -> None:
    prepared, masks = scan()
    canvas = to_canvas(prepared["pixel_values"], GRID)
    starts = set()
    for seed in range(12):
        new, moved = Augmentation(**{**STILL, "share": 0.0, "slices": slices})(
            prepared, masks, np.random.default_rng(seed)
        )
        grid = new["patch_grid"][0].tolist()
        assert grid == [depths[0], 1, 2, depths[1]]
        assert len(new["pixel_values"]) == len(new["slice_mask"]) == np.prod(grid)
        count = depths[0] * depths[1]
        part = to_canvas(new["pixel_values"], grid)
        (start,) = [
            start
            for start in range(8 - count + 1)
            if torch.equal(canvas[start : start + count], part)
            and torch.equal(masks[0][start : start + count], moved[0])
        ][:1]
        assert torch.equal(masks[1][start : start + count], moved[1])
        assert new["slice_mask"].any()
        starts.add(start)
    assert len(starts) > 1 or slices == 30


def test_hu_change_and_masks_do_not() -> None:
    prepared, masks = scan()
    change = {"contrast": 0.2, "brightness": 50.0, "noise": 30.0, "blur": 1.0}
    new, moved = Augmentation(share=1.0, **{**STILL, **change})(prepared, masks, np.random.default_rng(0))
    assert all(torch.equal(one, other) for one, other in zip(moved, masks, strict=True))
    assert not torch.equal(new["pixel_values"], prepared["pixel_values"])
    assert float(new["pixel_values"].min()) >= -1
    assert float(new["pixel_values"].max()) <= 0.4 + 1e-3


def test_the_same_draw_gives_the_same_sample_and_a_share_stays_as_it_is() -> None:
    prepared, masks = scan()
    one, two = (Augmentation()(prepared, masks, np.random.default_rng(5))[0]["pixel_values"] for _ in range(2))
    assert torch.equal(one, two)
    same, _ = Augmentation(share=0.0)(prepared, masks, np.random.default_rng(5))
    assert torch.equal(same["pixel_values"], prepared["pixel_values"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mirror": True}, "augmentation has unknown mirror: known are share, turn"),
        ({"share": 2}, "augmentation: share is 2: give a number from 0 to 1"),
        ({"slices": 2.5}, "augmentation: slices is 2.5: give a whole number from 0"),
        ({"noise": "loud"}, "augmentation: noise is 'loud': give a number from 0"),
        (3, "augmentation is 3: write true"),
    ],
)
def test_settings_are_checked(settings: Any, words: str) -> None:
    with pytest.raises(CTInstructError, match=words):
        Augmentation.of(settings)
