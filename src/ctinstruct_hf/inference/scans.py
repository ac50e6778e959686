"""The scans below a path: volume files and DICOM series at any depth, and the files left out."""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CTInstructError

# files that hold a volume each; pictures and slices are read only where the input names them
VOLUME_SUFFIXES = (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".nhdr", ".npy", ".npz", ".zip")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
SCAN_SUFFIXES = (*VOLUME_SUFFIXES, ".dcm", *PICTURE_SUFFIXES)
# endings of files that belong to a volume file of the same name
_BESIDE = (".raw", ".zraw", ".raw.gz", ".img", ".img.gz", ".json")


@dataclass
class Scan:
    """A scan: what `read_volume` needs, and its name.

    Attributes:
        path: a file or a folder.
        series: SeriesInstanceUID of the DICOM series in it; None where the path is the scan.
        name: of its folder of results.
        files: that it is read from.
        study: equal for DICOM series of the same study, "" for others; identifies a patient, so it is compared only.
        description: number, description and slices of a DICOM series.
    """

    path: Path
    series: str | None = None
    name: str = ""
    files: list[Path] = field(default_factory=list, repr=False)
    study: str = field(default="", repr=False)
    description: str = ""

    def __post_init__(self) -> None:
        self.name = self.name or scan_name(self.path) or "scan"
        self.files = self.files or files_of(self.path)

    def fingerprint(self) -> str:
        """SHA-256 over the names and contents of its files and the series; "" where they cannot be read."""
        from .fingerprint import hash_files, last_change

        try:
            folder = Path(os.path.commonpath([file.resolve().parent for file in self.files]))
            listed = [(file.resolve().relative_to(folder), file.stat()) for file in self.files]
            states = sorted((name.as_posix(), state.st_size, last_change(state)) for name, state in listed)
            return hashlib.sha256(f"{self.series}\0{hash_files(folder, tuple(states))}".encode()).hexdigest()
        except (OSError, ValueError):
            return ""


class Scans(list[Scan]):
    """Scans in the order of their paths.

    Attributes:
        skipped: (path, reason) of files and folders below the inputs that are no scan.
    """

    def __init__(self, scans: Iterable[Scan] = (), skipped: Iterable[tuple[Path, str]] = ()) -> None:
        super().__init__(scans)
        self.skipped = list(skipped)

    def is_one_study(self, inputs: Sequence[Path]) -> bool:
        """Whether the inputs are a single file, or a folder with a single DICOM study and nothing else."""
        if len(inputs) != 1 or not self:
            return False
        whole = self[0].path == inputs[0]
        uids = {scan.series for scan in self}  # a UID twice: copies, or patients with equal UIDs
        alike = len({scan.study for scan in self}) == 1 and len(uids) == len(self)
        return alike and (bool(self[0].study) or whole)


def scan_name(scan: Path) -> str:
    """A scan's file name without its endings."""
    name = scan.name or scan.resolve().name
    for suffix in sorted((*SCAN_SUFFIXES, ".hdr", ".hdr.gz"), key=len, reverse=True):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def files_of(path: Path) -> list[Path]:
    """The files of a scan by its path: all below a folder, or a file with its raw data and sidecar."""
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    beside = [path.with_name(scan_name(path) + suffix) for suffix in _BESIDE]
    return [path, *(file for file in beside if file != path and file.is_file())]


def find_scans(inputs: Sequence[Path], series: str | None = None) -> Scans:
    """Every scan below the inputs, at any depth: volume files, and the CT series of DICOM files.

    Args:
        inputs: files and folders.
        series: which CT series of each DICOM study: a UID, a number, a part of the description, `largest`, `thinnest`;
            `all` by default.

    Raises:
        CTInstructError: for a path that does not exist, a series that no study has, or folders without any scan.
    """
    found = Scans()
    for path in inputs:
        if not path.exists():
            raise CTInstructError(f"{path} does not exist.")
        if path.is_dir():
            _walk(path, series, found)
        else:
            _add_file(path, path.parent, series, found)
    if not found:
        chosen = [reason for _, reason in found.skipped if reason.startswith("no series fits")]
        if chosen:
            raise CTInstructError(f"{inputs[0]}: {chosen[0]}.")
        if len(inputs) == 1 and inputs[0].is_dir():  # reading it gives the error
            return Scans([Scan(inputs[0], series)])
    return found


def _walk(root: Path, series: str | None, found: Scans) -> None:
    """Volume files and DICOM series of a folder."""
    volumes: list[Path] = []
    others: dict[Path, list[Path]] = {}  # by the folder just below the root
    for base, folders, names in os.walk(root):
        if "findings.json" in names and Path(base) != root:
            found.skipped.append((Path(base), "results of an earlier run"))
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        for name in [*folders]:
            if Path(base, name).is_symlink():
                found.skipped.append((Path(base, name), "a link to a folder, which is not followed"))
        for name in sorted(names):
            file = Path(base, name)
            if name.startswith(".") or (file.is_symlink() and not file.resolve().is_relative_to(root.resolve())):
                found.skipped.append((file, "a hidden file" if name.startswith(".") else "a link out of the folder"))
            elif _is_volume(file):
                volumes.append(file)
            else:
                others.setdefault(_branch(file, root), []).append(file)
    belongs = {file for volume in volumes for file in files_of(volume)}
    if root in others:  # files in the root itself: its series may go on below it
        others = {root: [file for files in others.values() for file in files]}
    for volume in volumes:
        _add_file(volume, root, series, found)
    listed = []
    for branch, files in others.items():
        rest = [file for file in files if file not in belongs]
        listed += _series_of(branch, rest, found) if rest else []
    _add_series(listed, root, series, found)
    found.sort(key=lambda scan: str(scan.path))


def _is_volume(file: Path) -> bool:
    """Whether a file holds a volume, by its ending (a broken file then fails by name) or its first bytes."""
    from ..processing.volume_reading import format_of_contents
    from ..processing.volume_series import list_series

    name = file.name.lower()
    if name.endswith(VOLUME_SUFFIXES):
        return True
    if name.removesuffix(".gz").endswith((".hdr", ".img")):  # a pair, read by its header
        return ".hdr" in name and any(other.suffix == ".img" or ".img." in other.name for other in files_of(file))
    try:
        form, packed = format_of_contents(file)
        if form == "zip":  # also what office programs write
            return bool(list_series(file))
    except (OSError, CTInstructError):
        return False
    return form == "nifti" or (form in ("itk", "array") and not packed)


def _branch(file: Path, root: Path) -> Path:
    parts = file.relative_to(root).parts
    return root / parts[0] if len(parts) > 1 else root


def _add_file(path: Path, root: Path, series: str | None, found: Scans) -> None:
    if not path.name.lower().endswith(".npz") and zipfile.is_zipfile(path):
        listed = _series_of(path, [path], found)
        if listed:
            _add_series(listed, root, series, found)
            return
    found.append(Scan(path, name=_name_of(path, root)))


def _series_of(source: Path, files: Sequence[Path], found: Scans) -> list[tuple[Path, Any]]:
    """(source, CT series) of a folder or zip; other files are skipped with a reason."""
    from ..processing.volume_series import list_series

    try:
        listed = list_series(source)
    except CTInstructError as error:
        if source.is_dir():  # a file is a scan, whose reading gives the error
            found.skipped.append((source, str(error)))
        return []
    seen = {file for series in listed for file in series.files}
    for skipped in listed.skipped:
        seen.update(skipped.files)
        lies = Path(os.path.commonpath(skipped.files)) if skipped.files else source
        found.skipped.append(
            (lies, f"{skipped.name} {skipped.reason}" if lies.name != skipped.name else skipped.reason)
        )
    found.skipped += [(file, _why_not(file)) for file in files if file not in seen and source.is_dir()]
    return [(source, series) for series in listed]


def _add_series(listed: Sequence[tuple[Path, Any]], root: Path, series: str | None, found: Scans) -> None:
    """The series that are wanted of each study."""
    studies: dict[str, list[tuple[Path, Any]]] = {}
    for source, member in listed:
        studies.setdefault(_study_of(member.files[0]), []).append((source, member))
    for study, members in list(studies.items()):
        where: dict[str, set[Path]] = {}
        for source, member in members:
            where.setdefault(re.sub(r"-\d+$", "", member.uid), set()).add(source)
        if any(len(sources) > 1 for sources in where.values()):  # patients with equal UIDs
            del studies[study]
            for source, member in members:
                studies.setdefault(f"{study} {source}", []).append((source, member))
    folders = [source if source.is_file() else _folder_of(member) for source, member in listed]
    for study, members in studies.items():
        chosen = _chosen([member for _, member in members], series, root, found)
        for source, member in members:
            if not any(member is wanted for wanted in chosen):
                continue
            folder = source if source.is_file() else _folder_of(member)
            uid = member.uid if source.is_file() else _uid_in(folder, member)
            label = str(member.number) if member.number is not None else member.uid[-8:]
            name = _name_of(folder, root) if folders.count(folder) == 1 else f"{_name_of(folder, root)}-{label}"
            found.append(Scan(folder, uid, name, list(member.files), study, str(member)))


def _folder_of(series: Any) -> Path:
    return Path(os.path.commonpath([file.parent for file in series.files]))


def _chosen(members: list[Any], series: str | None, root: Path, found: Scans) -> list[Any]:
    """The series of a study that are wanted."""
    from ..processing.volume_series import SeriesList, choose_series

    if series is None or series.strip().lower() == "all":
        return members
    try:
        chosen = [choose_series(SeriesList(members), series, root.name)]
    except CTInstructError as error:
        found.skipped.append((_folder_of(members[0]), f"no series fits --series {series}: {str(error).rstrip('.')}"))
        return []
    for member in members:
        if member is not chosen[0]:
            found.skipped.append((_folder_of(member), f"series {member}: --series {series} takes another of its study"))
    return chosen


def _uid_in(folder: Path, series: Any) -> str:
    """The series' UID when its folder is read alone: scans under the same UID may lie in different folders."""
    from ..processing.volume_series import list_series

    if re.fullmatch(r"[\d.]+", series.uid):
        return str(series.uid)
    alike = (other.uid for other in list_series(folder) if set(other.files) == set(series.files))
    return str(next(alike, series.uid))


def _study_of(file: Path) -> str:
    import pydicom

    if zipfile.is_zipfile(file):
        return str(file)
    try:
        tags: Any = ["StudyInstanceUID", "PatientID"]  # compared only, never written
        header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=tags, force=True)
        return f"{header.get('StudyInstanceUID') or 'unknown'} {header.get('PatientID') or ''}"
    except Exception:  # pydicom raises many classes on strange headers
        return "unknown"


def _why_not(file: Path) -> str:
    name = file.name.lower()
    if name.endswith(".gz"):
        return "packed by gzip: unpack it first"
    if name == "dicomdir":
        return "the index of a DICOM folder"
    if name.endswith(PICTURE_SUFFIXES):
        return "a picture: it is read where it is named as the input"
    return "no scan in a format that can be read"


def _name_of(path: Path, root: Path) -> str:
    """A name for results from the path below the input, without endings."""
    parts = path.relative_to(root).parts if path != root and path.is_relative_to(root) else ()
    name = "-".join([*parts[:-1], scan_name(path)])
    return name if len(name) <= 120 else f"{name[:100]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


__all__ = ["Scan", "Scans", "find_scans", "scan_name"]
