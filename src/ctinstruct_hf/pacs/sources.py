"""Where new studies are looked for: a folder, which DIMSE may fill, or a DICOMweb server."""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..errors import CTInstructError
from ..files import temporary_folder
from ..inference.scans import VOLUME_SUFFIXES, Scan, find_scans, scan_name
from ..output.dicom_source import no_quotes
from . import dicomweb
from .addresses import Address, hashed
from .orders import Order

# of a search; a server with more studies of the days asked for is asked again as these are answered
_MOST_STUDIES = 1000


@dataclass
class Candidate:
    """A study that lies at a source.

    Attributes:
        key: a hash of its UID, or of a file's name, size and time.
        state: changes as long as it grows.
        source: how the operator finds it.
        files: of a folder: files and folders that hold it.
        uid: of a DICOMweb server.
    """

    key: str
    state: Any
    source: str = ""
    files: list[Path] = field(default_factory=list)
    uid: str = ""


class Source(Protocol):
    """What `watch` needs of a source."""

    def studies(self) -> list[Candidate]:
        """What lies there now. Raises CTInstructError where it cannot be asked."""

    def scans(self, study: Candidate) -> Any:
        """A context with the study's scans that the order wants."""

    def release(self, study: Candidate) -> None:
        """The study is answered."""


class FolderSource:
    """A folder whose files and subfolders are studies; those of one StudyInstanceUID are one.

    Args:
        folder: to look in.
        order: which series are wanted.
        owned: files of answered studies are removed.
    """

    def __init__(self, folder: Path, order: Order, owned: bool = False) -> None:
        self.folder, self.order, self.owned = folder, order, owned
        self._uids: dict[tuple[Path, float], str] = {}

    def studies(self) -> list[Candidate]:
        try:
            entries = sorted(path for path in self.folder.iterdir() if not path.name.startswith("."))
        except OSError as error:
            raise CTInstructError(f"{self.folder} cannot be read: {error.strerror or error}.") from error
        found: dict[str, Candidate] = {}
        for path in entries:
            try:
                files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
                status = [file.stat() for file in files if not file.name.startswith(".")]
                uid = self._study_of(path, files)
            except OSError:  # it goes or comes at this moment
                continue
            if not status:
                continue
            state = (len(status), sum(one.st_size for one in status), max(one.st_mtime_ns for one in status))
            key = hashed(uid or f"{path.name} {state}")
            one = found.setdefault(key, Candidate(key, (), source=path.name))
            one.files.append(path)
            one.state = (*one.state, state)
        return list(found.values())

    def _study_of(self, path: Path, files: list[Path]) -> str:
        """The StudyInstanceUID of the first DICOM file; "" where there is none."""
        import pydicom

        if not files or path.name.lower().endswith(VOLUME_SUFFIXES):
            return ""
        first = min(files)
        known = (first, first.stat().st_mtime)
        if known not in self._uids:
            try:
                with no_quotes():
                    header = pydicom.dcmread(first, stop_before_pixels=True, specific_tags=["StudyInstanceUID"])
                self._uids[known] = str(header.get("StudyInstanceUID") or "")
            except Exception:  # whatever a file that is no DICOM makes pydicom raise
                return ""
        return self._uids[known]

    @contextmanager
    def scans(self, study: Candidate) -> Iterator[list[Scan]]:
        found = [scan for scan in find_scans(study.files) if self._is_wanted(scan)]
        for number, scan in enumerate(found, start=1):
            scan.name = f"series-{number}" if scan.series else scan_name(scan.path)
        yield found

    def _is_wanted(self, scan: Scan) -> bool:
        import pydicom

        if self.order.series_description is None and self.order.body_part is None:
            return True
        tags = ["SeriesDescription", "BodyPartExamined"]
        try:
            with no_quotes():
                header = pydicom.dcmread(scan.files[0], stop_before_pixels=True, specific_tags=tags)
        except Exception:  # no DICOM has no description
            return False
        return self.order.wants(*(str(header.get(tag) or "") for tag in tags))

    def release(self, study: Candidate) -> None:
        for path in study.files if self.owned else ():
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


class WebSource:
    """The CT studies of a DICOMweb server."""

    def __init__(self, address: Address, order: Order) -> None:
        self.address, self.order = address, order

    def studies(self) -> list[Candidate]:
        dates = "19000101-"
        if self.order.days:
            today = datetime.date.today()
            dates = f"{today - datetime.timedelta(days=self.order.days):%Y%m%d}-"
        found = dicomweb.search_studies(self.address, dates=dates, limit=_MOST_STUDIES)
        kept = self.order.keep_study_uid
        return [Candidate(hashed(one.uid), one.images, one.uid if kept else "", uid=one.uid) for one in found]

    @contextmanager
    def scans(self, study: Candidate) -> Iterator[list[Scan]]:
        root = temporary_folder("watch")
        address = Address(self.address.scheme, self.address.base, study.uid, host=self.address.host)
        try:
            dicomweb.fetch_study(address, root / "study", wanted=self._is_wanted)
            found = find_scans([root / "study"])
            for number, scan in enumerate(found, start=1):
                scan.name = f"series-{number}"
            yield found
        except dicomweb.NothingWanted:
            yield []
        finally:
            shutil.rmtree(root, ignore_errors=True)

    def _is_wanted(self, series: dicomweb.FoundSeries) -> bool:
        return self.order.wants(series.description, series.body_part)

    def release(self, study: Candidate) -> None:
        return


__all__ = ["Candidate", "FolderSource", "Source", "WebSource"]
