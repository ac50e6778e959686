"""`ctinstruct watch`: every new study that has become stable is answered once, and its results are sent back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import CTInstructError
from ..files import remove_left_over
from ..inference.batch import predict_studies
from ..inference.models import resolve_model
from . import dimse
from .addresses import DIMSE, is_address, parse_address
from .ledger import Entry, Ledger
from .orders import Order
from .sources import Candidate, FolderSource, Source, WebSource
from .transfer import result_files, send

# a study that ended the process, or could not be fetched, so often is a failure
MOST_ATTEMPTS = 3


@contextmanager
def open_source(order: Order) -> Iterator[Source]:
    """The source of an order; DIMSE is listened on meanwhile."""
    if not is_address(order.input):
        if not Path(order.input).is_dir():
            raise CTInstructError(f"{order.input} is no folder: make it, or give an address.")
        yield FolderSource(Path(order.input), order)
        return
    address = parse_address(order.input)
    if address.scheme != DIMSE:
        yield WebSource(address, order)
        return
    incoming = order.folder / "incoming"
    incoming.mkdir(parents=True, exist_ok=True)
    with dimse.listening(incoming, address):
        yield FolderSource(incoming, order, owned=True)


class Watch:
    """The service, which looks at its source again and again.

    Args:
        order: what to do.
        source: where studies come from.
        ledger: of the order's output.
        log: called with a line, without identifiers, for whatever happens.
    """

    def __init__(self, order: Order, source: Source, ledger: Ledger, log: Callable[[str], None]) -> None:
        self.order, self.source, self.ledger, self.log = order, source, ledger, log
        self.destination = None if order.send is None else parse_address(order.send)
        self.request = order.request()
        self._seen: dict[str, tuple[Any, float]] = {}
        self.trouble, self.unreachable = "", False
        if self.destination is None and ledger.entries("sending"):
            raise CTInstructError("Earlier results are to be sent yet: give the request its send: … again.")
        resolve_model(order.model, order.revision)  # a model that is not there is an error now, not of every study

    def look(self) -> int:
        """Send what is still to be sent and answer what is stable now; how many studies were brought further."""
        moved = sum(self._send(entry) for entry in self.ledger.entries("sending"))
        try:
            candidates = self.source.studies()
        except CTInstructError as error:
            self._trouble(str(error))
            self.unreachable = True
            return moved
        self.unreachable = False
        now, seen = time.monotonic(), {}
        for one in candidates:
            state, since = self._seen.get(one.key, (None, now))
            seen[one.key] = (one.state, since if state == one.state else now)
        self._seen = seen
        for one in candidates:
            entry = self.ledger.find(one.key)
            if entry is None or entry.state == "answering":
                if now - seen[one.key][1] >= self.order.stable_seconds:
                    moved += self._answer(one)
            elif entry.state in ("done", "skipped"):
                self.source.release(one)
        return moved

    @property
    def unfinished(self) -> bool:
        """Whether a study that was seen is to be answered yet."""
        found = [self.ledger.find(key) for key in self._seen]
        return any(entry is None or entry.state == "answering" for entry in found)

    def _answer(self, study: Candidate) -> bool:
        """Answer a study; whether that came to an end."""
        entry = self.ledger.begin(study.key, study.source)
        if entry.attempts > MOST_ATTEMPTS:
            why = entry.error or f"The process ended {MOST_ATTEMPTS} times while this study was answered."
            return self._end(entry, "failed", why)
        devices = [self.order.device] if self.order.device else []
        reading = {key: getattr(self.order, key) for key in ("model", "revision", "dtype")}
        folder = self.ledger.folder / entry.name
        try:
            with self.source.scans(study) as scans:
                if not scans:
                    return self._end(entry, "skipped", "No CT series is one of those wanted.")
                outcomes = predict_studies(scans, folder, self.request, devices=devices, **reading)
        except CTInstructError as error:
            if entry.attempts >= MOST_ATTEMPTS:
                return self._end(entry, "failed", str(error))
            self.ledger.move(entry, "answering", str(error))
            self._log(entry, "to be tried again", str(error))
            return False
        wrong = " ".join(one.error for one in outcomes if one.error)
        if all(one.status == "failed" for one in outcomes):
            return self._end(entry, "failed", wrong)
        if self.destination is None:
            return self._end(entry, "done", wrong)
        self.ledger.move(entry, "sending", wrong)
        return self._send(entry)

    def _send(self, entry: Entry) -> bool:
        """Send the results of a study; whether they were stored."""
        assert self.destination is not None
        folder = self.ledger.folder / entry.name
        files = [file for part in sorted(folder.iterdir()) if part.is_dir() for file in result_files(part)]
        try:
            send(files, self.destination)
        except CTInstructError as error:
            self._trouble(str(error))
            return False
        return self._end(entry, "done", entry.error)

    def _end(self, entry: Entry, state: str, error: str) -> bool:
        self.ledger.move(entry, state, error)
        self._log(entry, state, error)
        return True

    def _log(self, entry: Entry, state: str, error: str) -> None:
        self.log(f"{entry.name}: {state}. {error}".rstrip())

    def _trouble(self, sentence: str) -> None:
        """Log what keeps the service from working, once as long as it stays the same."""
        if sentence != self.trouble:
            self.log(sentence)
        self.trouble = sentence


def watch(order: Order, *, once: bool = False, log: Callable[[str], None] = lambda line: None) -> None:
    """Answer new studies for ever, or, with `once`, until those that lie at the source are answered.

    Raises:
        CTInstructError: where it cannot begin (a bad source, a model that is not there, another process at work), and with
            `once` where results could not be sent.
    """
    remove_left_over()
    ledger = Ledger(order.folder)
    try:
        with open_source(order) as source:
            service = Watch(order, source, ledger, log)
            log(f"Watching {parse_address(order.input).server if is_address(order.input) else order.input}.")
            while True:
                moved = service.look()
                if once and service.unreachable:
                    raise CTInstructError(service.trouble)
                if once and not moved and not service.unfinished:
                    break
                if not moved:
                    time.sleep(order.poll_seconds)
        left = len(ledger.entries("sending"))
        if left:
            raise CTInstructError(f"The results of {left} studies could not be sent: {service.trouble} Run it again.")
    finally:
        ledger.close()


__all__ = ["MOST_ATTEMPTS", "Watch", "open_source", "watch"]
