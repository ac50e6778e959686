"""Prepared patches on disk, one memory-mapped safetensors file an image, so that an epoch does not inflate again.

A file is written under a temporary name and renamed: any number of processes may share a store, and a killed one leaves
nothing half-written that would be read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..errors import CTInstructError
from ..files import whole_file
from ..processing.image_processing_ctinstruct import CTInstructImageProcessor
from ..processing.volume import CTVolume, VolumeSource
from .cases import ImageRef, MaskRef
from .label_maps import has_labels, labels_in, with_labels
from .reading import open_labels, open_volume

Prepared = dict[str, torch.Tensor]
TINY_PATCH = {"depth": 32, "height": 128, "width": 128}  # of the preset `tiny`


class PatchStore:
    """Patches and label canvases of images by reference.

    Args:
        image_processor: how volumes become patches; part of every file's key.
        folder: where files are kept; None prepares every time.
        limit: GB (10^9 bytes) that all files of the folder may take: where a new one passes them, the oldest are removed, down
            to nine tenths. Several readers may pass it for a while by a sixteenth of what is free, each.

    Raises:
        CTInstructError: for a limit that is no positive number.
    """

    def __init__(
        self, image_processor: CTInstructImageProcessor, folder: Path | str | None = None, limit: float | None = None
    ) -> None:
        if limit is not None and not limit > 0:
            raise CTInstructError(f"cache_limit is {limit}: give a number of GB above 0, or none.")
        self.image_processor = image_processor
        self.folder = None if folder is None else Path(folder)
        self.limit = limit
        self._room = 0.0  # bytes that may be written before the folder is looked through
        settings = {name: value for name, value in image_processor.to_dict().items() if name != "auto_map"}
        self._settings = json.dumps(settings, sort_keys=True, default=str)
        self._volumes: dict[str, CTVolume] = {}  # of the images that were read last
        self._last: dict[str, Prepared] = {}  # what was read last: an image's masks are asked for one after the other

    def image(self, image: ImageRef) -> Prepared:
        """pixel_values float16 [N, patch height, patch width], patch_grid int64 [1, 4], slice_mask bool [N]."""
        prepared = self._entry(self.key(image), lambda: self._prepare(image))
        return {name: prepared[name] for name in ("pixel_values", "patch_grid", "slice_mask")}

    def mask(self, image: ImageRef, mask: MaskRef) -> torch.Tensor:
        """One structure on the image's canvas: int8 [D, H, W], 1 inside, 0 outside, −1 padding."""
        labels = self._labels(image, mask.path)
        return _relabelled(labels, (mask.values or range(1, 128)) if mask.path else ())

    def _labels(self, image: ImageRef, path: str) -> torch.Tensor:
        """A label file on the image's canvas: int8 [D, H, W], −1 = padding. On disk all label files of an image share one map."""

        def prepare() -> Prepared:
            volume = self._geometry(image)
            labels = open_labels(path, volume) if path else np.zeros(volume.shape, np.int16)
            return {"labels": self.image_processor.labels_to_canvas(labels, volume)}

        alone = self.key(image, path or "none")
        if self.folder is None:
            return self._entry(alone, prepare)["labels"]
        key = self.key(image, "label map")
        place = place_of(self.folder, key)
        shared = self._last.pop(key, None)
        if (shared is None or not has_labels(shared, alone)) and place.exists():  # another process may have added it
            shared = read_or_make(place, prepare)
        if shared is None or not has_labels(shared, alone):
            added = with_labels(shared, prepare()["labels"], alone)
            if added is None:  # more than a map can tell apart
                return self._entry(alone, prepare)["labels"]
            shared = added
            write_prepared(place, shared)
            self._make_room(place)
        self._keep(key, shared)
        return labels_in(shared, alone)

    def _geometry(self, image: ImageRef) -> CTVolume:
        """A volume without its HU, where labels are put on the canvas by its grid alone: its scan is opened once."""
        key = self.key(image)
        if key not in self._volumes:
            prepared = self._entry(key, lambda: self._prepare(image))
            volume = _without_hu(prepared) if "orientation" in prepared else open_volume(image)
            self._volumes = {**dict(list(self._volumes.items())[-3:]), key: volume}
        return self._volumes[key]

    def _prepare(self, image: ImageRef) -> Prepared:
        volume = open_volume(image)
        rows, fit = self.image_processor.prepare(volume)
        patches = rows.to(torch.float16)
        if not bool(torch.isfinite(patches).all()):
            raise CTInstructError(f"{image.path} has values that are NaN, infinite or far beyond HU once prepared.")
        prepared = {
            "pixel_values": patches,
            "patch_grid": torch.tensor([[*fit.grid, fit.patch[0]]]),
            "slice_mask": fit.slice_mask().flatten(),
        }
        if self.image_processor.intensity == "zscore":  # cropped to what is not air: its labels need its HU
            self._volumes = {self.key(image): volume}
            return prepared
        return {**prepared, **_grid_of(volume)}

    def key(self, image: ImageRef, *more: str) -> str:
        """What changes when the image, another file of it, or the settings do."""
        state = [self._settings, asdict(image), [file_state(path) for path in (image.path, *more)]]
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:32]

    def _entry(self, key: str, prepare: Callable[[], Prepared]) -> Prepared:
        kept = self._last.pop(key, None)
        if kept is None:
            kept = self._read(key, prepare) if self.folder is not None else prepare()
        self._keep(key, kept)
        return kept

    def _keep(self, key: str, kept: Prepared) -> None:
        self._last = {**dict(list(self._last.items())[-3:]), key: kept}

    def _read(self, key: str, prepare: Callable[[], Prepared]) -> Prepared:
        assert self.folder is not None
        path = place_of(self.folder, key)
        new = not path.exists()
        found = read_or_make(path, prepare)
        if new:
            self._make_room(path)
        return found

    def _make_room(self, written: Path) -> None:
        """Keep the folder within its limit, once a file is there."""
        if self.limit is None or self.folder is None:
            return
        self._room -= _stat(written)[1]
        if self._room > 0:
            return
        files = {path: _stat(path) for path in self.folder.glob("*/*.safetensors")}
        total, most = sum(size for _, size in files.values()), self.limit * 1e9
        if total > most:
            for path in sorted(set(files) - {written}, key=files.__getitem__):
                path.unlink(missing_ok=True)  # who has it open reads on
                total -= files[path][1]
                if total <= 0.9 * most:
                    break
        self._room = (most - total) / 16


def _stat(path: Path) -> tuple[int, int]:
    """(time of writing, bytes) of a file; (0, 0) of one that another process has removed."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_size


def _grid_of(volume: CTVolume) -> Prepared:
    """Where a volume lies, as tensors."""
    return {
        "shape": torch.tensor(volume.shape),
        "affine": torch.from_numpy(volume.affine.astype(np.float64)),
        "source_affine": torch.from_numpy(np.asarray(volume.source.affine, np.float64)),
        "orientation": torch.from_numpy(np.asarray(volume.source.orientation, np.float64)),
        "is_array": torch.tensor(volume.source.kind == "array"),
    }


def _without_hu(prepared: Prepared) -> CTVolume:
    """The volume of `_grid_of`; its HU are 0 and take no memory."""
    shape = tuple(prepared["shape"].tolist())
    kind = "array" if bool(prepared["is_array"]) else "file"
    source = VolumeSource(shape, prepared["source_affine"].numpy(), prepared["orientation"].numpy(), kind)
    return CTVolume(np.broadcast_to(np.int16(0), shape), prepared["affine"].numpy(), source)


def place_of(folder: Path, key: str) -> Path:
    """Where a store keeps what has this key."""
    return folder / key[:2] / f"{key}.safetensors"


def read_or_make(path: Path, prepare: Callable[[], Prepared]) -> Prepared:
    """The tensors of a file, made where it is not there yet."""
    while True:
        if not path.exists():
            write_prepared(path, prepare())
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
        except FileNotFoundError:  # removed in between by a process whose cache is full
            continue


def write_prepared(path: Path, tensors: Prepared) -> None:
    """A file of tensors, whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)


def _relabelled(labels: torch.Tensor, values: Iterable[int]) -> torch.Tensor:
    """1 where a label is among the values, 0 elsewhere, −1 kept: one pass through a table of all int8 values."""
    table = np.zeros(256, np.int8)
    table[list(values)] = 1
    table[255] = -1  # as int8: padding
    return torch.from_numpy(table[labels.numpy().view(np.uint8)])


def file_state(path: str) -> list[object]:
    """What changes when a file does: its path, size and time."""
    try:
        stat = os.stat(path)
    except OSError:
        return [path]
    return [path, stat.st_size, stat.st_mtime_ns]
