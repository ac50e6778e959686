"""DICOMweb: find studies (QIDO-RS), fetch their CT series (WADO-RS), store results (STOW-RS), with dicomweb-client.

Credentials come from the environment: `CTINSTRUCT_DICOMWEB_TOKEN`, or `CTINSTRUCT_DICOMWEB_USER` and `…_PASSWORD`. TLS is
verified; `REQUESTS_CA_BUNDLE` names the authorities of a hospital. Errors name the server and never a study or patient.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CTInstructError
from ..output.dicom_source import no_quotes
from .addresses import Address, object_name

TIMEOUT = (10, 120)  # seconds to connect, and to wait for the next bytes
_QUIET: ContextVar[bool] = ContextVar("quiet", default=False)
_ANY_SYNTAX = (("application/dicom", "*"),)
_ANSWERS = ("application/", "multipart/", "text/xml")


class NothingWanted(CTInstructError):
    """A study without CT, or whose CT series are none of those wanted."""


class TooLarge(CTInstructError):
    """A study of more bytes than are taken."""


@dataclass(frozen=True)
class FoundStudy:
    """A study of a search; dates as the archive writes them (YYYYMMDD)."""

    uid: str
    date: str
    description: str
    modalities: tuple[str, ...]
    images: int | None


@dataclass(frozen=True)
class FoundSeries:
    """A series of a study."""

    uid: str
    number: int | None
    description: str
    modality: str
    body_part: str
    images: int | None


def open_client(address: Address) -> Any:
    """A client of dicomweb-client for the server.

    Raises:
        CTInstructError: where dicomweb-client is not installed.
    """
    try:
        import requests
        from dicomweb_client.api import DICOMwebClient
    except ImportError as error:
        raise CTInstructError("DICOMweb needs dicomweb-client: pip install 'ctinstruct-hf[dicomweb]'.") from error
    session = requests.Session()
    session.auth = _credentials()
    session.hooks["response"].append(_refuse_pages)
    # archives hold UIDs that are not conformant
    client = DICOMwebClient(address.base, session=session, timeout=TIMEOUT, permissive_uid=True)
    client.set_http_retry_params(retry=False)
    return client


def _refuse_pages(response: Any, **_: Any) -> None:
    """A hook of requests: raises where a server answers with a page, such as that of a login, as if all were well."""
    answered = response.status_code < 400 and response.status_code != 204 and not response.is_redirect
    if answered and not response.headers.get("Content-Type", "application/").lower().startswith(_ANSWERS):
        raise ValueError("no answer of DICOMweb")


def _credentials() -> Any:
    """What signs requests: a function of requests, or (user, password); none is taken from files of this machine."""
    token = os.environ.get("CTINSTRUCT_DICOMWEB_TOKEN")
    user = os.environ.get("CTINSTRUCT_DICOMWEB_USER")
    if token:

        def sign(request: Any) -> Any:
            request.headers["Authorization"] = f"Bearer {token}"
            return request

        return sign
    if user:
        return user, os.environ.get("CTINSTRUCT_DICOMWEB_PASSWORD", "")
    return lambda request: request


@contextmanager
def errors_as_one_sentence(address: Address, what: str, missing: str = "Check the address") -> Iterator[None]:
    """Around requests: what goes wrong becomes one sentence, and libraries log nothing of what they send.

    Args:
        what: what was being done, for a connection that breaks.
        missing: what to do where the server knows no such resource.
    """
    import requests

    server = address.server
    for name in ("dicomweb_client.web", "urllib3.connectionpool"):
        logging.getLogger(name).addFilter(_is_loud)
    quiet = _QUIET.set(True)
    try:
        with no_quotes():
            yield
    except requests.exceptions.SSLError:
        raise CTInstructError(
            f"{server} has a certificate that is not trusted: set REQUESTS_CA_BUNDLE to your authorities' file."
        ) from None
    except requests.exceptions.ConnectTimeout:
        raise CTInstructError(f"{server} does not answer: check the address.") from None
    except requests.exceptions.Timeout:
        raise CTInstructError(f"{server} stopped answering while {what}: try again.") from None
    except requests.exceptions.HTTPError as error:
        raise CTInstructError(_refused(server, error.response, missing)) from None
    except requests.exceptions.ConnectionError as error:
        if "NewConnectionError" in str(error) or "NameResolution" in str(error):
            raise CTInstructError(f"{server} cannot be reached: check the address, and that it runs.") from None
        raise CTInstructError(f"The connection to {server} broke while {what}: try again.") from None
    except requests.exceptions.ChunkedEncodingError:
        raise CTInstructError(f"The connection to {server} broke while {what}: try again.") from None
    except CTInstructError:
        raise
    except Exception as error:  # what a library makes of an answer that is not DICOM; it may quote it
        if isinstance(error, OSError) and not isinstance(error, requests.exceptions.RequestException):
            raise  # of the disk
        raise CTInstructError(
            f"{server} answered with something else than DICOM while {what}: check the address."
        ) from None
    finally:
        _QUIET.reset(quiet)


def _is_loud(record: logging.LogRecord) -> bool:
    """A filter: what libraries log of our requests has UIDs and IDs in it."""
    return not _QUIET.get()


def _refused(server: str, response: Any, missing: str) -> str:
    status = response.status_code
    if status in (401, 403):
        return (
            f"{server} refuses the request ({status}): set CTINSTRUCT_DICOMWEB_TOKEN, or CTINSTRUCT_DICOMWEB_USER and "
            "CTINSTRUCT_DICOMWEB_PASSWORD, in the environment."
        )
    if status == 404:
        return f"{server} has no such thing (404). {missing}."
    return f"{server} answered {status}: try again, or ask who runs it."


def search_studies(address: Address, dates: str = "", patient: str = "", limit: int = 100) -> list[FoundStudy]:
    """Studies with CT, the newest first.

    Args:
        dates: YYYYMMDD, or a range YYYYMMDD-YYYYMMDD of which an end may be left out.
        patient: a PatientID; sent to the server and kept nowhere.

    Raises:
        CTInstructError: where the server does not answer as it should, or neither is given.
    """
    if not dates and not patient:
        raise CTInstructError("A search needs dates or a patient's ID.")
    filters = {"StudyDate": dates, "PatientID": patient, "ModalitiesInStudy": "CT"}
    client = open_client(address)
    with errors_as_one_sentence(address, "studies were searched"):
        found = client.search_for_studies(
            search_filters={key: value for key, value in filters.items() if value},
            fields=["StudyDescription", "ModalitiesInStudy", "NumberOfStudyRelatedInstances"],
            limit=limit,
        )
        if not all(_value(one, "0020000D") for one in found):
            raise ValueError("no study")
        studies = [
            FoundStudy(
                uid=str(_value(one, "0020000D") or ""),
                date=str(_value(one, "00080020") or ""),
                description=str(_value(one, "00081030") or ""),
                modalities=tuple(str(name) for name in one.get("00080061", {}).get("Value", [])),
                images=_value(one, "00201208"),
            )
            for one in found
        ]
    return sorted(studies, key=lambda study: study.date, reverse=True)


def list_series(address: Address) -> list[FoundSeries]:
    """Every series of the study that an address names.

    Raises:
        CTInstructError: for a study that is not there, or a server that does not answer as it should.
    """
    client = open_client(address)
    missing = "Check the study's UID"
    with errors_as_one_sentence(address, "the series were listed", missing):
        fields = ["SeriesDescription", "SeriesNumber", "BodyPartExamined", "NumberOfSeriesRelatedInstances"]
        found = client.search_for_series(address.study, fields=fields)
        if not all(_value(one, "0020000E") for one in found):
            raise ValueError("no series")
        series = [
            FoundSeries(
                uid=str(_value(one, "0020000E") or ""),
                number=_value(one, "00200011"),
                description=str(_value(one, "0008103E") or ""),
                modality=str(_value(one, "00080060") or ""),
                body_part=str(_value(one, "00180015") or ""),
                images=_value(one, "00201209"),
            )
            for one in found
        ]
    if not series:
        raise CTInstructError(f"{address.server} has no such study. {missing}.")
    return series


def _value(item: dict[str, Any], tag: str) -> Any:
    """The first value of an attribute in DICOM JSON."""
    values = item.get(tag, {}).get("Value") or [None]
    return values[0]


def fetch_study(
    address: Address,
    folder: Path,
    *,
    wanted: Callable[[FoundSeries], bool] = lambda series: True,
    progress: Callable[[str], None] = lambda step: None,
    most_bytes: int | None = None,
) -> list[FoundSeries]:
    """Write the CT series of a study, or the one series that the address names, as files.

    Args:
        address: with a study.
        folder: new or empty; a folder `series-<n>` in it for each series.
        wanted: which CT series.
        progress: called with the name of each step.
        most_bytes: of all images together.

    Returns:
        What was fetched.

    Raises:
        TooLarge: beyond `most_bytes`.
        CTInstructError: where anything is missing or breaks; the folder is then not to be used.
    """
    if address.study is None:
        raise CTInstructError(f"{address.server}: the address names no study: add /studies/ and its UID.")
    listed = list_series(address)
    chosen = [one for one in listed if address.series in (None, one.uid)]
    if not chosen:
        raise CTInstructError(f"{address.server} has no such series in the study. Check the series' UID.")
    scans = [one for one in chosen if one.modality == "CT"]
    if not scans:
        held = ", ".join(sorted({one.modality or "unknown" for one in chosen}))
        raise NothingWanted(f"{address.server}: the study has no CT series (it has {held}).")
    scans = [one for one in scans if wanted(one)]
    if not scans:
        raise NothingWanted(f"{address.server}: no CT series of the study is one of those wanted.")
    client, size = open_client(address), 0
    for number, series in enumerate(scans, start=1):
        target = folder / f"series-{number}"
        target.mkdir(parents=True)
        count = 0
        with errors_as_one_sentence(address, f"series {number} of {len(scans)} was fetched"):
            for data in client.iter_series(address.study, series.uid, media_types=_ANY_SYNTAX):
                if str(data.StudyInstanceUID) != address.study or str(data.SeriesInstanceUID) != series.uid:
                    raise CTInstructError(f"{address.server} sent an image of another series than was asked for.")
                count += 1
                progress(f"image {count} of {series.images or '?'}")
                file = target / object_name(str(data.SOPInstanceUID))
                data.save_as(file, enforce_file_format=True)
                size += file.stat().st_size
                if most_bytes is not None and size > most_bytes:
                    raise TooLarge(f"{address.server}: the study has more than {most_bytes} bytes.")
        if not count or (series.images is not None and count < series.images):
            raise CTInstructError(
                f"{address.server} sent {count} of {series.images or 'the'} images of series {number}: the connection "
                "broke, or images are missing there."
            )
    return scans


def store(files: Sequence[Path], address: Address) -> None:
    """Store DICOM files in one request, which a server takes whole or, where the connection breaks, not at all.

    Raises:
        CTInstructError: where an object was not stored.
    """
    import pydicom

    client = open_client(address)
    with errors_as_one_sentence(address, f"{len(files)} objects were sent (sending them again stores nothing twice)"):
        answer = client.store_instances([pydicom.dcmread(file) for file in files])
        failed = answer.get("FailedSOPSequence") or []
        stored = answer.get("ReferencedSOPSequence") or []
    if failed:
        codes = ", ".join(sorted({f"{int(one.get('FailureReason', 0)):04X}" for one in failed}))
        raise CTInstructError(f"{address.server} did not store {len(failed)} of {len(files)} objects (reason {codes}).")
    if len(stored) < len(files):
        raise CTInstructError(
            f"{address.server} confirmed {len(stored)} of {len(files)} objects: check its STOW-RS address."
        )


__all__ = [
    "FoundSeries",
    "FoundStudy",
    "NothingWanted",
    "TooLarge",
    "errors_as_one_sentence",
    "fetch_study",
    "list_series",
    "search_studies",
    "store",
]
