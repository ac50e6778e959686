"""Studies of the archive that the operator named: searched, listed and opened over DICOMweb.

The address comes from the operator, a client gives no more than UIDs, dates and a patient's ID. Of patients nothing is returned;
the ID that a client searches for goes to the archive in this one request.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

from fastapi import FastAPI, Request

from ..errors import CTInstructError
from ..pacs import dicomweb
from ..pacs.addresses import WEB, Address, is_address, is_uid, parse_address
from .engine import Engine
from .receiving import read_json, refuse_unknown
from .uploads import too_large

MOST_STUDIES = 200  # of a search


class Archive:
    """A DICOMweb server, for the clients of this one.

    Args:
        engine: opens what is fetched.
        text: `dicomweb+http(s)://host:port/path` of the operator.

    Raises:
        CTInstructError: for another address, or where dicomweb-client is not installed.
    """

    def __init__(self, engine: Engine, text: str) -> None:
        self.engine, self.address = engine, archive_address(text)

    def studies(self, words: dict[str, Any]) -> list[dict[str, Any]]:
        """CT studies of a range of dates or of a patient, the newest first.

        Args:
            words: "from" and "to", ISO dates of which one may be left out, and "patient", a whole PatientID; a date or the
                patient at least.
        """
        refuse_unknown(words, ["from", "to", "patient"])
        first, last = (_date(words.get(name), name) for name in ("from", "to"))
        if first and last and first > last:
            raise CTInstructError("from is later than to: give the earlier date first.")
        patient = words.get("patient") or ""
        if (
            not isinstance(patient, str)
            or len(patient) > 64
            or re.search(r"[*?\\]", patient)
            or not patient.isprintable()
        ):
            raise CTInstructError("patient must be one whole PatientID, without * and ?.")
        if not (first or last or patient.strip()):
            raise CTInstructError("Give dates or a patient's ID: from, to, patient.")
        dates = f"{first}-{last}" if first or last else ""
        with self._asking():
            found = dicomweb.search_studies(self.address, dates, patient.strip(), MOST_STUDIES)
        return [{**asdict(one), "date": _iso(one.date)} for one in found]

    def series(self, study: Any) -> list[dict[str, Any]]:
        """The CT series of a study."""
        with self._asking():
            found = dicomweb.list_series(self._at(study))
            if not any(one.modality == "CT" for one in found):
                raise CTInstructError("The study has no CT series.")
        return [asdict(one) for one in found if one.modality == "CT"]

    def open(self, study: Any, series: str | None) -> str:
        """Fetch a study, or one of its series, and open it; the id, see `Engine.open_upload`."""
        address, uploads = self._at(study, series), self.engine.uploads
        name = uploads.new()
        try:
            with uploads.use(name, reading=True) as upload, self._asking():
                dicomweb.fetch_study(address, upload.folder, most_bytes=uploads.limits.upload_bytes)
                upload.files = sorted(path.name for path in upload.folder.iterdir())
                upload.bytes = sum(path.stat().st_size for path in upload.folder.rglob("*.dcm"))
        except dicomweb.TooLarge:
            uploads.drop(name)
            raise CTInstructError(too_large(uploads.limits)) from None
        except OSError as error:
            uploads.drop(name)
            raise CTInstructError(f"The server cannot keep the study: {error.strerror}.") from None
        except BaseException:
            uploads.drop(name)
            raise
        return self.engine.open_upload(name)

    def _at(self, study: Any, series: str | None = None) -> Address:
        if not all(one is None or (isinstance(one, str) and is_uid(one)) for one in (study, series)) or study is None:
            raise CTInstructError("A study and a series are named by their UIDs: digits and dots.")
        return replace(self.address, study=study, series=series)

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Errors do not say to clients where the archive is."""
        try:
            yield
        except dicomweb.TooLarge:
            raise
        except CTInstructError as error:
            text = str(error).replace(self.address.server, "the archive")
            raise CTInstructError(text[:1].upper() + text[1:]) from None


def archive_address(text: str) -> Address:
    """The address of a DICOMweb server without a study.

    Raises:
        CTInstructError: for anything else, or where dicomweb-client is not installed.
    """
    address = parse_address(text) if is_address(text) else None
    if address is None or address.scheme not in WEB or address.study:
        raise CTInstructError("--pacs is no address of an archive: expected dicomweb+https://host:port/path.")
    dicomweb.open_client(address)
    return address


def _date(text: Any, name: str) -> str:
    """YYYYMMDD of an ISO date; "" for none."""
    if text in (None, ""):
        return ""
    try:
        return datetime.date.fromisoformat(text).isoformat().replace("-", "")  # strftime does not pad early years
    except (TypeError, ValueError) as error:
        raise CTInstructError(f"{name} must be a date as 2026-01-31.") from error


def _iso(date: str) -> str:
    return f"{date[:4]}-{date[4:6]}-{date[6:]}" if re.fullmatch(r"\d{8}", date) else ""


def add_archive(app: FastAPI, archive: Archive, in_turn: Callable[..., Awaitable[Any]]) -> None:
    """The searches of the page; `in_turn` runs a function in a thread. What is searched for is in bodies, not in addresses."""
    seconds = archive.engine.limits.idle_upload

    @app.post("/api/pacs/studies")
    async def studies(request: Request) -> dict[str, Any]:
        """CT studies: {"from", "to"} (ISO dates), {"patient": PatientID}, or both."""
        return {"studies": await in_turn(archive.studies, await read_json(request, seconds))}

    @app.post("/api/pacs/series")
    async def series(request: Request) -> dict[str, Any]:
        """The CT series of {"study": UID}."""
        words = await read_json(request, seconds)
        refuse_unknown(words, ["study"])
        return {"series": await in_turn(archive.series, words.get("study"))}


__all__ = ["Archive", "add_archive", "archive_address"]
