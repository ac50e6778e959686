"""Growth of findings between two scans of a patient who lies in another way."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import SimpleITK

from ctinstruct_hf import CTVolume, read_volume
from ctinstruct_hf.inference.comparison import align, compare_findings
from ctinstruct_hf.output.measure import measure_finding
from ctinstruct_hf.phantoms import make_phantom

MOTION = SimpleITK.Euler3DTransform()
MOTION.SetParameters((0.05, -0.04, 0.08, 14.0, -9.0, 20.0))


def moved(volume: CTVolume) -> CTVolume:
    """The same patient elsewhere on the table, LPS moved by the inverse of `MOTION`."""
    image = SimpleITK.GetImageFromArray(volume.hu.astype(np.float32))
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ volume.affine
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    image.SetSpacing(lengths.tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    image.SetDirection((affine[:3, :3] / lengths).ravel().tolist())
    turned = SimpleITK.Resample(image, image, MOTION, SimpleITK.sitkLinear, -1000.0)
    hu = np.rint(SimpleITK.GetArrayFromImage(turned)).astype(np.int16)
    return read_volume(nib.Nifti1Image(hu.transpose(2, 1, 0), volume.affine))


def ball(volume: CTVolume, place: np.ndarray, diameter: float) -> np.ndarray:
    """Voxels of a ball around a place in RAS mm."""
    index = np.stack([*np.indices(volume.shape)[::-1], np.ones(volume.shape)])
    apart = np.tensordot(volume.affine[:3], index, 1) - place[:, None, None, None]
    return (apart**2).sum(0) <= (diameter / 2) ** 2


@pytest.fixture(scope="module")
def scans() -> tuple[CTVolume, CTVolume]:
    before = make_phantom(4, shape=(64, 96, 96), spacing=(5.0, 4.0, 4.0)).volume
    return before, moved(before)


def test_the_same_places_are_found_in_both_scans(scans: tuple[CTVolume, CTVolume]) -> None:
    transform = align(*scans)
    for place in ((0, 0, 0), (60, 20, -30), (-50, -30, 40)):
        there = np.array(transform.TransformPoint(place))
        assert np.linalg.norm(np.array(MOTION.TransformPoint(there.tolist())) - place) < 4


def test_growth_is_what_it_was_made(scans: tuple[CTVolume, CTVolume]) -> None:
    before, now = scans
    to_ras = np.array([-1.0, -1.0, 1.0])
    places = {
        "grown": np.array([50.0, 10.0, 20.0]),
        "shrunk": np.array([-50.0, 10.0, 20.0]),
        "gone": np.array([0.0, 30.0, -60.0]),
    }
    there = {
        name: to_ras * MOTION.GetInverse().TransformPoint((to_ras * place).tolist()) for name, place in places.items()
    }
    old = ball(before, places["grown"], 24) | ball(before, places["shrunk"], 40) | ball(before, places["gone"], 30)
    new = ball(now, there["grown"], 40) | ball(now, there["shrunk"], 28)
    found = {"liver lesion": measure_finding(now, new), "emphysema": measure_finding(now, ball(now, there["gone"], 30))}
    rows = compare_findings(now, found, before, {"liver lesion": measure_finding(before, old), "lung nodule": None})
    assert [row["change"] for row in rows["emphysema"]] == ["new"]
    by_change = {row["change"]: row for row in rows["liver lesion"]}
    assert set(by_change) == {"grown", "shrunk", "gone"}
    assert by_change["grown"]["growth_mm"] == pytest.approx(16, abs=4)
    assert by_change["grown"]["growth_percent"] == pytest.approx(67, abs=18)
    assert by_change["shrunk"]["growth_mm"] == pytest.approx(-12, abs=4)
    assert by_change["shrunk"]["volume_growth_percent"] == pytest.approx(-66, abs=12)
    assert by_change["gone"]["now"] is None
    assert rows["lung nodule"] == []
