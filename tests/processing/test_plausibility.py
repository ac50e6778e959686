"""Values that cannot be HU are told; masks and label maps are refused as scans; scans, phantoms and crops are neither."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from repository import shared
from scans import as_nifti, asymmetric, dicom_series

from ctinstruct_hf import CTInstructError, Study, read_volume

RNG = np.random.default_rng(0)
BLOCK = np.zeros((24, 30, 28), np.int16)  # (depth, height, width) of an organ
BLOCK[6:18, 8:22, 5:20] = 1


def body(noise: float = 20) -> np.ndarray:
    """HU of a box of tissue with a lung and a bone in air."""
    hu = np.full((24, 30, 28), -1000.0)
    hu[:, 3:-3, 3:-3] = 40
    hu[6:18, 8:20, 5:12] = -850
    hu[:, 20:25, 12:18] = 700
    return np.rint(hu + RNG.normal(0, noise, hu.shape)).astype(np.int16)


def parcels(count: int) -> np.ndarray:
    """A label map of `count` structures in slabs, besides 0."""
    labels = np.zeros((60, 64, 60), np.int16)
    inner = labels[4:-4, 4:-4, 4:-4]
    inner[:] = (np.indices(inner.shape) // 6 * np.array([1, 9, 81])[:, None, None, None]).sum(0) % count + 1
    return labels


LABEL_MAPS = {
    "mask": BLOCK,
    "mask of 255": BLOCK * 255,
    "mask with unknown": BLOCK - (RNG.random(BLOCK.shape) > 0.9),
    "one organ of many": BLOCK * 52,
    "three labels": BLOCK + (np.arange(28) > 14) * BLOCK,
    "labels anywhere": RNG.integers(0, 6, BLOCK.shape),
    "117 structures": parcels(117),
}


def forms(labels: np.ndarray, folder: Path) -> list:
    """The labels as files and as objects, integers and floats."""
    nib.save(as_nifti(labels.astype(np.int16), "RAS"), folder / "labels.nii.gz")
    nib.save(as_nifti(labels.astype(np.float32), "LPS"), folder / "floats.nii")
    np.save(folder / "labels.npy", labels)
    (folder / "labels.json").write_text('{"spacing": [1, 1, 1]}')
    itk = SimpleITK.GetImageFromArray(labels.astype(np.int16))
    SimpleITK.WriteImage(itk, str(folder / "labels.nrrd"), True)
    return [folder / name for name in ("labels.nii.gz", "floats.nii", "labels.npy", "labels.nrrd")] + [
        itk, nib.load(folder / "labels.nii.gz")
    ]  # fmt: skip


@pytest.mark.parametrize("name", LABEL_MAPS)
def test_masks_and_label_maps_are_refused_as_scans_and_read_as_labels(name: str, tmp_path: Path) -> None:
    labels = np.asarray(LABEL_MAPS[name])
    values = np.unique(labels)
    for scan in forms(labels, tmp_path):
        with pytest.raises(CTInstructError, match=rf"not a CT in HU: it holds only {len(values)} integers") as error:
            read_volume(scan)
        assert ("mask" if len(values) <= 2 else "label map") in str(error.value)
        assert np.array_equal(np.unique(read_volume(scan, labels=True).hu), values)
    volume = read_volume(labels, spacing=(1, 1, 1))  # an array is HU by its contract
    assert any("a mask or labels" in note for note in volume.warnings)


def test_a_label_map_is_refused_before_a_model_sees_it(tmp_path: Path) -> None:
    nib.save(as_nifti(BLOCK, "RAS"), tmp_path / "mask.nii.gz")
    with pytest.raises(CTInstructError, match=r"mask.nii.gz is a mask, not a CT"):
        Study.open(tmp_path / "mask.nii.gz")


def test_the_labels_of_a_real_scan_are_refused_and_the_scan_is_not() -> None:
    assert read_volume(shared("data/abdomen/ct.nii.gz")).warnings == []
    with pytest.raises(CTInstructError, match="label map"):
        read_volume(shared("data/abdomen/labels.nii.gz"))


def head() -> np.ndarray:
    """A head in a window of 80 HU as 8 bits."""
    hu = np.full((24, 30, 28), 0.0)
    hu[:, 4:-4, 4:-4] = 255
    hu[:, 6:-6, 6:-6] = 120 + RNG.normal(0, 25, (24, 18, 16))
    return np.rint(hu).clip(0, 255).astype(np.uint8)


NOT_HU = {
    "8 bits": (head(), "8 bits"),
    "0 to 1": ((body() + 1024) / 4095, "too narrow"),
    "-1 to 1": (body() / 1000.0, "too narrow"),
    "standardised": ((body() - body().mean()) / body().std(), "too narrow"),
    "1024 missing": (body(5).clip(-1000) + 1024, "intercept of -1024"),
    "16 bits": ((body().clip(-1000) + 1000) * 30.0 - 1000, "above 4000 HU"),
    "nothing": (np.full((4, 5, 6), -1000), "every voxel is -1000"),
    "zeros": (np.zeros((4, 5, 6)), "every voxel is 0"),
}


@pytest.mark.parametrize("name", NOT_HU)
def test_values_that_cannot_be_hu_are_told(name: str, tmp_path: Path) -> None:
    values, why = NOT_HU[name]
    values = values.astype(np.float32 if values.dtype.kind == "f" else np.int16)
    nib.save(as_nifti(values, "RAS"), tmp_path / "scan.nii")
    itk = SimpleITK.GetImageFromArray(values)
    for scan in (tmp_path / "scan.nii", nib.load(tmp_path / "scan.nii"), itk, values):
        assert [why in note for note in read_volume(scan).warnings] == [True]


def test_a_ct_by_its_header_is_told_and_not_refused(tmp_path: Path) -> None:
    volume = read_volume(dicom_series(tmp_path / "series", BLOCK))
    assert any("a mask or labels" in note for note in volume.warnings)


SCANS = {
    "body": body(),
    "tiny": asymmetric((3, 4, 5)),
    "one slice": body()[:1],
    "cropped to tissue and fat": body()[:4, 4:7, 4:-4] - np.int16(90),
    "metal": np.where(BLOCK[..., None].repeat(1, -1)[..., 0] & (RNG.random(BLOCK.shape) > 0.5), 20000, body()),
    "without noise": body(0),
    "bones": np.where(body() < -500, -1000, body()),
    "floats": body() + 0.25,
}


@pytest.mark.parametrize("name", SCANS)
def test_scans_however_small_or_smooth_are_plain(name: str, tmp_path: Path) -> None:
    values = SCANS[name]
    nib.save(
        as_nifti(values.astype(np.float32 if values.dtype.kind == "f" else np.int16), "RAS"), tmp_path / "scan.nii"
    )
    assert read_volume(tmp_path / "scan.nii").warnings == []
    assert read_volume(values).warnings == []


@pytest.mark.parametrize("seed", range(3))
def test_phantoms_are_plain(seed: int) -> None:
    from ctinstruct_hf.phantoms import make_phantom

    volume = make_phantom(seed, shape=(24, 48, 48)).volume
    assert read_volume(volume.to_source(volume.hu)).warnings == []


def test_labels_above_255_are_labels_where_neighbours_are_alike(tmp_path: Path) -> None:
    nib.save(as_nifti((parcels(20) * 100).astype(np.int16), "RAS"), tmp_path / "labels.nii")
    with pytest.raises(CTInstructError, match="label map"):
        read_volume(tmp_path / "labels.nii")
    nib.save(as_nifti((body() + 1024).clip(0) // 16 * 16, "RAS"), tmp_path / "coarse.nii")
    assert "intercept" in read_volume(tmp_path / "coarse.nii").warnings[0]


@pytest.mark.parametrize(("window", "cut"), [((-150, 250), True), ((-160, 240), True), ((-1000, 400), False)])
def test_a_scan_clipped_to_a_window_without_air_is_named(window: tuple[int, int], cut: bool, tmp_path: Path) -> None:
    nib.save(as_nifti(body().clip(*window), "RAS"), tmp_path / "scan.nii")
    warnings = read_volume(tmp_path / "scan.nii").warnings
    assert [f"the lowest value, {window[0]} HU" in note for note in warnings] == [True] * cut
