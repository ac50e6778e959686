"""Phantoms: the same every time, anatomically right, with truth that fits."""

from __future__ import annotations

import json

import numpy as np
import pytest
from repository import shared
from scipy import ndimage

from ctinstruct_hf import CTInstructError, read_volume
from ctinstruct_hf.phantoms import FINDINGS, ORGANS, SIDED, UNIONS, PhantomRef, make_phantom
from ctinstruct_hf.phantoms.canvas import Canvas


@pytest.fixture(scope="module")
def phantom():
    return make_phantom(5, shape=(64, 96, 96))


def centre(mask: np.ndarray) -> np.ndarray:
    return np.array([places.mean() for places in np.nonzero(mask)])


SOFT = ["liver", "spleen", "stomach", "right kidney", "left kidney", "pancreas", "muscle"]


def test_a_seed_gives_the_same_phantom(phantom) -> None:
    again = make_phantom(5, shape=(64, 96, 96))
    assert np.array_equal(again.volume.hu, phantom.volume.hu)
    assert (again.report, again.questions, again.labels) == (phantom.report, phantom.questions, phantom.labels)
    assert not np.array_equal(make_phantom(6, shape=(64, 96, 96)).volume.hu, phantom.volume.hu)


def test_left_is_left_and_the_heart_points_left(phantom) -> None:
    masks = phantom.masks
    assert centre(masks["left lung"])[2] > centre(masks["right lung"])[2]  # width runs toward the left
    assert centre(masks["liver"])[2] < centre(masks["spleen"])[2]
    assert centre(masks["heart"])[2] > centre(masks["spine"])[2]
    assert centre(masks["spine"])[1] > centre(masks["sternum"])[1]  # height runs toward the back
    assert centre(masks["lungs"])[0] > centre(masks["liver"])[0]  # depth runs toward the head
    assert set(masks) == {*ORGANS, *UNIONS, *FINDINGS}
    assert sum(masks[name].any() for name in ORGANS) >= 14


def test_fluid_lies_at_the_back_and_displaces_the_lung() -> None:
    others = dict.fromkeys(FINDINGS, 0)
    with_it, without = (make_phantom(3, (64, 96, 96), findings={**others, "pleural effusion": one}) for one in (1, 0))
    fluid, lungs = with_it.masks["pleural effusion"], with_it.masks["lungs"]
    assert centre(fluid)[1] > centre(lungs)[1]
    assert np.array_equal(without.masks["lungs"], lungs | fluid)
    assert not (lungs & fluid).any()
    assert with_it.masks["body"][fluid].all()


@pytest.mark.parametrize("finding", ["pericardial effusion", "hiatal hernia"])
def test_what_displaces_the_lung_is_no_lung(finding: str) -> None:
    with_it, without = (make_phantom(1, (64, 96, 96), findings={finding: there}) for there in (1, 0))
    there = with_it.masks[finding]
    assert (there & without.masks["lungs"]).sum() >= 8
    assert not (there & with_it.masks["lungs"]).any()


@pytest.mark.parametrize("finding", FINDINGS)
def test_a_finding_can_be_put_in_and_taken_out(finding: str) -> None:
    seed = 11
    others = dict.fromkeys(FINDINGS, 0)
    without = make_phantom(seed, shape=(64, 96, 96), findings=others)
    with_it = make_phantom(seed, shape=(64, 96, 96), findings={**others, finding: 1})
    assert without.labels == others
    assert not without.masks[finding].any()
    assert with_it.labels == {**others, finding: 1}
    assert with_it.masks[finding].any()
    assert "No abnormality" in without.report
    assert finding in with_it.report.lower()
    for organ in ("liver", "spine", "spleen"):
        assert np.array_equal(with_it.masks[organ], without.masks[organ])


def test_slices_and_bad_arguments() -> None:
    assert make_phantom(0, kind="slice").volume.shape == (1, 160, 160)
    with pytest.raises(CTInstructError, match="kind"):
        make_phantom(0, kind="movie")
    with pytest.raises(CTInstructError, match="unknown names"):
        make_phantom(0, findings={"gout": 1})
    with pytest.raises(CTInstructError, match="shape"):
        make_phantom(0, shape=(4, 2, 2))


def test_a_slice_holds_what_lies_at_its_level() -> None:
    """Body parts are looked for where the slice is, not where the scan's middle was drawn."""
    chests = 0
    for seed in range(60):
        masks = PhantomRef("slice", seed).make().masks
        if masks["right lung"].sum() > 300 and masks["left lung"].sum() > 300:
            chests += 1
            assert masks["heart"].any() or masks["aorta"].any() or masks["trachea"].any(), seed
            assert masks["spine"].any(), seed
    assert chests > 10


@pytest.mark.parametrize("finding", FINDINGS)
def test_a_slice_goes_through_a_finding(finding: str) -> None:
    """At the level of a finding it is mostly seen where it is put in, and never where it is left out."""
    pairs = [
        [make_phantom(seed, (1, 128, 128), (5, 3, 3), "slice", {finding: there}, through=finding) for there in (1, 0)]
        for seed in range(12)
    ]
    assert sum(with_it.labels[finding] for with_it, _ in pairs) >= 6
    assert not any(without.labels[finding] for _, without in pairs)
    with pytest.raises(CTInstructError, match="gout"):
        make_phantom(0, kind="slice", through="gout")
    with pytest.raises(CTInstructError, match="level of a slice"):
        make_phantom(0, through=finding)


@pytest.mark.slow
def test_focused_slices_show_every_finding_often() -> None:
    slices = [PhantomRef("focus", seed).make() for seed in range(320)]
    shares = {name: np.mean([one.labels[name] for one in slices]) for name in FINDINGS}
    assert min(shares.values()) > 0.02, shares
    assert np.array_equal(slices[7].volume.hu, PhantomRef.parse("phantom:focus:7").make().volume.hu)


def test_questions_answer_what_is_there(phantom) -> None:
    presence = {q["about"]: q["answer"] for q in phantom.questions if q["kind"] == "short" and q["about"] in FINDINGS}
    assert presence == {name: "Yes." if there else "No." for name, there in phantom.labels.items()}
    for question in phantom.questions:
        if question["kind"] == "multiple_choice":
            assert question["answer"] in question["choices"]


# structure of phantoms -> TotalSegmentator's names, furthest that the medians may lie apart (HU), least overlap of histograms
REAL = {
    "liver": (("liver",), 20, 0.7),
    "spleen": (("spleen",), 20, 0.65),
    "right kidney": (("kidney_right",), 25, 0.65),
    "left kidney": (("kidney_left",), 25, 0.65),
    "stomach": (("stomach",), 60, 0.5),  # its air varies
    "aorta": (("aorta",), 30, 0.5),
    "pancreas": (("pancreas",), 45, 0.4),
    "muscle": (("autochthon_left", "autochthon_right"), 30, 0.45),
    "lungs": (("lung_",), 80, 0.5),
    "spine": (("vertebrae_",), 40, 0.45),
    "ribs": (("rib_",), 40, 0.5),
}


def test_hu_of_organs_are_those_of_a_real_native_scan() -> None:
    """Medians and histograms (20 HU bins) of findings-free native phantoms against the labelled abdomen."""
    scan = read_volume(shared("data/abdomen/ct.nii.gz"))
    labels = np.rint(read_volume(shared("data/abdomen/labels.nii.gz"), labels=True).hu).astype(int)
    ids = {name: int(key) for key, name in json.loads(shared("data/abdomen/label_names.json").read_text()).items()}
    healthy = dict.fromkeys(FINDINGS, 0)
    phantoms = [made for made in (make_phantom(seed, (48, 96, 96), findings=healthy) for seed in range(20)) if made.phase == "native"]  # fmt: skip
    assert len(phantoms) >= 4
    bins = np.arange(-1024, 1600, 20)
    for structure, (names, apart, least) in REAL.items():
        chosen = [ids[name] for name in ids if any(name == one or (one.endswith("_") and name.startswith(one)) for one in names)]  # fmt: skip
        real = scan.hu[np.isin(labels, chosen)]
        made = np.concatenate([phantom.volume.hu[phantom.masks[structure]] for phantom in phantoms])
        assert abs(np.median(real) - np.median(made)) <= apart, structure
        shares = [np.histogram(values, bins)[0] / len(values) for values in (real, made)]
        assert np.minimum(*shares).sum() >= least, structure


def test_trunks_differ_and_short_scans_lie_anywhere() -> None:
    widths, lowest = [], []
    for seed in range(8):
        phantom = make_phantom(seed, (24, 64, 64), (4.0, 6.0, 6.0))
        widths.append(np.ptp(np.nonzero(phantom.organ_map.any((0, 1)))[0]))
        lowest.append(phantom.masks["lungs"].sum() > phantom.masks["liver"].sum())
    assert len(set(widths)) >= 4
    assert len(set(lowest)) == 2  # some of the chest, some of the abdomen


def test_sides_are_those_of_what_is_seen() -> None:
    for seed in range(6):
        phantom = make_phantom(seed, (32, 96, 96), findings={"pleural effusion": 1, "kidney stone": 1})
        lungs = make_phantom(seed, (32, 96, 96), findings={"pleural effusion": 0, "kidney stone": 1}).masks
        for name, organs in (
            ("pleural effusion", lungs),
            ("consolidation", phantom.masks),
            ("kidney stone", phantom.masks),
        ):
            for side in ("right", "left"):
                half = organs[f"{side} {'kidney' if name == 'kidney stone' else 'lung'}"]
                assert phantom.sides[f"{name} on the {side}"] == int((phantom.masks[name] & half).any())
        assert set(phantom.sides) == {f"{name} on the {side}" for name in SIDED for side in ("right", "left")}
        for name in SIDED:
            told = {one.side for one in phantom.findings if one.name == name}
            assert told == {side for side in ("right", "left") if phantom.sides[f"{name} on the {side}"]}


@pytest.mark.slow
def test_a_slice_tells_of_no_side_that_its_neighbour_shows() -> None:
    """A slice is painted with its neighbours; a finding of one of them alone is not told of."""
    canvas = Canvas(np.random.default_rng(0), (3, 16, 16), (5.0, 6.0, 6.0))
    box = (slice(0, 1), slice(None), slice(None))
    canvas.finding("pleural effusion", box, np.ones((1, 16, 16), bool), 10.0, "right")
    canvas.finding("pleural effusion", (slice(1, 2), *box[1:]), np.ones((1, 16, 16), bool), 10.0, "left")
    canvas.keep_middle()
    assert not canvas.side_masks["pleural effusion", "right"].any()
    assert canvas.side_masks["pleural effusion", "left"].all()
    for seed in range(300):
        phantom = make_phantom(
            seed, (1, 48, 48), kind="slice", through="pleural effusion", findings={"pleural effusion": 1}
        )
        columns = np.nonzero(phantom.masks["pleural effusion"])[2]
        for side, there in (("right", (columns < 20).any()), ("left", (columns > 27).any())):
            assert not there or phantom.sides[f"pleural effusion on the {side}"], (seed, side)


def test_a_tube_is_round_and_grows_thin() -> None:
    canvas = Canvas(np.random.default_rng(0), (40, 40, 40), (2.0, 2.0, 2.0))
    z, y, x = np.meshgrid(*[np.arange(40.0) * 2 - 39] * 3, indexing="ij")
    canvas.x, canvas.y, canvas.z, canvas.centre = x, y, z, np.zeros(3)
    canvas.turn = canvas.back = np.eye(3, dtype=np.float32)
    box, inside = canvas.tube((-20, 0, 0), (20, 0, 0), 8.0, 4.0)  # type: ignore[misc]
    whole = np.zeros(canvas.shape, bool)
    whole[box] = inside
    widths = whole[:, :, [10, 20, 29]].sum(axis=(0, 1)) * 4  # mm², at x = -19, 1 and 19
    assert widths == pytest.approx([np.pi * (8 - (at + 20) / 10) ** 2 for at in (-19, 1, 19)], rel=0.2)
    assert whole[20, 20, 7]  # a round end of 8 mm
    assert not whole[:, :, :4].any()


def test_what_lies_around_a_patient_differs_and_is_no_part_of_one() -> None:
    """Tables of one or two shells, flat or hollow, with or without a mat; cloth over the front of some."""
    shells, hollows, over = set(), set(), set()
    for seed in range(12):
        phantom = make_phantom(seed, (8, 160, 160))
        hu, body = phantom.volume.hu[4], phantom.masks["body"][4]
        around = ndimage.binary_dilation(body, iterations=2)
        solid = (hu > -600) & ~around
        column = solid[:, 80]
        shells.add(int(np.diff(np.flatnonzero(column), prepend=-9).clip(0, 2).sum() // 2))
        height = [int(np.flatnonzero(solid[:, place])[-1]) for place in (80, 28) if solid[:, place].any()]
        hollows.add(len(height) == 2 and height[0] - height[1] > 6)
        front = (hu > -900) & ~around
        over.add(bool(front[: np.flatnonzero(body.any(1))[0]].sum() > 20))
    assert shells >= {1, 2}
    assert hollows == {False, True}
    assert over == {False, True}


def test_lungs_are_as_dense_as_patients_and_gas_lies_beside_them() -> None:
    """Lungs differ between patients, are densest over the dome and reach around it; beside them bowel holds gas."""
    densities, beside = [], 0
    for seed in range(12):
        phantom = make_phantom(seed, (48, 96, 96), findings=dict.fromkeys(FINDINGS, 0))
        hu, lungs = phantom.volume.hu, ndimage.binary_erosion(phantom.masks["lungs"])
        levels = np.flatnonzero(lungs.any((1, 2)))
        low, high = (np.median(hu[one][lungs[one]]) for one in (levels[1:4], levels[-8:-4]))
        assert low > high, seed
        densities.append(np.median(hu[lungs]))
        elsewhere = ndimage.binary_dilation(phantom.masks["lungs"] | phantom.masks["trachea"])
        inside = ndimage.binary_erosion(phantom.organ_map > 0, iterations=3)
        gas = (hu < -800) & inside & ~elsewhere
        beside += bool((gas.any((1, 2)) & phantom.masks["left lung"].any((1, 2))).sum() >= 3)
    assert np.ptp(densities) > 60
    assert -880 < np.median(densities) < -780
    assert beside >= 8


def test_fat_lies_around_organs() -> None:
    """Organs of like HU do not touch: what lies next to a spleen, kidney, stomach or pancreas is mostly fat."""
    for seed in range(4):
        phantom = make_phantom(seed, (64, 128, 128), (4.0, 3.0, 3.0), findings=dict.fromkeys(FINDINGS, 0))
        for name in ("spleen", "right kidney", "left kidney", "stomach", "pancreas"):
            organ = phantom.masks[name]
            around = ndimage.binary_dilation(organ) & ~organ & ~phantom.masks["lungs"]
            touched = np.isin(phantom.organ_map[around], [ORGANS.index(one) + 1 for one in SOFT if one != name])
            assert touched.mean() < 0.1, (seed, name, touched.mean())


def test_gas_fills_the_bowel_of_some() -> None:
    """In some patients gas takes more of the abdomen than in the real one (two to three percent), thinner than any lung."""
    shares = []
    for seed in range(16):
        phantom = make_phantom(seed, (48, 96, 96), findings=dict.fromkeys(FINDINGS, 0))
        below = np.flatnonzero(phantom.masks["kidneys"].any((1, 2)))
        hu, inside = phantom.volume.hu[below], ndimage.binary_erosion(phantom.organ_map[below] > 0, iterations=3)
        gas = (hu < -800) & inside & ~ndimage.binary_dilation(phantom.masks["lungs"][below], iterations=2)
        shares.append(gas.sum() / inside.sum())
        if gas.sum() > 100:
            assert np.median(hu[ndimage.binary_erosion(gas)]) < -930, seed
    assert np.quantile(shares, 0.3) < 0.005
    assert max(shares) > 0.03
