"""DIMSE, which most modalities speak and nothing else: C-STORE out to another entity, and in to a folder (pynetdicom)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import CTInstructError
from ..files import whole_file
from ..output.dicom_source import no_quotes
from .addresses import Address, hashed, object_name

TITLE = "CTINSTRUCT"
_NOT_UNDERSTOOD, _NO_SPACE = 0xC000, 0xA700
_MOST_CONTEXTS = 128  # of an association


def _library() -> Any:
    try:
        import pynetdicom
    except ImportError as error:
        raise CTInstructError("DIMSE needs pynetdicom: pip install 'ctinstruct-hf[pacs]'.") from error
    logging.getLogger("pynetdicom").setLevel(logging.CRITICAL)  # it writes identifiers
    return pynetdicom


def store(files: Sequence[Path], address: Address) -> None:
    """Send DICOM files by C-STORE, in the transfer syntax that each has.

    Raises:
        CTInstructError: where an object was not stored; objects before it may be, and sending all again is safe.
    """
    import pydicom

    pynetdicom = _library()
    entity = pynetdicom.AE(ae_title=TITLE)
    entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = 60
    entity.connection_timeout = 10
    with no_quotes():
        objects = [pydicom.dcmread(file) for file in files]
    for context in {(str(one.SOPClassUID), str(one.file_meta.TransferSyntaxUID)) for one in objects}:
        entity.add_requested_context(*context)
    association = entity.associate(address.host, address.port, ae_title=address.title)
    if not association.is_established:
        refused = association.is_rejected
        what = f"does not accept the title {TITLE} or its own" if refused else "cannot be reached: check host and port"
        raise CTInstructError(f"{address.server} {what}.")
    try:
        for number, one in enumerate(objects, start=1):
            try:
                with no_quotes():
                    status = association.send_c_store(one)
            except ValueError as error:
                raise CTInstructError(f"{address.server} does not take {one.SOPClassUID.name}.") from error
            if "Status" not in status:
                raise CTInstructError(
                    f"The connection to {address.server} broke at object {number} of {len(objects)}: send all again, which "
                    "stores nothing twice."
                )
            if status.Status not in (0x0000, 0xB000, 0xB006, 0xB007):  # success, or stored with a warning
                raise CTInstructError(
                    f"{address.server} did not store object {number} of {len(objects)} (status {status.Status:04X})."
                )
    finally:
        association.release() if association.is_established else association.abort()


@contextmanager
def listening(folder: Path, address: Address) -> Iterator[None]:
    """Take what is sent by C-STORE, and answer C-ECHO, while the block runs.

    Objects lie in a folder a study, both named by hashes of their UIDs, each whole from the moment it has its name.

    Args:
        folder: to write into.
        address: our title, and the host and port to listen on.

    Raises:
        CTInstructError: where the port cannot be used.
    """
    pynetdicom = _library()
    entity = pynetdicom.AE(ae_title=address.title)
    entity.require_called_aet = True
    entity.maximum_pdu_size = 0
    entity.network_timeout = 60
    from pydicom.uid import AllTransferSyntaxes

    for context in pynetdicom.AllStoragePresentationContexts[: _MOST_CONTEXTS * 4]:
        entity.add_supported_context(context.abstract_syntax, list(AllTransferSyntaxes))
    entity.add_supported_context("1.2.840.10008.1.1")

    def keep(event: Any) -> int:
        try:
            return _keep(event, folder)
        except OSError:
            return _NO_SPACE
        except Exception:  # a modality may send anything
            return _NOT_UNDERSTOOD

    try:
        server = entity.start_server(
            (address.host, address.port), block=False, evt_handlers=[(pynetdicom.evt.EVT_C_STORE, keep)]
        )
    except OSError as error:
        raise CTInstructError(f"{address.server} cannot be listened on: {error.strerror or error}.") from error
    try:
        yield
    finally:
        server.shutdown()


def _keep(event: Any, folder: Path) -> int:
    """Write one object that arrived; its status."""
    from pydicom.uid import UID

    instance = UID(str(event.request.AffectedSOPInstanceUID))
    with no_quotes():
        study = str(event.dataset.get("StudyInstanceUID") or "")
    if not instance.is_valid or not study:
        return _NOT_UNDERSTOOD
    place = folder / hashed(study)[:24]
    place.mkdir(parents=True, exist_ok=True)
    with whole_file(place / object_name(instance)) as draft:
        draft.write_bytes(event.encoded_dataset())
    return 0x0000


__all__ = ["listening", "store"]
