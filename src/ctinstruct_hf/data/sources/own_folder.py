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
from functools import cache
from os.path import commonpath
from pathlib import Path
from typing import Any

from ...errors import CTInstructError
from ..cases import Case, ImageRef, MaskRef
from ..names import distinct
from .common import Problem, label_values, read_json, read_table
from .segmentations import nnunet

# what a file or folder is, not whose
_SCANS = {"ct", "image", "images", "imagestr", "imaging", "img", "scan", "scans", "volume", "volumes", "data", "0000"}
_MASKS = {"seg", "segs", "segmentation", "segmentations", "mask", "masks", "label", "labels", "labelstr", "labelmap",
          "annotation", "annotations", "gt", "4label"}  # fmt: skip
_BETWEEN = re.compile(r"([_\-. ]+)")
_ENDINGS = re.compile(r"\.(nii(\.gz)?|nrrd|mha|mhd)$", re.IGNORECASE)
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
    files = sorted(path for path in folder.rglob("*") if _ENDINGS.search(path.name) and not path.name.startswith("."))
    generic = {path.parent for path in files if _stem(path).lower() in _SCANS}  # folders of one scan and its masks
    scans = [path for path in files if not _is_mask(path, folder, path.parent in generic)]
    if not scans:
        raise CTInstructError(
            f"{folder} has no scan as NIfTI, NRRD or MetaImage: masks lie in a folder 'masks', or are called a_seg.nii.gz."
        )
    masks: dict[Path, dict[Path, str]] = {scan: {} for scan in scans}
    for path in sorted(set(files) - set(scans)):
        owner = _scan_of(path, scans)
        if owner is None:
            yield Problem(path.relative_to(folder).as_posix(), f"{path.name} belongs to no scan of {folder.name}")
        else:
            masks[owner[0]][path] = owner[1]
    labelled = {path: _structures(path, name, folder) for group in masks.values() for path, name in group.items()}
    ours = distinct((name for values in labelled.values() for name in values), keep_plain=True)
    for scan, group in masks.items():
        name = _case_name(scan, folder)
        case = Case(name, [ImageRef(str(scan.absolute()))], "", folder.name, name)
        case.masks = [
            MaskRef(ours[structure], str(path.absolute()), values)
            for path in group
            for structure, values in labelled[path].items()
        ]
        case.structures = [mask.name for mask in case.masks]
        reports = (scan.parent / f"{one}.txt" for one in (_stem(scan), _whose(scan), "report"))
        report = next((path for path in reports if path.is_file()), None)
        if report is not None:
            case.texts["report"] = report.read_text(encoding="utf-8").strip()
        yield case


def _stem(path: Path) -> str:
    return _ENDINGS.sub("", path.name)


@cache
def _whose(path: Path) -> str:
    """A file's name without what says that it is a scan or a mask: of img0001, 0001_label and 0001 this is 0001."""
    words = _SCANS | _MASKS
    stem = re.sub(r"^([A-Za-z]+)(?=\d)", lambda found: "" if found[1].lower() in words else found[1], _stem(path))
    parts = _BETWEEN.split(stem)
    while parts and (parts[0].lower() in words or not parts[0]):
        parts = parts[2:]
    while parts and (parts[-1].lower() in words or not parts[-1]):
        parts = parts[:-2]
    return "".join(parts)


def _is_mask(path: Path, folder: Path, beside_a_scan: bool) -> bool:
    words = _BETWEEN.split(re.sub(r"\d+$", "", _stem(path).lower()))
    if {words[0], words[-1]} & _MASKS:
        return True
    if beside_a_scan:
        return _stem(path).lower() not in _SCANS
    parts = [_BETWEEN.split(part.lower())[0] for part in reversed(path.relative_to(folder).parts[:-1])]
    return next((part in _MASKS for part in parts if part in _SCANS | _MASKS), False)


def _case_name(scan: Path, folder: Path) -> str:
    """Whose scan it is: its file's name, or its folder's where all are called ct.nii.gz."""
    parts = [part for part in scan.parent.relative_to(folder).parts if part.lower() not in _SCANS]
    name = re.sub(r"_0000$", "", _stem(scan)) if _whose(scan) else ""
    if name and parts[-1:] != [name]:
        parts.append(name)
    return "/".join(parts) or folder.name


def _scan_of(mask: Path, scans: list[Path]) -> tuple[Path, str] | None:
    """The scan that a mask belongs to, and what its name says of the structure: "" for a label map.

    Raises:
        CTInstructError: where it could be of several scans.
    """
    found: list[tuple[tuple[int, int], Path, str]] = []
    stem = _whose(mask)
    for scan in scans:
        name = _whose(scan)
        near = len(Path(commonpath((scan, mask))).parts)
        if not name and mask.is_relative_to(scan.parent):  # whatever lies in its folder
            found.append(((0, near), scan, stem))
        elif name and (stem == name or mask.parent.name == name != scan.parent.name):
            found.append(((len(name), near), scan, "" if stem == name else stem))
        elif name and stem.startswith(name) and _BETWEEN.match(stem[len(name) :]):
            found.append(((len(name), near), scan, _BETWEEN.sub("", stem[len(name) :], 1)))
        elif not stem and scan.parent == mask.parent:
            found.append(((0, near), scan, ""))
    best = max((rank for rank, _, _ in found), default=None)
    nearest = [(scan, structure) for rank, scan, structure in found if rank == best]
    if len(nearest) > 1:
        raise CTInstructError(
            f"{mask.name} could belong to {nearest[0][0].name} or {nearest[1][0].name} in {mask.parent.name}: name it after one."
        )
    return nearest[0] if nearest else None


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
    stem = _stem(path)
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
    try:
        found = {structure: values for structure, values in label_values(listed).items() if values != [0]}
    except (TypeError, ValueError, AttributeError) as error:
        raise CTInstructError(
            f"{path.name} does not say which value is which structure: write {{name: value}}."
        ) from error
    if not found:
        raise CTInstructError(f"{path.name} names no structure: write {{name: value}}.")
    return found
