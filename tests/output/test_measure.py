"""What a mask of a finding measures: diameters, components, side, organ."""

from __future__ import annotations

import numpy as np
import pytest

from ctinstruct_hf import CTVolume, read_volume
from ctinstruct_hf.output.measure import axial_diameters, components, diameter_lines, measure_finding, organs_of

SPACING = (5.0, 1.0, 0.5)


def scan(shape: tuple[int, int, int] = (20, 60, 120)) -> CTVolume:
    """A body of water in air."""
    hu = np.full(shape, -1000, np.int16)
    hu[:, 5:-5, 10:-10] = 0
    return read_volume(hu, spacing=SPACING)


def ball(centre: tuple[int, int, int], radius: float, shape: tuple[int, int, int] = (20, 60, 120)) -> np.ndarray:
    """Voxels within so many mm."""
    apart = [(axis - c) * mm for axis, c, mm in zip(np.indices(shape), centre, SPACING, strict=True)]
    return sum(one**2 for one in apart) <= radius**2


@pytest.mark.parametrize("turn", [0, 20, 45, 70, 90, 135])
def test_diameters_of_an_ellipse_whichever_way_it_lies(turn: float) -> None:
    mask = np.zeros((3, 120, 240), bool)
    y, x = (np.indices((120, 240)) - np.array([60, 120])[:, None, None]) * np.array([1.0, 0.5])[:, None, None]
    along = x * np.cos(np.radians(turn)) + y * np.sin(np.radians(turn))
    across = y * np.cos(np.radians(turn)) - x * np.sin(np.radians(turn))
    mask[1] = (along / 20) ** 2 + (across / 10) ** 2 <= 1
    mask[2] = mask[1] & (abs(along) < 5)  # a smaller slice
    longest, perpendicular = axial_diameters(mask, SPACING)
    assert longest == pytest.approx(40, abs=1)
    assert perpendicular == pytest.approx(20, abs=1.2)


def test_a_row_of_voxels_is_as_long_as_it_is() -> None:
    mask = np.zeros((2, 4, 9), bool)
    mask[1, 2, 3:7] = True
    assert axial_diameters(mask, SPACING) == pytest.approx((2.0, 1.0))


def test_parts_are_counted_without_specks_and_gaps_of_a_voxel() -> None:
    mask = ball((5, 20, 30), 8) | ball((15, 40, 90), 10)
    mask[10, 30, 60] = True  # a speck
    mask[15, 40] = False  # a gap
    (first, large), (second, small) = components(mask, SPACING)
    assert large.sum() + small.sum() + 1 == mask.sum()
    assert large.sum() > small.sum()
    assert mask[tuple(slice(f, f + n) for f, n in zip(first, large.shape, strict=True))][large].all()
    assert mask[tuple(slice(f, f + n) for f, n in zip(second, small.shape, strict=True))][small].all()


def test_a_finding_is_measured_with_its_side_place_and_organ() -> None:
    volume = scan()
    mask = ball((8, 20, 90), 9)
    volume.hu[mask] = 40
    volume.hu[8, 20, 90] = 60
    organs = {"liver": np.zeros(mask.shape, bool), "left kidney": np.zeros(mask.shape, bool)}
    organs["left kidney"][5:12, 5:40, 65:112] = True
    found = measure_finding(volume, mask, organs)
    assert found["volume_ml"] == pytest.approx(mask.sum() * 2.5 / 1000, abs=1e-3)
    assert found["diameter_mm"] == pytest.approx(18, abs=1)
    assert found["mean_hu"] == pytest.approx(40, abs=0.2)
    assert found["sd_hu"] == pytest.approx(volume.hu[mask].std(), abs=0.1)
    assert (found["side"], found["organ"], found["slice"]) == ("left", "left kidney", 9)
    assert found["place_mm"] == pytest.approx((volume.affine @ [90, 20, 8, 1])[:3], abs=0.6)
    assert [one["side"] for one in found["components"]] == ["left"]
    both = measure_finding(volume, mask | ball((8, 20, 30), 9))
    assert both["side"] == "both"
    assert sorted(one["side"] for one in both["components"]) == ["left", "right"]
    assert both["organ"] is None


def test_an_organ_is_touched_where_the_finding_lies_in_none_and_walls_count_last() -> None:
    mask = np.zeros((9, 9, 9), bool)
    mask[4, 4, 4] = True
    liver, muscle, far = np.zeros_like(mask), np.ones_like(mask), np.zeros_like(mask)
    liver[4, 5, 5] = True
    far[0] = True
    volume = read_volume(np.zeros(mask.shape, np.int16), spacing=(5, 5, 5))

    def organ_of(organs: dict[str, np.ndarray]) -> str | None:
        organ: str | None = measure_finding(volume, mask, organs)["organ"]
        return organ

    assert organ_of({"muscle": muscle, "liver": liver, "heart": far}) == "liver"
    assert organ_of({"muscle": muscle, "heart": far}) == "muscle"
    assert organ_of({"heart": far}) is None


@pytest.mark.parametrize(("away", "organ"), [(4, "liver"), (8, None)])
def test_what_is_within_5_mm_of_a_finding_touches_it(away: int, organ: str | None) -> None:
    liver = np.zeros((20, 60, 120), bool)
    liver[:, 26 + away :] = True  # rows of 1 mm; the finding ends at row 25
    assert measure_finding(scan(), ball((8, 20, 60), 5.4), {"liver": liver})["organ"] == organ


def test_each_part_of_a_finding_has_its_organ_and_the_finding_that_of_the_largest() -> None:
    organs = {"left lung": np.zeros((20, 60, 120), bool), "right lung": np.zeros((20, 60, 120), bool)}
    organs["left lung"][..., 60:], organs["right lung"][..., :60] = True, True
    found = measure_finding(scan(), ball((8, 20, 90), 7) | ball((8, 20, 30), 9), organs)
    assert [one["organ"] for one in found["components"]] == ["right lung", "left lung"]
    assert found["organ"] == "right lung"


def test_organs_on_a_coarser_grid_and_padding_that_is_no_part() -> None:
    organs = {"heart": np.zeros((10, 30, 60), bool)}
    organs["heart"][:, :, 30:] = True
    found = measure_finding(scan(), ball((8, 20, 90), 9), organs, lambda labels: labels[::2, ::2, ::2])
    assert found["organ"] == "heart"
    assert organs_of(np.array([-1, -1, 0, 2]), {"heart": np.ones(4, bool)}) == [None, "heart"]


def test_an_empty_mask_measures_nothing() -> None:
    found = measure_finding(scan(), np.zeros((20, 60, 120), bool))
    assert found["voxels"] == 0
    assert found["components"] == []
    assert {found[key] for key in ("diameter_mm", "side", "organ", "slice", "sd_hu", "place_mm")} == {None}


@pytest.mark.parametrize("spacing", [(2.0, 1.0, 1.0), (5.0, 0.8, 1.3)])
def test_the_ends_of_the_drawn_diameters_are_as_far_apart_as_the_diameters(spacing: tuple[float, float, float]) -> None:
    mask = np.zeros((5, 40, 40), bool)
    z, y, x = np.ogrid[:5, :40, :40]
    mask |= ((y - 20 + x - 18) / 14) ** 2 + ((y - x) / 6) ** 2 + ((z - 3) / 2) ** 2 < 1  # oblique, longest in slice 3
    level, lines = diameter_lines(mask, spacing)
    found = [float(np.linalg.norm(np.subtract(*line) * spacing[1:])) for line in lines]
    assert level == 3
    assert found == pytest.approx(axial_diameters(mask, spacing), rel=0.02)
    (along, across) = (np.subtract(*line) * spacing[1:] for line in lines)
    assert abs(along @ across) < 1e-6 * np.linalg.norm(along) * np.linalg.norm(across) + 1e-6
    ends = np.round(np.array(lines).reshape(-1, 2)).astype(int)
    assert all(
        mask[level, max(0, r - 2) : r + 3, max(0, c - 2) : c + 3].any() for r, c in ends
    )  # at the edge of the mask
