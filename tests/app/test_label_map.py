"""One label map holds all masks of an open study."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
from scans import as_nifti, asymmetric

from ctinstruct_hf.app.label_map import LabelMap
from ctinstruct_hf.app.limits import Limits
from ctinstruct_hf.app.masks import PackedMasks
from ctinstruct_hf.processing.volume_reading import read_volume


def test_the_label_map_follows_the_masks_on_the_grid_of_the_scan(tmp_path: Path) -> None:
    nib.save(as_nifti(asymmetric((6, 10, 12)), "PIL", (2.0, 2.0, 2.0)), tmp_path / "scan.nii")
    volume = read_volume(tmp_path / "scan.nii")
    masks, drawn = PackedMasks(Limits(structures=400)), LabelMap(volume, tmp_path / "labels.nii")

    def read() -> np.ndarray:
        drawn.update(masks)
        image = nib.load(tmp_path / "labels.nii")
        assert image.shape == nib.load(tmp_path / "scan.nii").shape
        assert np.allclose(image.affine, volume.source.affine)
        return np.asarray(image.dataobj)

    first, second = np.zeros(volume.shape, bool), np.zeros(volume.shape, bool)
    first[1:4, 2:6], second[3:5, 4:8] = True, True
    masks["liver"], masks["spleen"] = first, second
    expected = np.where(second, 2, first)  # the later structure has the voxels that both have
    assert np.array_equal(read(), np.asarray(volume.to_source(expected.astype(np.uint8)).dataobj))
    masks["liver"] = ~first  # again: it keeps its number
    assert np.array_equal(read(), np.asarray(volume.to_source(np.where(second, 2, ~first).astype(np.uint8)).dataobj))
    del masks["liver"]
    assert np.array_equal(read() > 0, np.asarray(volume.to_source(second).dataobj) > 0)
    for number in range(300):
        masks[f"structure {number}"] = first
    labels = read()
    assert labels.dtype == np.uint16
    assert labels.max() == 301
