"""Any resolution: the best canvas, rows and tokens, nothing lost, the way back."""

from __future__ import annotations

import itertools
import math

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from repository import shared
from scans import AXIS_ORDERS

from ctinstruct_hf import CTInstructError, CTInstructImageProcessor, read_volume
from ctinstruct_hf.processing.any_resolution import (
    axis_positions,
    choose_grid,
    fit_to_canvas,
    labels_on_canvas,
    mask_from_canvas,
    place_on_canvas,
    released_size,
    resized_slices,
)

SHAPES = st.tuples(st.integers(1, 70), st.integers(4, 120), st.integers(4, 120))
PATCHES = st.tuples(st.integers(1, 16), st.sampled_from([32, 64]), st.sampled_from([32, 64, 96]))
MOST = st.integers(1, 8)


@settings(max_examples=150, deadline=None)
@given(SHAPES, PATCHES, MOST)
def test_the_chosen_canvas_is_the_best_by_brute_force(shape, patch, most) -> None:
    def score(grid: tuple[int, int, int]) -> tuple[int, int]:
        canvas = [count * side for count, side in zip(grid, patch, strict=True)]
        scale = min(side / length for side, length in zip(canvas, shape, strict=True))
        kept = min(math.prod(int(length * scale) for length in shape), math.prod(shape))
        return kept, kept - math.prod(canvas)

    grids = [grid for grid in itertools.product(range(1, most + 1), repeat=3) if math.prod(grid) <= most]
    assert score(choose_grid(shape, patch, most)) == max(score(grid) for grid in grids)


@settings(max_examples=100, deadline=None)
@given(SHAPES, PATCHES, MOST, st.sampled_from(["aspect", "released"]))
def test_rows_masks_and_offsets_fit_together(shape, patch, most, fit_name) -> None:
    fit = fit_to_canvas(shape, patch, most, fit_name)
    box = torch.ones(shape)
    rows = place_on_canvas(box, fit, fill=-7.0)
    assert rows.shape == (fit.rows, *fit.patch[1:])
    inside = rows > 0.5
    assert int(inside.sum()) == math.prod(fit.resized)  # no voxel of the resized volume is lost
    assert torch.equal(inside.flatten(1).any(1), fit.slice_mask().flatten())
    assert all(length <= side for length, side in zip(fit.resized, fit.canvas, strict=True))
    assert any(length == side for length, side in zip(fit.resized, fit.canvas, strict=True))
    if shape[0] == 1:
        assert fit.patch[0] == 1
        assert fit.grid[0] == 1


@settings(max_examples=60, deadline=None)
@given(SHAPES, PATCHES, MOST, st.sampled_from(["aspect", "released"]), st.integers(0, 2**31))
def test_the_inverse_undoes_the_resize_within_a_voxel(shape, patch, most, fit_name, seed) -> None:
    """A ramp along each axis comes back within one voxel of the coarser of the two grids."""
    fit = fit_to_canvas(shape, patch, most, fit_name)
    axis = seed % 3
    ramp = torch.arange(shape[axis], dtype=torch.float32)
    volume = ramp.view([-1 if other == axis else 1 for other in range(3)]).expand(shape)
    rows = place_on_canvas(volume.contiguous(), fit, fill=0.0)
    canvas = rows.view(*fit.grid, *fit.patch).permute(0, 3, 1, 4, 2, 5).reshape(fit.canvas)
    step = max(1.0, fit.size[axis] / fit.resized[axis])
    middle = shape[axis] / 2
    back = mask_from_canvas(canvas, fit, threshold=middle)
    wrong = back != (volume > middle)
    assert not bool((wrong & ((volume - middle).abs() > step)).any())


@given(st.integers(1, 200), st.integers(1, 200), st.booleans())
def test_positions_stay_inside_and_ascend(source, target, corners) -> None:
    positions = axis_positions(source, target, corners)
    assert float(positions.min()) >= 0
    assert float(positions.max()) <= source - 1 + 1e-9
    assert bool((positions.diff() >= 0).all())


def _release(height: int, width: int, depth: int, canvas: tuple[int, int, int]) -> tuple[int, int, int]:
    """The release's resize as it is written there, in its order (height, width, depth)."""
    first, second, third = canvas[0] / height, canvas[1] / width, canvas[2] / depth
    if first < second and first < third:
        return canvas[0], min(math.ceil(width * first), canvas[1]), min(math.ceil(depth * first), canvas[2])
    if second < first and second < third:
        return min(math.ceil(height * second), canvas[0]), canvas[1], min(math.ceil(depth * first), canvas[2])
    return min(math.ceil(height * third), canvas[0]), min(math.ceil(width * third), canvas[1]), canvas[2]


def test_the_releases_resize_is_repeated_with_its_slips() -> None:
    assert released_size((10, 57, 100), (32, 256, 256)) == (32, 146, 256)  # the second in-plane axis limits
    assert released_size((10, 100, 57), (32, 256, 256)) == (26, 256, 146)  # the first does
    assert released_size((10, 100, 100), (64, 256, 256)) == (64, 256, 256)  # neither strictly: stretched
    assert released_size((100, 80, 90), (32, 256, 256)) == (32, 26, 29)  # depth does
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(2000):
        depth, height, width = (int(side) for side in rng.integers(1, (400, 700, 700)))
        grid = choose_grid((depth, height, width), (32, 256, 256), 6)
        canvas = (grid[0] * 32, grid[1] * 256, grid[2] * 256)
        scales = [side / length for side, length in zip(canvas, (depth, height, width), strict=True)]
        seen.add(int(np.argmin(scales)))
        expected = _release(height, width, depth, (canvas[1], canvas[2], canvas[0]))
        assert released_size((depth, height, width), canvas) == (expected[2], expected[0], expected[1])
    assert seen == {0, 1, 2}


@pytest.mark.parametrize("size", [(1, 6, 5), (6, 1, 5), (6, 5, 1)])
def test_every_axis_order_of_a_scan_reaches_torch_even_with_axes_of_one_voxel(size: tuple[int, int, int]) -> None:
    processor = CTInstructImageProcessor(patch_size={"depth": 4, "height": 32, "width": 32}, max_patches=1)
    values = np.arange(math.prod(size), dtype=np.int16).reshape(size) - 500
    for codes in AXIS_ORDERS:
        affine = nib.orientations.inv_ornt_aff(nib.orientations.axcodes2ornt(codes), size)
        image = SimpleITK.GetImageFromArray(np.ascontiguousarray(values.transpose(2, 1, 0)))
        image.SetDirection((np.diag([-1, -1, 1]) @ np.linalg.inv(affine[:3, :3])).ravel())
        for scan in (nib.Nifti1Image(values, np.linalg.inv(affine)), image):
            volume = read_volume(scan)
            assert processor(volume, return_tensors="pt")["pixel_values"].shape[1:] == (32, 32)
            labels = processor.labels_to_canvas(volume.hu >= 0, volume)
            assert processor.mask_from_canvas(labels.float(), volume).shape == volume.shape


@pytest.mark.parametrize("intensity", ["window", "zscore", "unit"])
def test_patches_hold_the_volume_in_the_order_of_the_grid(intensity: str) -> None:
    hu = np.random.default_rng(0).integers(-1000, 1000, (8, 64, 96)).astype(np.int16)
    hu[0, 0, 0] = hu[-1, -1, -1] = 900  # the foreground is everything
    processor = CTInstructImageProcessor(
        patch_size={"depth": 4, "height": 32, "width": 32}, max_patches=12, intensity=intensity
    )
    batch = processor(hu, spacing=(1, 1, 1), return_tensors="pt")
    assert batch["patch_grid"].tolist() == [[2, 2, 3, 4]]
    patches = batch["pixel_values"].view(2, 2, 3, 4, 32, 32)
    low, high, middle, half = processor.scale_of(hu, intensity, processor.hu_window)
    expected = (torch.from_numpy(hu).float().clamp(low, high) - middle) / half
    for z, y, x in itertools.product(range(2), range(2), range(3)):
        part = expected[4 * z : 4 * z + 4, 32 * y : 32 * y + 32, 32 * x : 32 * x + 32]
        torch.testing.assert_close(patches[z, y, x], part, atol=1e-5, rtol=1e-5)


def test_histogram_percentiles_equal_numpys() -> None:
    from ctinstruct_hf.processing.image_processing_ctinstruct import released_statistics

    hu = np.random.default_rng(0).normal(0, 700, (9, 31, 17)).astype(np.int16)
    low, high, mean, deviation = released_statistics(hu)
    assert (low, high) == pytest.approx(tuple(np.percentile(hu, (0.5, 99.5))))
    clipped = np.clip(hu, low, high)
    assert mean == pytest.approx(clipped.mean(), abs=1e-6)
    assert deviation == pytest.approx(clipped.std(), abs=1e-6)


def test_target_spacing_changes_the_fit_and_comes_back() -> None:
    volume = read_volume(np.zeros((20, 64, 64), np.int16), spacing=(4.0, 1.0, 1.0))
    processor = CTInstructImageProcessor(
        patch_size={"depth": 16, "height": 64, "width": 64}, max_patches=8, target_spacing=[2.0, 1.0, 1.0]
    )
    fit = processor.fit_of(volume)
    assert fit.resized[0] == 40
    assert processor.mask_from_canvas(torch.ones(fit.canvas), volume).shape == (20, 64, 64)


def test_labels_lie_where_the_voxels_lie() -> None:
    processor = CTInstructImageProcessor(patch_size={"depth": 8, "height": 64, "width": 64}, max_patches=4)
    hu = np.full((10, 50, 40), -1000, np.int16)
    hu[2:7, 10:30, 5:25] = 1000
    volume = read_volume(hu, spacing=(1, 1, 1))
    labels = processor.labels_to_canvas((hu > 0).astype(np.uint8), volume)
    rows, fit = processor.prepare(volume)
    canvas = rows.view(*fit.grid, *fit.patch).permute(0, 3, 1, 4, 2, 5).reshape(fit.canvas)
    inside = labels >= 0
    assert float(((canvas > 0) != (labels == 1))[inside].float().mean()) < 0.02
    assert bool((canvas[~inside] == -1).all())
    back = processor.mask_from_canvas(labels.float() - 0.5, volume)
    truth = hu > 0
    assert 2 * (back & truth).sum() / (back.sum() + truth.sum()) > 0.95


def test_the_true_liver_survives_the_canvas() -> None:
    """shared/data/abdomen through the default canvas and back: Dice at least 0.97 against itself."""
    volume = read_volume(shared("data/abdomen/ct.nii.gz"))
    labels = nib.load(shared("data/abdomen/labels.nii.gz"))
    liver = volume.from_file_axes(np.asarray(labels.dataobj) == 5)
    processor = CTInstructImageProcessor()
    canvas = processor.labels_to_canvas(liver.astype(np.uint8), volume)
    back = np.asarray(volume.to_source(processor.mask_from_canvas(canvas.clamp(min=0).float() - 0.5, volume)).dataobj)
    truth = np.asarray(labels.dataobj) == 5
    assert back.shape == truth.shape
    assert 2 * ((back > 0) & truth).sum() / ((back > 0).sum() + truth.sum()) >= 0.97


@pytest.mark.parametrize("size", [(13, 20, 31), (6, 40, 31), (5, 17, 12), (50, 20, 12), (30, 64, 64), (1, 7, 5)])
def test_antialiased_resize_is_that_of_torch_along_every_axis(size: tuple[int, int, int]) -> None:
    volume = torch.randn(30, 40, 31, generator=torch.Generator().manual_seed(0))

    def resize(stack: torch.Tensor, height: int, width: int) -> torch.Tensor:
        return F.interpolate(stack[:, None], size=(height, width), mode="bilinear", antialias=True)[:, 0]

    in_plane = resize(volume, *size[1:])
    wanted = resize(in_plane.permute(1, 0, 2), size[0], size[2]).permute(1, 0, 2)
    for chunk in (1, 4, 64):
        made = torch.cat([slices for _, slices in resized_slices(volume, size, chunk=chunk, antialias=True)])
        assert torch.allclose(made, wanted, atol=2e-6)


def test_thin_slices_with_noise_come_to_the_canvas_as_thick_ones() -> None:
    """The same body in slices of 1 mm and as their means of 5 mm: antialiased, the canvas hardly tells them apart."""
    rng = np.random.default_rng(0)
    body = np.linspace(-200, 200, 80)[:, None, None] + np.linspace(0, 100, 64)[None, :, None] + np.zeros((80, 64, 64))
    thin = body + rng.normal(0, 40, body.shape)
    settings = {"patch_size": {"depth": 16, "height": 32, "width": 32}, "max_patches": 1, "target_spacing": [5, 2, 2]}
    differ = {}
    for antialias in (False, True):
        processor = CTInstructImageProcessor(**settings, antialias=antialias)
        scans = [(thin, (1.0, 1.0, 1.0)), (thin.reshape(16, 5, 64, 64).mean(1), (5.0, 1.0, 1.0))]
        from_thin, from_thick = (
            processor.prepare(read_volume(np.rint(hu).astype(np.int16), spacing=mm))[0] for hu, mm in scans
        )
        assert from_thin.shape == (16, 32, 32)
        differ[antialias] = float((from_thin - from_thick)[1:-1].std() * 1000)  # HU
    assert differ[True] < 0.45 * differ[False]
    assert differ[True] < 6


def test_a_mask_under_the_floor_of_its_structure_is_left_empty() -> None:
    """Floors count mL of the scan, whatever its voxels and the canvas, and padding does not count."""
    for spacing in ((4.0, 2.0, 2.0), (2.0, 2.0, 4.0)):
        volume = read_volume(np.zeros((10, 50, 40), np.int16), spacing=spacing)  # 320 mL
        processor = CTInstructImageProcessor(
            patch_size={"depth": 16, "height": 64, "width": 64},
            max_patches=8,
            target_spacing=[2.0, 2.0, 2.0],
            mask_floors={"stone": [80.0, 2.0]},
        )
        fit = processor.fit_of(volume)
        logits = torch.full(fit.canvas, 9.0)
        inside = tuple(slice(first, first + size) for first, size in zip(fit.offset, fit.resized, strict=True))
        logits[inside] = -1.0
        assert processor.volume_above(logits, volume, 2.0) == 0
        logits[inside][: fit.resized[0] // 5] = 3.0
        part = fit.resized[0] // 5 / fit.resized[0]
        assert processor.volume_above(logits, volume, 2.0) == pytest.approx(320 * part)
        assert processor.mask_from_canvas(logits, volume).any()
        assert processor.mask_from_canvas(logits, volume, name="liver").any()
        assert not processor.mask_from_canvas(logits, volume, name="stone").any()
        logits[inside][: fit.resized[0] * 2 // 5] = 3.0
        assert processor.mask_from_canvas(logits, volume, name="stone").any()
        logits[inside] = 1.9  # all of it, but nowhere surely
        assert not processor.mask_from_canvas(logits, volume, name="stone").any()


def test_settings_that_make_no_sense_are_refused() -> None:
    for bad in (
        {"fit": "stretch"},
        {"intensity": "log"},
        {"patch_size": {"depth": 4, "height": 33, "width": 32}},
        {"max_patches": 0},
        {"hu_window": [10, -10]},
        {"antialias": True, "fit": "released"},
        {"mask_floors": {"stone": [1.0]}},
    ):
        with pytest.raises(CTInstructError):
            CTInstructImageProcessor(**bad)
    with pytest.raises(CTInstructError, match="3 entries for 2"):
        CTInstructImageProcessor()([np.zeros((2, 8, 8))] * 2, spacing=[(1, 1, 1)] * 3)


def test_released_settings_see_a_file_in_its_own_axes(tmp_path) -> None:
    stored = np.random.default_rng(0).integers(1, 900, (40, 30, 8)).astype(np.int16)
    nib.save(nib.Nifti1Image(stored, np.diag([1, -1, 1, 1])), tmp_path / "scan.nii")
    processor = CTInstructImageProcessor(
        patch_size={"depth": 8, "height": 32, "width": 32}, axes="file", fit="released", intensity="unit"
    )
    volume = processor.read(tmp_path / "scan.nii")
    assert np.array_equal(processor.model_axes(volume), stored.transpose(2, 0, 1))
    labels = np.zeros(volume.shape, np.uint8)
    labels[:, :10] = 1
    back = processor.mask_from_canvas(processor.labels_to_canvas(labels, volume).float() - 0.5, volume)
    assert back.shape == volume.shape
    assert 2 * (back & (labels > 0)).sum() / (back.sum() + labels.sum()) > 0.9


def test_labels_of_the_canvas_use_nearest_voxels() -> None:
    fit = fit_to_canvas((4, 32, 32), (4, 32, 32), 1)
    labels = torch.randint(0, 2, (4, 32, 32))
    assert torch.equal(labels_on_canvas(labels, fit), labels.to(torch.int8))
