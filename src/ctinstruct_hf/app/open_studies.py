"""An open study with its files, and what an upload of several series is answered with."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CTInstructError
from ..inference.study import Study
from ..output.colours import css
from .label_map import LabelMap


class SeveralSeries(CTInstructError):
    """An upload holds several CT series.

    Attributes:
        upload: its name, to open it again with one of them.
        series: uid, number, description, slices and spacing of each.
    """

    def __init__(self, sentence: str, upload: str, series: list[dict[str, Any]]) -> None:
        super().__init__(sentence)
        self.upload, self.series = upload, series


class Gone(KeyError):
    """A study that was closed."""


@dataclass
class OpenStudy:
    """A study with its files in a folder of its own, which is removed once it is closed and nobody uses it.

    Attributes:
        source: the slices as uploaded, which DICOM SEG refers to.
        masks: by structure its measurements, its file, and where it is largest.
        label_map: all masks in one file, once there is one.
        lock: held by whoever asks the study.
    """

    study: Study
    folder: Path
    source: Path | None = None
    masks: dict[str, dict[str, Any]] = field(default_factory=dict)
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
                name: {**self.masks[name], "number": number, "colour": css(number - 1)} for number, name in marked
            },
            "findings": dict(found.findings),
            "fitness": found.fitness,
        }

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


def series_of(source: Path, max_bytes: int) -> list[dict[str, Any]]:
    """The CT series of a file, folder or zip, as JSON; [] where they cannot be listed."""
    from ..processing.volume_series import list_series

    try:
        return [
            {
                "uid": one.uid,
                "number": one.number,
                "description": one.description,
                "slices": one.slices,
                "spacing": None if one.spacing is None else [round(float(mm), 3) for mm in one.spacing],
            }
            for one in list_series(source, max_bytes)
        ]
    except CTInstructError:
        return []
