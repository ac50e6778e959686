"""The release's preparation (shared/reference) against the processor with its settings."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from repository import shared
from safetensors.torch import load_file

from ctinstruct_hf import CTInstructImageProcessor

CASES = ("abdomen", "square_deep", "square_thin", "tall", "wide")


@pytest.mark.parametrize("case", CASES)
def test_crop_percentiles_stretch_and_patches_agree(case: str, tmp_path: Path) -> None:
    golden = load_file(shared("reference/released_preparation.safetensors"))
    path = tmp_path / "scan.nii.gz"
    nib.save(nib.Nifti1Image(golden[f"{case}.input_hu"].numpy(), np.eye(4)), path)
    processor = CTInstructImageProcessor(fit="released", axes="file", intensity="zscore")
    fit = processor.fit_of(processor.read(path))
    batch = processor(path, return_tensors="pt")
    depth, height, width = fit.size
    assert [height, width, depth] == golden[f"{case}.normalised_shape"].tolist()
    depth, height, width = fit.resized
    assert [height, width, depth] == golden[f"{case}.resized_shape"].tolist()
    assert list(fit.grid) == golden[f"{case}.patch_num_zxy"].tolist()
    assert torch.equal(batch["slice_mask"].view(-1, 32).float(), golden[f"{case}.slice_mark"])
    patches = batch["pixel_values"].view(-1, 32, 256, 256).permute(0, 2, 3, 1)[:, ::8, ::8, ::2]
    assert float((patches - golden[f"{case}.patches_every_8th"]).abs().max()) < 0.02
