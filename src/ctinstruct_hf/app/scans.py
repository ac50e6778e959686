"""The scan that an `image_url` of a chat names: a study that is open, a data URL, or a file of an allowed folder."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import threading
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ..errors import CTInstructError
from ..inference.scans import Scan
from .engine import Engine, Gone
from .uploads import Incoming

# bytes of a request; what is larger is uploaded
MOST_BODY = 2**28
_DATA = re.compile(r"data:[^,;]*(;[^,;]+)*;base64,", re.IGNORECASE)


class Scans:
    """Opens what chats name; the same data or file again is the study that is open already.

    Args:
        engine: has the studies.
        folder: below which `file://` may name scans; None allows none.
    """

    def __init__(self, engine: Engine, folder: Path | None) -> None:
        self.engine = engine
        self.folder = None if folder is None else folder.resolve()
        self._known: dict[str, str] = {}
        self._lock = threading.Lock()

    def open(self, url: str, series: str | None = None) -> str:
        """The id of a study.

        Args:
            url: `study:ID` or the id alone, `data:…;base64,…`, or `file:///…`.
            series: which CT series, where there are several; see `read_volume`.

        Raises:
            CTInstructError: for anything else, and for a scan that cannot be read.
            Gone: for a study that is not open any more.
        """
        scheme = urlsplit(url[:200]).scheme.lower()
        if scheme == "data":
            return self._open_data(url, series)
        if scheme == "file":
            return self._open_file(url, series)
        name = url.removeprefix("study:")
        if not re.fullmatch(r"[\w-]{1,64}", name):
            raise CTInstructError(
                "image_url is fetched from nowhere: give study:ID of a study that was uploaded (POST /api/studies), a data "
                "URL of a NIfTI, or a file:// below the folder that the server was started with."
            )
        self.engine.find(name)
        return name

    def _open_data(self, url: str, series: str | None) -> str:
        head = _DATA.match(url)
        if head is None:
            raise CTInstructError("The data URL is none of base64: write data:application/gzip;base64,….")
        try:
            content = base64.b64decode(url[head.end() :], validate=True)
        except (binascii.Error, ValueError) as error:
            raise CTInstructError("The data URL holds no base64.") from error
        if not content:
            raise CTInstructError("The data URL is empty: expected a NIfTI.")
        key = hashlib.sha256(content + (series or "").encode()).hexdigest()

        def read() -> str:
            upload = self.engine.uploads.new()
            name = "scan.nii.gz" if content.startswith(b"\x1f\x8b") else "scan.nii"
            try:
                with self.engine.uploads.use(upload) as place:
                    file = Incoming(place, name, self.engine.limits)
                    file.write(content)
                    file.close()
            except BaseException:
                self.engine.uploads.drop(upload)
                raise
            return self.engine.open_upload(upload, series)

        return self._once(key, read)

    def _open_file(self, url: str, series: str | None) -> str:
        parts = urlsplit(url)
        if self.folder is None or parts.netloc not in ("", "localhost"):
            raise CTInstructError("file:// is not allowed: the server was started without --files.")
        try:
            path = Path(unquote(parts.path)).resolve(strict=True)
        except (OSError, ValueError, RuntimeError):
            path = Path("/")
        if not path.is_relative_to(self.folder):
            raise CTInstructError("file:// names nothing below the folder that the server was started with.")
        key = f"{path} {Scan(path, series).fingerprint()}"
        return self._once(key, lambda: self.engine.open_source(path, series=series))

    def _once(self, key: str, read: object) -> str:
        with self._lock:
            known = self._known.get(key)
            if known is not None:
                try:
                    self.engine.find(known)
                    return known
                except Gone:
                    del self._known[key]
            study = read()  # type: ignore[operator]
            self._known = {key: one for key, one in self._known.items() if one in self.engine.studies}
            self._known[key] = study
            return str(study)


__all__ = ["MOST_BODY", "Scans"]
