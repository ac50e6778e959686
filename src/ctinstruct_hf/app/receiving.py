"""Bodies of requests: files as they are or as a form, and JSON."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import unquote

from fastapi import Request
from starlette.datastructures import Headers

from ..errors import CTInstructError
from .uploads import Incoming, Uploads, too_large

MOST_JSON = 2**20  # bytes
_MOST_FIELD = 10_000  # bytes of a form's field that is no file


async def receive(uploads: Uploads, name: str, request: Request, file_name: str | None) -> tuple[list[str], dict[str, str]]:  # fmt: skip
    """Write the files of a request into an upload.

    Args:
        name: of the upload.
        file_name: what a body without a name of its own is called.

    Returns:
        The names of the files as kept, and the form's other fields.

    Raises:
        KeyError: where the upload is not there.
        CTInstructError: for a body that is too large, too slow, or no form although it is declared as one.
    """
    with uploads.use(name) as upload:
        declared = request.headers.get("content-length", "")
        if declared.isdigit() and int(declared) > uploads.limits.upload_bytes - upload.bytes + 2**20:
            raise CTInstructError(too_large(uploads.limits))
        incoming: list[Incoming] = []

        def begin(called: str | None) -> Incoming:
            incoming.append(Incoming(upload, called or file_name or "scan", uploads.limits))
            return incoming[-1]

        fields: dict[str, str] = {}
        try:
            if is_form(request.headers):
                form = _Form(request.headers["content-type"], begin)
                async for part in parts(request, uploads.limits.idle_upload):
                    form.feed(part)
                fields = form.end()
            else:
                file = begin(file_name)
                async for part in parts(request, uploads.limits.idle_upload):
                    file.write(part)
            if upload.dropped:
                raise KeyError(name)
        except OSError as error:
            _discard(incoming)
            if upload.dropped:
                raise KeyError(name) from error
            raise CTInstructError(f"The server cannot keep the file: {error.strerror}.") from error
        except BaseException:
            _discard(incoming)
            raise
        for file in incoming:
            file.close()
        return [file.name for file in incoming], fields


def _discard(files: list[Incoming]) -> None:
    for file in files:
        file.discard()


def is_form(headers: Headers) -> bool:
    return headers.get("content-type", "").lower().startswith("multipart/form-data")


async def parts(request: Request, seconds: float) -> AsyncIterator[bytes]:
    """The body as it arrives.

    Raises:
        CTInstructError: where nothing arrives for `seconds`.
    """
    stream = request.stream()
    while True:
        try:
            async with asyncio.timeout(seconds):
                part = await anext(stream)
        except StopAsyncIteration:
            return
        except TimeoutError as error:
            raise CTInstructError(f"Nothing arrived for {seconds:.0f} s: send it again.") from error
        yield part


async def read_json(request: Request, seconds: float, most: int = MOST_JSON) -> dict[str, Any]:
    """The body as an object of at most `most` bytes.

    Raises:
        CTInstructError: for anything else.
    """
    body = bytearray()
    async for part in parts(request, seconds):
        body += part
        if len(body) > most:
            raise CTInstructError("The JSON is too long; a file is sent with its name: /api/studies?name=scan.nii.gz.")
    try:
        found = json.loads(bytes(body) or b"{}")
        json.dumps(found, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise CTInstructError("The request is not JSON; a file is sent with its name: /api/studies?name=scan.nii.gz.") from error  # fmt: skip
    if not isinstance(found, dict):
        raise CTInstructError("The request must be a JSON object.")
    return found


def refuse_unknown(words: dict[str, Any], known: list[str]) -> None:
    """Raises CTInstructError for a key of a request that has no effect."""
    unknown = [key[:40] for key in words if key not in known]
    if unknown:
        raise CTInstructError(f"'{unknown[0]}' is no field of this request: it takes {', '.join(known)}.")


class _Form:
    """The parts of a multipart form as they arrive: files go to `begin(file name)`, fields are kept."""

    def __init__(self, content_type: str, begin: Any) -> None:
        try:
            from python_multipart.multipart import MultipartParser, parse_options_header
        except ModuleNotFoundError as error:
            raise CTInstructError(
                "A form needs python-multipart on the server: send the file as the body, with its name in the address."
            ) from error
        logging.getLogger("python_multipart").setLevel(logging.ERROR)  # a broken form is the client's affair
        self._options = parse_options_header
        boundary = parse_options_header(content_type)[1].get(b"boundary")
        if not boundary:
            raise CTInstructError("The form names no boundary.")
        self.begin = begin
        self.fields: dict[str, str] = {}
        self.file: Incoming | None = None
        self.field, self.value = "", b""
        self.head: dict[bytes, bytes] = {}
        self.line = [b"", b""]
        self.whole = False
        self.parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin_part,
                "on_header_field": lambda data, start, end: self._add_head(0, data[start:end]),
                "on_header_value": lambda data, start, end: self._add_head(1, data[start:end]),
                "on_header_end": self._end_head_line,
                "on_headers_finished": self._end_head,
                "on_part_data": lambda data, start, end: self._add(data[start:end]),
                "on_part_end": self._end_part,
                "on_end": self._end,
            },
        )

    def feed(self, part: bytes) -> None:
        from python_multipart.exceptions import FormParserError

        try:
            self.parser.write(part)
        except FormParserError as error:
            raise CTInstructError("The form cannot be read: it is no multipart/form-data.") from error

    def end(self) -> dict[str, str]:
        """The fields that are no files, once all has arrived."""
        if not self.whole:
            raise CTInstructError("The form is cut off: send it again.")
        return self.fields

    def _begin_part(self) -> None:
        self.head, self.line, self.file, self.value = {}, [b"", b""], None, b""

    def _add_head(self, side: int, data: bytes) -> None:
        self.line[side] += data
        if len(self.line[side]) > _MOST_FIELD:
            raise CTInstructError("The form has a header that is too long.")

    def _end_head_line(self) -> None:
        self.head[self.line[0].lower()] = self.line[1]
        self.line = [b"", b""]

    def _end_head(self) -> None:
        head = self.head.get(b"content-disposition", b"")
        options = self._options(head)[1]
        self.field = _text(options.get(b"name", b""))
        extended = re.search(rb"filename\*=utf-8'[^']*'([^;\s]+)", head, re.IGNORECASE)  # of older clients
        if extended:
            self.file = self.begin(unquote(extended[1].decode("latin-1")))
        elif b"filename" in options:
            self.file = self.begin(_text(options[b"filename"]))

    def _add(self, data: bytes) -> None:
        if self.file is not None:
            self.file.write(data)
            return
        self.value += data
        if len(self.value) > _MOST_FIELD:
            raise CTInstructError(f"The form's field '{self.field[:40]}' is too long: send a scan as a file.")

    def _end_part(self) -> None:
        if self.file is not None:
            self.file.close()
        elif len(self.fields) < 20:
            self.fields[self.field] = _text(self.value)

    def _end(self) -> None:
        self.whole = True


def _text(value: bytes) -> str:
    return value.decode("utf-8", errors="replace")


__all__ = ["is_form", "parts", "read_json", "receive", "refuse_unknown"]
