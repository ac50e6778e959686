"""Masks as NIfTI on the grid of the scan that they belong to."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np

from ..processing.volume import CTVolume


def save_mask(volume: CTVolume, mask: np.ndarray, path: Path) -> None:
    """One structure, 0 and 1, with exactly the shape and affine of the source."""
    volume.to_source(mask.astype(np.uint8), path)


def save_label_map(volume: CTVolume, masks: dict[str, np.ndarray], path: Path) -> dict[int, str]:
    """All structures in one file, 1 … n in the order given; later ones lie over earlier ones.

    The table of names stands in `<name>.json` beside it and in the header, as the XML that 3D viewers read.
    """
    labels = np.zeros(volume.hu.shape, dtype=np.uint8 if len(masks) < 256 else np.uint16)
    names = dict(enumerate(masks, start=1))
    for index, name in names.items():
        labels[masks[name]] = index
    image = volume.to_source(labels)
    items = "".join(f'<Label Key="{index}"><![CDATA[{name}]]></Label>' for index, name in names.items())
    table = f'<?xml version="1.0" encoding="UTF-8"?><CaretExtension><VolumeInformation Index="0"><LabelTable>{items}</LabelTable></VolumeInformation></CaretExtension>'
    image.header.extensions.append(nib.nifti1.Nifti1Extension("caret", table.encode()))
    nib.save(image, path)
    sidecar = path.with_name(path.name.removesuffix(".gz").removesuffix(".nii") + ".json")
    sidecar.write_text(json.dumps({"labels": {name: index for index, name in names.items()}}, indent=2) + "\n")
    return names
