"""`read_volume`: a CT volume from a file, a folder or an object."""

from __future__ import annotations

import os
import re
import zipfile
from pathlib import Path
from typing import Any

import nibabel as nib

from .volume import MAX_BYTES, CTInstructError, CTVolume, Limits, as_numpy, from_array, is_volume, last_line
from .volume_arrays import read_array_file
from .volume_dicom import read_dicom
from .volume_files import open_inflated
from .volume_headers import list_files, some
from .volume_itk import ITK_SUFFIXES, from_simpleitk, read_itk
from .volume_nifti import from_nibabel, read_nifti
from .volume_pictures import PICTURE_SUFFIXES, from_picture, read_picture
from .volume_plausibility import check_plausible
from .volume_zip import unpacked

_HEAD = 4096
_META = re.compile(rb"(\s*\w+\s*[=:][^\n]*\n)+")
_PICTURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*", b"GIF8")
_ENDINGS = {
    "nifti": (".nii", ".nii.gz", ".hdr", ".img"),
    "array": (".npy", ".npz"),
    "picture": PICTURE_SUFFIXES,
    "itk": ITK_SUFFIXES,
}


def read_volume(
    source: Any,
    *,
    spacing: tuple[float, float, float] | None = None,
    series: str | int | None = None,
    window: tuple[float, float] | None = None,
    max_bytes: int | None = None,
    keep_padding: bool = False,
    labels: bool = False,
) -> CTVolume:
    """Read a CT volume from a file, a folder or an object.

    Args:
        source: NIfTI (`.nii`, `.nii.gz`, `.hdr/.img`), a DICOM file, folder or zip, `.mha/.mhd/.nrrd/.nhdr`,
            `.npy/.npz`, a picture (PNG, JPEG, BMP, TIFF: one slice), a nibabel or SimpleITK image, a numpy array or
            torch tensor (depth, height, width), or a `CTVolume`, which is returned as it is. A file's first bytes
            decide its format, not its name.
        spacing: mm along (depth, height, width); for arrays, and for files that have none. An array file may have it
            beside it instead, as `<name>.json` with `{"spacing": [...]}`.
        series: which CT series to read where there are several (`list_series`): its SeriesInstanceUID, its number, a part of
            its description, `largest` (most slices) or `thinnest`.
        window: HU of black and white in a picture, −1250…250 by default.
        max_bytes: what the volume may unpack to, 4 GiB by default; checked before anything is allocated. A packed file
            may grow to 256 MiB or 200 times its size, whichever is more.
        keep_padding: leave values below −1024 HU as stored instead of setting them to air.
        labels: read a label map, whose integers are kept as stored; without it, a label map is refused.

    Raises:
        CTInstructError: one sentence naming the file, what was found and what to do.
    """
    limit = Limits(MAX_BYTES if max_bytes is None else int(max_bytes), keep_padding or labels, labels)
    if is_volume(source):
        return source
    volume = _read(source, spacing, series, window, limit)
    if not labels:
        # an array is in HU by contract and DICOM names its modality: there labels only give a warning
        bare = volume.source.kind == "dicom" or (volume.source.kind == "array" and volume.source.path is None)
        check_plausible(volume, refuse_labels=not bare)
    return volume


def _read(
    source: Any,
    spacing: tuple[float, float, float] | None,
    series: str | int | None,
    window: tuple[float, float] | None,
    limit: Limits,
) -> CTVolume:
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        try:
            return _read_path(path, spacing, series, window, limit)
        except CTInstructError:
            raise
        except Exception as error:  # libraries raise many classes on broken files
            raise CTInstructError(
                f"{path.name} cannot be read: {last_line(error)} ({type(error).__name__})."
            ) from error
    if isinstance(source, nib.spatialimages.SpatialImage):
        return from_nibabel(source, limit)
    if type(source).__module__.partition(".")[0] == "SimpleITK":
        return from_simpleitk(source, limit)
    if hasattr(source, "mode") and hasattr(source, "getbands"):
        return from_picture(source, "the picture", spacing, window)
    array = as_numpy(source)
    if array.dtype == object:
        raise CTInstructError(
            f"A volume cannot be read from a {type(source).__name__}: give a path, an image or an array."
        )
    return from_array(array, (1.0, 1.0, 1.0) if spacing is None else spacing, keep_padding=limit.keep_padding)


def _read_path(
    path: Path,
    spacing: tuple[float, float, float] | None,
    series: str | int | None,
    window: tuple[float, float] | None,
    limit: Limits,
) -> CTVolume:
    if not path.exists():
        raise CTInstructError(f"{path} does not exist.")
    if path.is_file() and path.stat().st_size == 0:
        raise CTInstructError(f"{path.name} is empty.")
    form = format_of(path)
    if form == "nifti":
        return read_nifti(path, limit)
    if form == "array":
        return read_array_file(path, spacing, limit)
    if form == "picture":
        return read_picture(path, spacing, window, limit)
    if form == "itk":
        return read_itk(path, spacing, limit)
    if form == "zip":
        return _read_zip(path, series, spacing, limit)
    return read_dicom(path, series, spacing, limit)


def format_of(path: Path) -> str:
    """nifti, itk, array, picture, zip or dicom (also a folder), by a file's first bytes.

    The name's ending decides where the bytes do not, so that errors name the format a broken file is called by; in a pair
    the `.img` holds nothing but voxels.
    """
    if not path.is_file():
        return "dicom"
    name = path.name.lower()
    pair = name.removesuffix(".gz").endswith((".hdr", ".img"))
    found, packed = format_of_contents(path)
    if pair and found != "zip":
        found = "nifti"
    if packed and found in ("array", "itk", "picture"):
        raise CTInstructError(f"{path.name} is packed by gzip: unpack it first (only NIfTI is read packed).")
    if found:
        return found
    for form, endings in _ENDINGS.items():
        if name.endswith(endings):
            return form
    return "dicom"


def format_of_contents(path: Path) -> tuple[str, bool]:
    """The format by a file's first bytes, "" where they are unknown, and whether it is packed by gzip."""
    with open(path, "rb") as file:
        start = file.read(_HEAD)
    if start.startswith(b"PK"):
        return "array" if _is_npz(path) else "zip", False
    packed = start.startswith(b"\x1f\x8b")
    return _format_of_bytes(_inflated_start(path) if packed else start), packed


def _format_of_bytes(start: bytes) -> str:
    """The format by the first bytes of a file, "" where they are unknown."""
    if start[128:132] == b"DICM":
        return "dicom"
    if start.startswith(b"\x93NUMPY"):
        return "array"
    if start.startswith(b"NRRD000") or ((b"ObjectType" in start or b"NDims" in start) and _META.match(start)):
        return "itk"
    if start.startswith(_PICTURES) or (start[:4] == b"RIFF" and start[8:12] == b"WEBP"):
        return "picture"
    sizes = {int.from_bytes(start[:4], order) for order in ("little", "big")}
    if 540 in sizes or (348 in sizes and start[344:347] in (b"n+1", b"ni1")):
        return "nifti"
    return ""


def _is_npz(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return path.name.lower().endswith(".npz")
    return all(name.endswith(".npy") for name in names) if names else path.name.lower().endswith(".npz")


def _inflated_start(path: Path) -> bytes:
    """The first bytes of what a gzip file holds, b"" where it is broken."""
    try:
        with open_inflated(path) as stream:
            return stream.read(_HEAD)
    except Exception:  # isal and zlib raise different classes
        return b""


def _read_zip(
    path: Path, series: str | int | None, spacing: tuple[float, float, float] | None, limit: Limits
) -> CTVolume:
    """The DICOM series of a zip, or its only other scan."""
    with unpacked(path, limit) as folder:
        scan = _scan_of(folder)
        if scan is None:
            volume = read_dicom(folder, series, spacing, limit)
        else:
            try:
                volume = _read_path(scan, spacing, series, None, limit)
            except CTInstructError as error:
                raise CTInstructError(f"{path.name}: {error}") from error
        volume.source.name, volume.source.path = path.name, path
        volume.source.dicom_files = []
        return volume


def _scan_of(folder: Path) -> Path | None:
    """The scan of an unpacked zip that holds a single file of another format; None where it is read as DICOM.

    Raises:
        CTInstructError: for several, and for a zip in the zip.
    """
    files, _ = list_files(folder)
    if any(_is_dicom(file) for file in files):
        return None
    forms = {file: format_of(file) for file in files}
    nested = [file.name for file, form in forms.items() if form == "zip"]
    scans = [
        file for file, form in forms.items() if form in ("nifti", "itk", "array") and file.suffix.lower() != ".img"
    ]
    if len(scans) > 1 or (nested and not scans):
        held = f"{len(scans)} scans ({some([file.name for file in scans])})" if scans else f"a zip ({some(nested)})"
        raise CTInstructError(f"{folder.name} holds {held}: give one scan.")
    return scans[0] if scans else files[0] if len(files) == 1 else None


def _is_dicom(file: Path) -> bool:
    """Whether a file begins as DICOM does."""
    with open(file, "rb") as stream:
        return stream.read(132)[128:] == b"DICM"


__all__ = ["format_of", "format_of_contents", "read_volume"]
