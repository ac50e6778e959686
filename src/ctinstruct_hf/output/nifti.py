"""Masks as NIfTI on the grid of the scan that they belong to."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np

from ..processing.volume import CTVolume


def save_mask(volume: CTVolume, mask: np.ndarray, path: Path) -> None:
    """One structure, 0 and 1, with exactly the shape and affine of the source."""
    volume.to_source(mask, path)


def save_label_map(volume: CTVolume, masks: dict[str, np.ndarray], path: Path) -> list[str]:
    """Structures in one file, 1 … n in the order given, as far as none shares a voxel with an earlier one.

    The table of names stands in `<name>.json` beside it and in the header, as the XML that 3D viewers read; both list what
    the file holds.

    Returns:
        The structures that are left out, since they overlap.
    """
    labels = np.zeros(volume.hu.shape, dtype=np.uint8 if len(masks) < 256 else np.uint16)
    names: dict[int, str] = {}
    left_out = []
    for name, mask in masks.items():
        if labels[mask].any():
            left_out.append(name)
            continue
        names[len(names) + 1] = name
        labels[mask] = len(names)
    image = volume.to_source(labels)
    items = "".join(f'<Label Key="{index}"><![CDATA[{_cdata(name)}]]></Label>' for index, name in names.items())
    table = f'<?xml version="1.0" encoding="UTF-8"?><CaretExtension><VolumeInformation Index="0"><LabelTable>{items}</LabelTable></VolumeInformation></CaretExtension>'
    image.header.extensions.append(nib.nifti1.Nifti1Extension("caret", table.encode()))
    nib.save(image, path)
    sidecar = path.with_name(path.name.removesuffix(".gz").removesuffix(".nii") + ".json")
    text = json.dumps({"labels": {name: index for index, name in names.items()}}, indent=2, ensure_ascii=False)
    sidecar.write_text(text + "\n", encoding="utf-8")
    return left_out


def _cdata(text: str) -> str:
    return text.replace("]]>", "]]]]><![CDATA[>")
