"""Numpy files: `.npy`, and `.npz` with a single volume; never unpickled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from .volume import CTInstructError, CTVolume, Limits, check_size, from_array, last_line, spacing_in_mm
from .volume_files import inside


def read_array_file(path: Path, spacing: tuple[float, float, float] | None, limit: Limits) -> CTVolume:
    """`.npy`, or `.npz` with a single array or an array named `ct`; never unpickled."""
    try:
        loaded = np.load(path, allow_pickle=False, mmap_mode="r")
        if hasattr(loaded, "files"):
            if not loaded.files:
                raise CTInstructError(f"{path.name} holds no array.")
            key = "ct" if "ct" in loaded.files else loaded.files[0]
            if key != "ct" and len(loaded.files) != 1:
                raise CTInstructError(f"{path.name} holds {', '.join(loaded.files)}: name the volume 'ct'.")
            _check_member(loaded, key, path, limit)
            loaded = loaded[key]
        check_size(path.name, loaded.shape, loaded.dtype.itemsize, limit)
        array = np.array(loaded)
    except CTInstructError:
        raise
    except Exception as error:
        raise CTInstructError(f"{path.name} is no readable numpy file: {last_line(error)}") from error
    sidecar = path.with_name(path.name.rsplit(".", 1)[0] + ".json")
    if spacing is None and sidecar.exists():
        try:
            stored = json.loads(inside(path.parent, sidecar.name, path.name).read_text(encoding="utf-8"))["spacing"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if isinstance(error, CTInstructError):
                raise
            raise CTInstructError(
                f"{sidecar.name} has no 'spacing': expected {{\"spacing\": [d, h, w]}} in mm."
            ) from error
        depth, height, width = spacing_in_mm(stored, sidecar.name)
        spacing = (depth, height, width)
    if spacing is None:
        raise CTInstructError(
            f"{path.name} has no voxel spacing: pass spacing=(depth, height, width) in mm, or {sidecar.name}."
        )
    volume = from_array(array, spacing, path.name, keep_padding=limit.keep_padding)
    volume.source.path = path
    return volume


def check_npz(path: Path, limit: Limits) -> None:
    """Refuse a `.npz` whose first array unpacks to more than is allowed."""
    with np.load(path, allow_pickle=False) as loaded:
        if not loaded.files:
            raise CTInstructError(f"{path.name} holds no array.")
        _check_member(loaded, loaded.files[0], path, limit)


def _check_member(loaded: Any, key: str, path: Path, limit: Limits) -> None:
    with loaded.zip.open(key + ".npy") as member:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(member)
    check_size(path.name, shape, dtype.itemsize, limit, packed=path.stat().st_size)
