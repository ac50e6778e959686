"""The CT series of a DICOM file, folder or zip, and which of them is read."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .volume import MAX_BYTES, CTInstructError, Limits
from .volume_headers import DIRECTORY, Skipped, class_of, list_files, quiet_pydicom, read_headers, text, what_it_is
from .volume_slices import Slice, slices_of
from .volume_stacks import stacks_of
from .volume_zip import unpacked


@dataclass
class DicomSeries:
    """CT images that make a scan.

    Attributes:
        uid: the SeriesInstanceUID; where images under the same UID make several scans, with -1, -2 … behind it.
        number: the SeriesNumber, None where the file has none.
        description: the SeriesDescription, with the marks that differ between scans under the same UID.
        modality: CT.
        slices: how many.
        spacing: mm along (depth, height, width), as stored; None where the files do not say.
        files: in the order of the slices; the zip itself for a zip.
        notes: warnings, a sentence each.
        images: the slices from the first position to the last; none for a zip.
    """

    uid: str
    number: int | None
    description: str
    modality: str
    slices: int
    spacing: tuple[float, float, float] | None
    files: list[Path] = field(repr=False)
    notes: list[str] = field(default_factory=list, repr=False)
    images: list[Slice] = field(default_factory=list, repr=False)

    def __str__(self) -> str:
        parts = [f"number {self.number}"] if self.number is not None else []
        parts += [repr(self.description)] if self.description else []
        parts += [f"{self.slices} slices" + (f" every {self.spacing[0]:.3g} mm" if self.spacing else "")]
        return f"{self.uid} ({', '.join(parts)})"


class SeriesList(list[DicomSeries]):
    """The CT series that can be read, and what lies beside them.

    Attributes:
        skipped: other modalities by series, files that cannot be read, links that lead out of the folder.
        looked_at: how many files.
    """

    def __init__(self, series: Iterable[DicomSeries] = (), skipped: Iterable[Skipped] = (), looked_at: int = 0) -> None:
        super().__init__(series)
        self.skipped = list(skipped)
        self.looked_at = looked_at


def list_series(path: str | Path, max_bytes: int | None = None) -> SeriesList:
    """The CT series of a DICOM file, a folder (at any depth) or a zip, without their pixels.

    Args:
        path: what `read_volume` takes as DICOM.
        max_bytes: what a zip may unpack to, 4 GiB by default.

    Returns:
        A list of `DicomSeries`, by number; its `skipped` lists what is not read and why. Each `uid` is a `series=` of
        `read_volume`. Empty where there is no CT.

    Raises:
        CTInstructError: where the path does not exist or is a broken zip.
    """
    path, limit = Path(path), Limits(MAX_BYTES if max_bytes is None else max_bytes)
    if not path.exists():
        raise CTInstructError(f"{path} does not exist.")
    with quiet_pydicom():
        if not (path.is_file() and zipfile.is_zipfile(path)):
            return find_series(path, limit)
        with unpacked(path, limit) as folder:
            found = find_series(folder, limit)
        for series in found:
            series.files, series.images = [path], []
        for skipped in found.skipped:
            skipped.files = [path]
        return found


def find_series(path: Path, limit: Limits) -> SeriesList:
    """The CT series of a file or folder with their slices."""
    files, skipped = list_files(path) if path.is_dir() else ([path], [])
    headers, broken = read_headers(files, limit)
    skipped += broken
    images: dict[str, list[Slice]] = {}
    others: dict[tuple[str, str], Skipped] = {}
    for file, header in headers:
        what, uid = what_it_is(header), text(header, "SeriesInstanceUID")
        if what == "CT":
            try:
                images.setdefault(uid, []).extend(slices_of(file, header))
            except CTInstructError as error:
                skipped.append(Skipped(file.name, str(error).removeprefix(f"{file.name} "), [file]))
        elif class_of(header) == DIRECTORY:  # beside the files themselves it is not needed
            if len(headers) == 1:
                skipped.append(Skipped(file.name, "is the index of a DICOM folder: give the folder itself", [file]))
        else:
            name = " ".join(part for part in (what, text(header, "SeriesNumber"), describe(header)) if part)
            others.setdefault((what, uid), Skipped(name, "is no CT image", modality=what)).files.append(file)
    found = SeriesList(skipped=[*skipped, *others.values()], looked_at=len(files))
    for uid, slices in images.items():
        if slices:
            try:
                _add_stacks(uid, slices, found)
            except CTInstructError as error:
                found.skipped.append(
                    Skipped(f"Series {uid}", f"cannot be read: {error}", [image.path for image in slices], "CT")
                )
    found.sort(key=lambda series: (series.number is None, series.number or 0, series.uid))
    return found


def _add_stacks(uid: str, slices: list[Slice], found: SeriesList) -> None:
    notes: list[str] = []
    stacks, left_out = stacks_of(slices, notes)
    for label, images, reason in left_out:
        name = f"{len(images)} images of series {uid}" + (f" ({label})" if label else "")
        found.skipped.append(Skipped(name, reason, list(dict.fromkeys(image.path for image in images)), "CT"))
    for index, (label, images, more) in enumerate(stacks, start=1):
        first = images[0].header
        description = " ".join(part for part in (describe(first), f"({label})" if label else "") if part)
        try:
            number = int(text(first, "SeriesNumber"))
        except ValueError:
            number = None
        found.append(
            DicomSeries(
                f"{uid}-{index}" if len(stacks) > 1 else uid,
                number,
                description,
                "CT",
                len(images),
                _spacing(images),
                [image.path for image in images],
                [*notes, *more],
                images,
            )
        )


def describe(header: Any) -> str:
    """The SeriesDescription on a single line."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(header.get("SeriesDescription") or "")).split())


def _spacing(images: list[Slice]) -> tuple[float, float, float] | None:
    pixel, depth = images[0].pixel_spacing, images[0].thickness
    if len(images) > 1:
        normal = np.cross(*images[0].orientation)
        depth = float(np.median(np.diff([image.along(normal) for image in images])))
    return None if pixel is None or depth is None else (depth, *pixel)


def choose_series(found: SeriesList, wanted: str | int | None, name: str) -> DicomSeries:
    """The only series, or the series wanted by UID, number, part of the description, `largest` or `thinnest`.

    Raises:
        CTInstructError: where none or several fit, with the list of what there is.
    """
    listed = ", ".join(map(str, found))
    if wanted is None:
        if len(found) > 1:
            raise CTInstructError(f"{name} holds {len(found)} CT series, name one as series=: {listed}.")
        return found[0]
    asked = str(wanted).strip()
    word = asked.lower()
    if word == "all":
        raise CTInstructError(f"{name}: one scan is read here and 'all' means several, name one as series=: {listed}.")
    if word in ("largest", "thinnest"):
        thickness = [(series.spacing or (np.inf,))[0] for series in found]
        order = sorted(
            range(len(found)),
            key=lambda k: (-found[k].slices, thickness[k]) if word == "largest" else (thickness[k], -found[k].slices),
        )
        return found[order[0]]
    for fits in (
        [series for series in found if asked in (series.uid, series.uid.partition("-")[0])],
        [series for series in found if asked.isdecimal() and series.number == int(asked)],
        [series for series in found if series.description.lower() == word],
        [series for series in found if word in series.description.lower() and not asked.isdecimal()],
    ):
        if len(fits) == 1:
            return fits[0]
        if fits:
            listed = ", ".join(map(str, fits))
            raise CTInstructError(f"{name} has {len(fits)} CT series that fit series={asked}, name one: {listed}.")
    raise CTInstructError(f"{name} has no CT series {asked}; it has {listed}.")


__all__ = ["DicomSeries", "SeriesList", "Skipped", "choose_series", "find_series", "list_series"]
