"""Scans and results between archives and folders, whatever the archive speaks."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..errors import CTInstructError
from ..files import temporary_folder
from ..output.writers import WRITERS
from . import dicomweb, dimse
from .addresses import DIMSE, Address, is_address, parse_address

# what is sent: DICOM objects, in the order in which one refers to another
SENT_TYPES = ("dicom-seg", "dicom-seg-labelmap", "rtstruct", "dicom-sr")


@contextmanager
def local_inputs(inputs: Sequence[str], progress: Callable[[str], None] = lambda step: None) -> Iterator[list[Path]]:
    """Paths of inputs, of which those that are addresses are fetched to temporary folders, which go at the end.

    Raises:
        CTInstructError: for a scan that cannot be fetched.
    """
    root: Path | None = None
    try:
        paths = []
        for text in inputs:
            if not is_address(text):
                paths.append(Path(text))
                continue
            address = parse_address(text)
            if address.scheme == DIMSE:
                raise CTInstructError(
                    f"{address.server} cannot be asked for a scan by DIMSE: use dicomweb+http(s)://…, or ctinstruct watch."
                )
            root = root or temporary_folder("dicomweb")
            folder = root / (f"study-{len(paths) + 1}" if len(inputs) > 1 else "study")
            dicomweb.fetch_study(address, folder, progress=progress)
            paths.append(folder)
        yield paths
    finally:
        if root is not None:
            shutil.rmtree(root, ignore_errors=True)


def with_sent_types(output_types: Iterable[str]) -> tuple[str, ...]:
    """Output types, and those without which there is nothing to send."""
    return tuple(dict.fromkeys([*output_types, "dicom-seg", "dicom-sr"]))


def result_files(folder: Path) -> list[Path]:
    """The DICOM objects of a folder of results."""
    found: list[Path] = []
    for output_type in SENT_TYPES:
        place = folder / WRITERS[output_type][1]
        found += sorted(place.glob("*.dcm")) if place.is_dir() else [place] if place.is_file() else []
    return found


def send(files: Sequence[Path], address: Address) -> None:
    """Store DICOM files in an archive.

    Raises:
        CTInstructError: for no file, and where an object was not stored.
    """
    if not files:
        raise CTInstructError(f"Nothing was sent to {address.server}: there is no DICOM object among the results.")
    (dimse if address.scheme == DIMSE else dicomweb).store(files, address)


__all__ = ["SENT_TYPES", "local_inputs", "result_files", "send", "with_sent_types"]
