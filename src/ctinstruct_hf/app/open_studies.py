"""An open study with its files, and what an upload of several series is answered with."""

from __future__ import annotations

import base64
import io
import shutil
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import CTInstructError
from ..inference.study import Study
from ..output.colours import css
from ..output.measure import diameter_lines, in_patient, key_place, measure
from ..output.writers import file_name
from ..processing.volume import Limits
from ..processing.volume_headers import quiet_pydicom
from ..processing.volume_pixels import decode
from ..processing.volume_series import find_series
from ..processing.volume_slices import Slice
from ..processing.volume_zip import unpacked
from .label_map import LabelMap
from .review import Review


class SeveralSeries(CTInstructError):
    """An upload holds several CT series.

    Attributes:
        upload: its name, to open it again with one of them.
        series: uid, number, description, slices, spacing and picture (data URL) of each.
        skipped: name of what else lies there and the reason why it cannot be opened.
    """

    def __init__(self, sentence: str, upload: str, series: list[dict[str, Any]], skipped: list[dict[str, str]]) -> None:
        super().__init__(sentence)
        self.upload, self.series, self.skipped = upload, series, skipped


class Gone(KeyError):
    """A study that was closed."""


@dataclass
class OpenStudy:
    """A study with its files in a folder of its own, which is removed once it is closed and nobody uses it.

    Attributes:
        source: the slices as uploaded, which DICOM SEG refers to.
        masks: by structure its measurements, its file, where it is largest, the diameters of a finding as pairs of points
            (RAS mm), and whether the model knows the name.
        review: what a reader corrected.
        label_map: all masks in one file, once there is one.
        lock: held by whoever asks the study.
    """

    study: Study
    folder: Path
    source: Path | None = None
    masks: dict[str, dict[str, Any]] = field(default_factory=dict)
    review: Review = field(default_factory=Review)
    touched: float = field(default_factory=time.monotonic)
    lock: threading.Lock = field(default_factory=threading.Lock)
    closed: bool = False
    users: int = 0
    _gate: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.label_map = LabelMap(self.study.volume, self.folder / "labels.nii")

    def results(self) -> dict[str, Any]:
        """Everything that came out so far, as JSON for the page; `number` of a mask is its value in the label map."""
        found = self.study.results
        marked = [(number, name) for number, name in enumerate(list(found.masks), start=1) if name in self.masks]
        return {
            "report": found.report,
            "answers": [{"question": question, "answer": answer} for question, answer in list(found.answers)],
            "diagnosis": dict(found.diagnosis),
            "masks": {
                name: {
                    **self.masks[name],
                    "number": number,
                    "colour": css(number - 1),
                    "edited_from": self.review.edited.get(name),
                }
                for number, name in marked
            },
            "findings": dict(found.findings),
            "fitness": found.fitness,
            "sentences": self.review.sentences_of(found.report),
            "labels": dict(self.review.labels),
        }

    def keep_mask(self, name: str, mask: np.ndarray) -> dict[str, Any]:
        """Write a mask on the scan's own grid, for the viewer and to take away, and measure it."""
        file = f"{file_name(name)[:60]}.nii.gz"
        number = 1
        known = {value["file"] for key, value in self.masks.items() if key != name}
        while file in known:
            number += 1
            file = f"{file_name(name)[:60]}_{number}.nii.gz"
        (self.folder / "masks").mkdir(exist_ok=True)
        volume = self.study.volume
        image = volume.to_source(mask, self.folder / "masks" / file)
        structure = self.review.edited.get(name, name)
        lines = []
        if mask.any() and self.study.diseases.find(structure).known:
            level, ends = diameter_lines(mask, volume.spacing)
            lines = [[in_patient(volume, (level, *end)) for end in line] for line in ends]
        self.masks[name] = {
            **measure(volume, mask),
            "file": file,
            "place_mm": _largest_slice(image),
            "lines_mm": lines,
            "known": structure not in self.study.results.unknown,
        }
        return self.masks[name]

    @contextmanager
    def use(self) -> Iterator[OpenStudy]:
        """Its results and files, for one thread at a time. Raises Gone where it is closed, before or meanwhile."""
        with self._gate:
            if self.closed:
                raise Gone
            self.users += 1
        try:
            with self.lock:
                if self.closed:
                    raise Gone
                try:
                    yield self
                except Exception as error:
                    if self.closed:  # its files went
                        raise Gone from error
                    raise
        finally:
            with self._gate:
                self.users -= 1
                if self.closed:
                    self._remove()

    def close(self) -> None:
        """Remove its files now, and what a running job still writes when that ends."""
        with self._gate:
            self.closed = True
            self._remove()

    def _remove(self) -> None:
        for folder in (self.folder, self.source):
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)


def _largest_slice(image: Any) -> list[float] | None:
    """The middle of a mask (nibabel image) in the axial slice where it is largest: RAS mm, None where it is empty."""
    mask = np.asarray(image.dataobj) > 0
    if not mask.any():
        return None
    along = int(np.abs(image.affine[2, :3]).argmax())
    level, *middle = key_place(np.moveaxis(mask, along, 0))
    middle.insert(along, level)
    return [round(float(mm), 2) for mm in (image.affine @ [*middle, 1.0])[:3]]


def series_of(source: Path, max_bytes: int) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """The CT series of a file, folder or zip, and what else lies there with the reason why it cannot be opened, as JSON;
    nothing where they cannot be listed."""
    try:
        unpacking = unpacked(source, Limits(max_bytes)) if zipfile.is_zipfile(source) else nullcontext(source)
        with quiet_pydicom(), unpacking as folder:
            found = find_series(folder, Limits(max_bytes))
            readable = [
                {
                    "uid": one.uid,
                    "number": one.number,
                    "description": one.description,
                    "slices": one.slices,
                    "spacing": None if one.spacing is None else [round(float(mm), 3) for mm in one.spacing],
                    "picture": _thumbnail(one.images[len(one.images) // 2]),
                }
                for one in found
            ]
    except CTInstructError:
        return [], []
    return readable, [{"name": one.name, "reason": one.reason} for one in found.skipped]


def _thumbnail(one: Slice) -> str | None:
    """A slice as a small picture (data URL); None where it cannot be decoded."""
    try:
        words = decode(one.path, one.header)
    except CTInstructError:
        return None
    plane = words[one.frame] if words.ndim == 3 else words
    hu = plane * float(one.slope or 1) + float(one.intercept or 0)
    image = Image.fromarray(np.clip((hu + 400) / 1000 * 255, 0, 255).astype(np.uint8))
    image.thumbnail((96, 96))
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
