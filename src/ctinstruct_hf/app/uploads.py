"""Files that are being uploaded: one folder for each study, which holds nothing but what was sent for it."""

from __future__ import annotations

import re
import secrets
import shutil
import threading
import time
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from ..errors import CTInstructError
from .limits import Busy, Limits

# an upload younger than this (s) is not judged by its speed
_GRACE = 5.0
# formats whose header is a file of its own, beside its data
_HEADERS = (".mhd", ".nhdr", ".hdr", ".npy")


@dataclass
class Upload:
    """The files of one study.

    Attributes:
        folder: where they lie; readable by this user only.
        files: their names in it, in the order of arrival.
        bytes: received so far, files in transfer included.
        users: requests that write to it or read from it at the moment.
        idle: seconds after which it is removed when nobody uses it.
        title: what its scan is called, beside the name of its file.
        reading: its scan is being read.
        dropped: removed meanwhile.
    """

    folder: Path
    idle: float
    title: str | None = None
    files: list[str] = field(default_factory=list)
    bytes: int = 0
    users: int = 0
    begun: float = field(default_factory=time.monotonic)
    touched: float = field(default_factory=time.monotonic)
    reading: bool = False
    dropped: bool = False

    def source(self) -> Path:
        """What to read: the only file, the header of a file in two parts, or the folder."""
        if len(self.files) == 1:
            return self.folder / self.files[0]
        heads = [name for name in self.files if name.lower().endswith(_HEADERS)]
        return self.folder / heads[0] if len(heads) == 1 else self.folder


class Incoming:
    """A file in transfer. It counts against the limits of its upload from its first byte on.

    Raises:
        CTInstructError: for too many files or bytes, or where the upload was removed meanwhile.
    """

    def __init__(self, upload: Upload, name: str, limits: Limits) -> None:
        if len(upload.files) >= limits.upload_files:
            raise CTInstructError(f"A study may have {limits.upload_files} files.")
        self.upload, self.limits, self.size = upload, limits, 0
        taken = {other.casefold() for other in upload.files}
        wanted = self.name = safe_name(name)
        number = len(upload.files)
        while self.name.casefold() in taken:
            self.name = f"{number:06d}_{wanted}"
            number += 1
        self.file: BinaryIO = (upload.folder / self.name).open("xb")
        upload.files.append(self.name)

    def write(self, part: bytes) -> None:
        upload = self.upload
        if upload.dropped:
            raise CTInstructError("This upload was removed, being too slow: send the files again.")
        if upload.bytes + len(part) > self.limits.upload_bytes:
            raise CTInstructError(too_large(self.limits))
        upload.bytes += len(part)
        upload.touched = time.monotonic()
        self.size += len(part)
        self.file.write(part)

    def close(self) -> None:
        self.file.close()

    def discard(self) -> None:
        """Remove what has arrived of it."""
        self.file.close()
        self.upload.bytes -= self.size
        self.upload.files.remove(self.name)
        (self.upload.folder / self.name).unlink(missing_ok=True)


class Uploads:
    """All uploads of a server.

    Args:
        root: where their folders lie.
        limits: how many, how large, how long.
    """

    def __init__(self, root: Path, limits: Limits) -> None:
        self.root, self.limits = root, limits
        self.open: dict[str, Upload] = {}
        self.lock = threading.Lock()

    def new(self, title: str | None = None) -> str:
        """The name of a new one; where there are too many, the slowest is removed.

        Raises:
            Busy: where all have only begun.
        """
        with self.lock:
            if len(self.open) >= self.limits.uploads:
                now = time.monotonic()
                old = [
                    (one.bytes / (now - one.begun), name)
                    for name, one in self.open.items()
                    if now - one.begun > _GRACE and not one.reading
                ]
                if not old:
                    raise Busy("Too many uploads are going on: try again later.")
                self._remove(min(old)[1])
            name = secrets.token_urlsafe(16)
            folder = self.root / f"upload-{secrets.token_hex(8)}"
            folder.mkdir(mode=0o700)
            self.open[name] = Upload(folder, self.limits.idle_upload, title)
        return name

    @contextmanager
    def use(self, name: str, reading: bool = False) -> Iterator[Upload]:
        """An upload, which is not removed for idleness meanwhile, nor, where its scan is read, for others.

        Raises:
            KeyError: for one that is not there, or whose scan is being read already.
        """
        with self.lock:
            upload = self.open[name]
            if upload.reading:
                raise KeyError(name)
            upload.reading = reading
            upload.users += 1
        try:
            yield upload
        finally:
            with self.lock:
                upload.users -= 1
                upload.reading = upload.reading and not reading
                upload.touched = time.monotonic()

    def drop(self, name: str) -> None:
        """Remove an upload and its files; nothing happens where it is gone already."""
        with self.lock:
            self._remove(name)

    def _remove(self, name: str) -> None:
        upload = self.open.pop(name, None)
        if upload is not None:
            upload.dropped = True
            shutil.rmtree(upload.folder, ignore_errors=True)

    def keep(self, name: str) -> Path | None:
        """Take the folder of an upload over; None where it was removed meanwhile."""
        with self.lock:
            upload = self.open.pop(name, None)
        return None if upload is None else upload.folder

    def sweep(self, now: float) -> None:
        """Remove uploads that nobody uses any more."""
        with self.lock:
            for name, one in list(self.open.items()):
                if not one.users and now - one.touched > one.idle:
                    self._remove(name)


def too_large(limits: Limits) -> str:
    return f"The files of a study may have {limits.upload_bytes / 2**30:.3g} GiB together."


def safe_name(name: str) -> str:
    """The last part of a file's name without what could harm: separators, control and format characters, signs that
    shells or other systems read as more than a name. Letters of every script stay."""
    last = unicodedata.normalize("NFC", re.split(r"[/\\]", name)[-1])
    kept = "".join(c if c in "._- ()" or unicodedata.category(c)[0] in "LMN" else "\0" for c in last)
    kept = re.sub(r"_? *\0+", "_", kept)[-100:]
    while len(kept.encode()) > 200:  # file systems count bytes
        kept = kept[1:]
    return kept.lstrip(". ").rstrip(". ") or "scan"


__all__ = ["Incoming", "Upload", "Uploads", "safe_name", "too_large"]
