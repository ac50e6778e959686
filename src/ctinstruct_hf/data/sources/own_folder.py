"""A folder of scans and masks in whatever order people keep them.

Masks are told from scans by where they lie or what they are called:
  a/ct.nii.gz  a/liver.nii.gz  a/segmentations/spleen.nii.gz     one folder a scan
  images/a.nii.gz  masks/a.nii.gz  or  a.nii.gz  a_seg.nii.gz    one label map a scan, with labels.json
  images/a.nii.gz  masks/a/liver.nii.gz  or  masks/a_liver.nii.gz
and nnU-Net's layout. A report may stand beside its scan, as a.txt or report.txt.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import CTInstructError
from ..cases import Case, ImageRef, MaskRef
from ..names import distinct
from .common import Problem, nifti_name, niftis, read_json, read_table
from .segmentations import nnunet

_SCANS = {"ct", "image", "scan", "volume", "img"}  # names that say what a file is, not whose
_MASKS = {"seg", "segs", "segmentation", "segmentations", "mask", "masks", "label", "labels", "labelmap", "annotation",
          "annotations", "labelstr"}  # fmt: skip
_NAMES = ("labels.json", "label_names.json", "names.json", "dataset.json", "labels.csv", "names.csv")


def scans_with_masks(folder: Path) -> Iterator[Case | Problem]:
    """A case for each scan, without a split.

    Raises:
        CTInstructError: where there is no scan or no mask, and for label maps whose values have no names.
    """
    if (folder / "dataset.json").is_file() and (folder / "labelsTr").is_dir():
        for found in nnunet(folder):
            if isinstance(found, Case):
                found.split = ""
            yield found
        return
    files = [path for path in niftis(folder, "**/*.nii*") if not path.name.startswith(".")]
    scans = [path for path in files if not _is_mask(path, folder)]
    if not scans:
        raise CTInstructError(f"{folder} has no NIfTI scan: masks lie in a folder 'masks', or are called a_seg.nii.gz.")
    masks = {scan: _masks_of(scan, [path for path in files if path not in scans], scans) for scan in scans}
    taken = {path for group in masks.values() for path in group}
    for path in files:
        if path not in taken and path not in scans:
            yield Problem(path.relative_to(folder).as_posix(), f"{path.name} belongs to no scan of {folder.name}")
    labelled = {path: _structures(path, name, folder) for group in masks.values() for path, name in group.items()}
    ours = distinct((name for values in labelled.values() for name in values), keep_plain=True)
    for scan, group in masks.items():
        name = _case_name(scan, folder)
        case = Case(name, [ImageRef(str(scan.absolute()))], "", folder.name, name, structures=list(ours.values()))
        case.masks = [
            MaskRef(ours[structure], str(path.absolute()), values)
            for path in group
            for structure, values in labelled[path].items()
        ]
        report = next((path for path in (scan.parent / f"{nifti_name(scan)}.txt", scan.parent / "report.txt") if path.is_file()), None)  # fmt: skip
        if report is not None:
            case.texts["report"] = report.read_text(encoding="utf-8").strip()
        yield case


def _words(path: Path) -> list[str]:
    return re.split(r"[_\-. ]+", nifti_name(path).lower())


def _is_mask(path: Path, folder: Path) -> bool:
    words = _words(path)
    if (
        _MASKS & {part.lower() for part in path.relative_to(folder).parts[:-1]}
        or words[-1] in _MASKS
        or words[0] in _MASKS
    ):
        return True
    beside = {nifti_name(other).lower() for other in niftis(path.parent)}
    return bool(_SCANS & beside) and nifti_name(path).lower() not in _SCANS


def _case_name(scan: Path, folder: Path) -> str:
    """Whose scan it is: its file's name, or its folder's where all are called ct.nii.gz."""
    name = re.sub(r"_0000$", "", nifti_name(scan))
    parent = scan.parent.relative_to(folder).as_posix()
    if name.lower() not in _SCANS:
        return (
            name if parent == "." or scan.parent.name.lower() in ("images", "scans", "imagestr") else f"{parent}/{name}"
        )
    return folder.name if parent == "." else parent


def _masks_of(scan: Path, masks: list[Path], scans: list[Path]) -> dict[Path, str]:
    """{mask file: what its name says of the structure, "" for a label map}."""
    name = nifti_name(scan)
    found: dict[Path, str] = {}
    if name.lower() in _SCANS:  # whatever lies in its folder
        return {path: _structure(nifti_name(path)) for path in masks if path.is_relative_to(scan.parent)}
    name = re.sub(r"_0000$", "", name)
    longer = [one for other in scans if (one := re.sub(r"_0000$", "", nifti_name(other))).startswith(f"{name}_")]
    for path in masks:
        stem = nifti_name(path)
        if path.parent.name == name and path.parent != scan.parent:
            found[path] = _structure(stem)
        elif any(stem == one or stem.startswith(f"{one}_") for one in longer):
            continue
        elif stem == name or re.fullmatch(rf"{re.escape(name)}[_\-.].+", stem):
            found[path] = _structure(stem[len(name) :].strip("_-. "))
    return found


def _structure(name: str) -> str:
    """The structure that a file is named after; "" where it is only called a mask."""
    words = [word for word in re.split(r"[_\-. ]+", name) if word.lower() not in _MASKS]
    return "_".join(words)


def _structures(path: Path, name: str, folder: Path) -> dict[str, list[int]]:
    """{structure: values} of a mask file."""
    listed = _listed_beside(path, folder, strict=not name)
    if listed:
        return listed
    if name:
        return {name: []}
    raise CTInstructError(
        f"{path.relative_to(folder)} is a label map whose values have no names: write {{name: value}} to labels.json beside it."
    )


def _listed_beside(path: Path, folder: Path, strict: bool) -> dict[str, list[int]]:
    """Names of a label map: of a file called like it, else of one for all in its folder or above."""
    stem = nifti_name(path)
    mine = [
        path.parent / f"{stem}{end}" for end in (".json", "_names.json", "_names.csv", "_labels.json", "_labels.csv")
    ]
    above = [parent / name for parent in (path.parent, *path.parent.parents) if parent.is_relative_to(folder) for name in _NAMES]  # fmt: skip
    for table in [*mine, *(above if strict else [])]:
        if table.is_file():
            return _read_names(table)
    return {}


def _read_names(path: Path) -> dict[str, list[int]]:
    """{structure: values} of JSON, {name: value} or {value: name}, or of CSV with a column of each."""
    if path.suffix == ".csv":
        rows = read_table(path, ())
        value = next((one for one in ("id", "value", "label", "index") if rows and one in rows[0]), None)
        name = next((one for one in ("structure", "name", "class") if rows and one in rows[0]), None)
        if value is None or name is None:
            raise CTInstructError(f"{path.name} needs a column id and a column name.")
        listed: dict[str, Any] = {row[value]: row[name] for row in rows}
    else:
        read = read_json(path)
        listed = read.get("labels", read) if isinstance(read, dict) else {}
    found: dict[str, list[int]] = {}
    try:
        for key, given in listed.items():
            structure, values = (given, key) if isinstance(given, str) else (key, given)
            ids = [int(one) for one in values] if isinstance(values, list) else [int(values)]
            if ids != [0] and structure.lower() not in ("background", "ignore"):
                found[structure] = ids
    except (TypeError, ValueError, AttributeError) as error:
        raise CTInstructError(
            f"{path.name} does not say which value is which structure: write {{name: value}}."
        ) from error
    if not found:
        raise CTInstructError(f"{path.name} names no structure: write {{name: value}}.")
    return found
