"""Masks as NIfTI on the grid of the scan that they belong to."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np

from ..processing.volume import CTVolume
from .colours import css, rgb


def save_mask(volume: CTVolume, mask: np.ndarray, path: Path) -> None:
    """One structure, 0 and 1, with exactly the shape and affine of the source."""
    volume.to_source(mask, path)


def save_label_map(volume: CTVolume, masks: dict[str, np.ndarray], path: Path) -> list[str]:
    """Structures in one file, 1 … n in the order given, as far as none shares a voxel with an earlier one.

    The table of names and colours stands in `<name>.json` beside it and in the header, as the XML that 3D viewers read; both list what
    the file holds.

    Returns:
        The structures that are left out, since they overlap.
    """
    labels = np.zeros(volume.hu.shape, dtype=np.uint8 if len(masks) < 256 else np.uint16)
    names: dict[int, str] = {}
    colours: dict[str, int] = {}
    left_out = []
    for number, (name, mask) in enumerate(masks.items()):
        if labels[mask].any():
            left_out.append(name)
            continue
        names[len(names) + 1] = name
        colours[name] = number
        labels[mask] = len(names)
    image = volume.to_source(labels)
    items = "".join(
        f'<Label Key="{index}" {_rgba(colours[name])}><![CDATA[{_cdata(name)}]]></Label>'
        for index, name in names.items()
    )
    table = f'<?xml version="1.0" encoding="UTF-8"?><CaretExtension><VolumeInformation Index="0"><LabelTable>{items}</LabelTable></VolumeInformation></CaretExtension>'
    image.header.extensions.append(nib.nifti1.Nifti1Extension("caret", table.encode()))
    nib.save(image, path)
    sidecar = path.with_name(path.name.removesuffix(".gz").removesuffix(".nii") + ".json")
    content = {
        "labels": {name: index for index, name in names.items()},
        "colours": {name: css(number) for name, number in colours.items()},
    }
    text = json.dumps(content, indent=2, ensure_ascii=False)
    sidecar.write_text(text + "\n", encoding="utf-8")
    return left_out


def _rgba(number: int) -> str:
    parts = zip(("Red", "Green", "Blue"), rgb(number), strict=True)
    return " ".join([f'{name}="{part / 255:.6f}"' for name, part in parts] + ['Alpha="1"'])


def _cdata(text: str) -> str:
    return text.replace("]]>", "]]]]><![CDATA[>")
