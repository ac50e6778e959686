"""The same patient scanned, stored or cropped otherwise: how far the bundled model's answers move. The table in docs/safety.md:

pytest tests/test_robustness.py -s
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from nibabel.processing import resample_from_to
from scans import dicom_series

from ctinstruct_hf import Study, read_volume
from ctinstruct_hf.evaluation.segmentation import volume_dice
from ctinstruct_hf.inference.study import load_model
from ctinstruct_hf.phantoms import FINDINGS, Phantom, make_phantom

SEEDS = (900401, 900402)
FIELD_MM = 325  # along the body
EDGE_MM = 10
CROPPED, CUT = "10 % cropped at the ends", 0.1
STRUCTURES = ["lungs", "liver", "heart", "bones"]
QUESTIONS = [f"Is there {'a ' if name in ('lung nodule', 'hiatal hernia', 'kidney stone') else ''}{name}?" for name in FINDINGS]  # fmt: skip


@functools.lru_cache(maxsize=2)
def thin(seed: int) -> Phantom:
    """A made-up patient in slices of 1 mm."""
    return make_phantom(seed, (FIELD_MM, 128, 128), (1.0, 2.8, 2.8))


def shown(seed: int, cut: float) -> np.ndarray:
    """Of each finding, whether a scan that is cut by so much of its length still shows most of it more than a centimetre from its
    ends: half a kidney with a stone in the last slice is another question than how it was scanned. Absent ones count."""
    found, margin = thin(seed).finding_masks, round(FIELD_MM * cut / 2) + EDGE_MM
    inside = [float(found[name][margin:-margin].sum() / found[name].sum()) if name in found else 1.0 for name in FINDINGS]  # fmt: skip
    return np.array(inside) > 0.5


def scan(seed: int, thickness: int = 5) -> nib.Nifti1Image:
    """The same patient in slices of so many mm, each the mean of the thin ones in it; int16, axes to left, back and head."""
    volume = thin(seed).volume
    count = FIELD_MM // thickness
    hu = volume.hu[: count * thickness].reshape(count, thickness, 128, 128).mean(1)
    thick = read_volume(np.rint(hu).astype(np.int16), spacing=(float(thickness), 2.8, 2.8))
    image = thick.to_source(thick.hu)
    image.affine[2, 3] += (thickness - 1) / 2  # the middle of the first slice
    return nib.Nifti1Image(np.asarray(image.dataobj), image.affine)


def changed(
    image: nib.Nifti1Image, change: Callable[[np.ndarray], np.ndarray], kind: type = np.int16
) -> nib.Nifti1Image:
    data = change(np.asarray(image.dataobj).astype(np.float32))
    return nib.Nifti1Image(data.astype(kind), image.affine)


def cropped(image: nib.Nifti1Image, in_plane: float, ends: float) -> nib.Nifti1Image:
    across, along = round(128 * in_plane / 2), round(image.shape[2] * ends / 2)
    return image.slicer[across : 128 - across, across : 128 - across, along : image.shape[2] - along]


def noisy(image: nib.Nifti1Image, spread: float) -> nib.Nifti1Image:
    rng = np.random.default_rng(0)
    return changed(image, lambda hu: np.rint(hu + rng.normal(0, spread, hu.shape)))


def turned(image: nib.Nifti1Image, codes: str) -> nib.Nifti1Image:
    here = nib.orientations.io_orientation(image.affine)
    return image.as_reoriented(nib.orientations.ornt_transform(here, nib.orientations.axcodes2ornt(codes)))


def as_dicom(image: nib.Nifti1Image, folder: Path) -> Path:
    """The same voxels at the same place as a series: DICOM counts to the left, back and head."""
    upright = turned(image, "LPS")
    origin, step = (upright.affine[:3, column] * (-1, -1, 1) for column in (3, 2))
    hu = np.ascontiguousarray(np.asarray(upright.dataobj).transpose(2, 1, 0))
    places = [origin + index * step for index in range(len(hu))]
    return dicom_series(folder, hu, positions=places, PixelSpacing=[2.8, 2.8], SliceThickness=5.0)


# name -> how the scan is changed, and how much may change: (probabilities, answers of 13, mean Dice of four structures)
CHANGES: dict[str, tuple[Callable[[int, nib.Nifti1Image, Path], Any], tuple[float, int, float]]] = {
    "DICOM series": (lambda seed, image, place: as_dicom(image, place / "series"), (1e-4, 0, 0.999)),
    "float32 voxels": (lambda seed, image, place: changed(image, lambda hu: hu, np.float32), (1e-4, 0, 0.999)),
    "axes right, front, feet": (lambda seed, image, place: turned(image, "RAI"), (1e-4, 0, 0.999)),
    "axes feet, left, back": (lambda seed, image, place: turned(image, "ILP"), (1e-4, 0, 0.999)),
    "slices of 1 mm": (lambda seed, image, place: scan(seed, 1), (0.2, 2, 0.94)),
    "slices of 2 mm": (lambda seed, image, place: scan(seed, 2), (0.2, 2, 0.94)),
    "slices of 3 mm": (lambda seed, image, place: scan(seed, 3), (0.2, 2, 0.94)),
    "noise of 10 HU more": (lambda seed, image, place: noisy(image, 10), (0.2, 2, 0.95)),
    "noise of 30 HU more": (lambda seed, image, place: noisy(image, 30), (0.2, 2, 0.9)),
    "5 % cropped in plane": (lambda seed, image, place: cropped(image, 0.05, 0), (0.2, 2, 0.9)),
    CROPPED: (lambda seed, image, place: cropped(image, 0, CUT), (0.2, 2, 0.9)),
}  # fmt: skip


def asked(source: Any, place: Path) -> tuple[np.ndarray, list[str], list[nib.Nifti1Image]]:
    """Probabilities, answers and masks on the file's grid."""
    if isinstance(source, nib.Nifti1Image):
        nib.save(source, place / "scan.nii.gz")
        source = place / "scan.nii.gz"
    study = Study.open(source, load_model(None, "cpu"))
    told = study.diagnose("phantom")
    answers = [str(answer) for answer in study.ask_many(QUESTIONS, max_new_tokens=12)]
    masks = [study.volume.to_source(mask) for mask in study.segment(STRUCTURES).values()]
    return np.array(list(told.values())), answers, masks


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    return {seed: asked(scan(seed), tmp_path_factory.mktemp("plain")) for seed in SEEDS}


@pytest.mark.parametrize("name", CHANGES)
def test_answers_stay_within_stated_bounds(name: str, plain: dict[int, Any], tmp_path: Path) -> None:
    change, (most, answers, least) = CHANGES[name]
    moved, other, overlap = [], [], []
    for seed in SEEDS:
        place = tmp_path / str(seed)
        place.mkdir()
        found = asked(change(seed, scan(seed), place), place)
        kept = shown(seed, CUT if name == CROPPED else 0)
        moved.append(float(np.abs(found[0] - plain[seed][0])[kept].max()))
        answers_of = zip(found[1], plain[seed][1], kept, strict=True)
        other.append(sum(one != two for one, two, same in answers_of if same))
        dice = []
        for mask, before in zip(found[2], plain[seed][2], strict=True):
            there = resample_from_to(before, (mask.shape, mask.affine), order=0)
            dice.append(volume_dice(np.asarray(mask.dataobj) > 0, np.asarray(there.dataobj) > 0))
        overlap.append(float(np.mean(dice)))
    print(f"\n| {name} | {max(moved):.1g} | {max(other)} of {len(FINDINGS)} | {min(overlap):.3f} |", end="")
    assert max(moved) <= most
    assert max(other) <= answers
    assert min(overlap) >= least


SCRIPT = """
import sys
import numpy as np, torch
from ctinstruct_hf import Study
from ctinstruct_hf.inference.study import load_model
torch.set_num_threads(int(sys.argv[1]))
study = Study.open("phantom.nii.gz", load_model(None, "cpu"))
answer = study.ask("Describe the scan.", max_new_tokens=30)
drawn = []
for seed in (1, 1, 2):
    torch.manual_seed(seed)
    drawn.append(str(study.ask("Describe the scan.", max_new_tokens=20, do_sample=True, temperature=5.0)))
told = study.diagnose("phantom")
mask = study.segment("liver")
np.savez(sys.argv[2], answer=answer, drawn=drawn, told=list(told.values()), mask=mask, tokens=study.features.last_hidden_state.numpy())
"""


@pytest.mark.slow
def test_the_same_in_two_processes_and_nearly_so_with_two_threads(tmp_path: Path) -> None:
    nib.save(scan(3), tmp_path / "phantom.nii.gz")
    found = []
    for number, threads in enumerate((1, 1, 2)):
        command = [sys.executable, "-c", SCRIPT, str(threads), str(tmp_path / f"{number}.npz")]
        done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, capture_output=True, check=False)  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        with np.load(tmp_path / f"{number}.npz", allow_pickle=False) as kept:
            found.append({name: kept[name] for name in kept.files})
    one, again, two = found
    assert all(np.array_equal(one[name], again[name]) for name in one)
    assert one["drawn"][0] == one["drawn"][1]
    assert one["drawn"][0] != one["drawn"][2]
    assert str(one["answer"]) == str(two["answer"])
    scale = np.abs(one["tokens"]).max()
    assert np.abs(one["tokens"] - two["tokens"]).max() <= 1e-5 * scale
    assert np.abs(one["told"] - two["told"]).max() <= 1e-5
    assert (one["mask"] != two["mask"]).mean() <= 1e-5
