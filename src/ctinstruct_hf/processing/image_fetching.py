"""Scans given as bytes, base64, data URL or URL: unpacked into a file, read, and gone again.

No error message holds anything of what was given but its size, its host or its first bytes' format.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import tempfile
from collections.abc import Callable
from io import BufferedIOBase, RawIOBase
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub.utils import httpx

from .volume import MAX_BYTES, CTInstructError, CTVolume

# (offset, first bytes) of a file -> a suffix of its format
_FORMATS: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\x1f\x8b", ".nii.gz"),
    (344, b"n+1\x00", ".nii"),
    (344, b"ni1\x00", ".nii"),
    (4, b"n+2\x00", ".nii"),
    (128, b"DICM", ".dcm"),
    (0, b"PK\x03\x04", ".zip"),
    (0, b"NRRD", ".nrrd"),
    (0, b"ObjectType", ".mha"),
    (0, b"\x93NUMPY", ".npy"),
    (0, b"\x89PNG", ".png"),
    (0, b"\xff\xd8\xff", ".jpg"),
    (0, b"BM", ".bmp"),
    (0, b"II*\x00", ".tif"),
    (0, b"MM\x00*", ".tif"),
)
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*):(//)?", re.IGNORECASE)
_LONGEST_PATH = 1024
_TIMEOUT = 60.0  # seconds without an answer


def content_of(image: Any) -> bytes | None:
    """The bytes of `image`: bytes, an open binary file, a URL, a data URL or base64; None for anything else.

    Raises:
        CTInstructError: for a URL that cannot be loaded, a scheme other than http and https, or text that is neither a path
            nor base64.
    """
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if isinstance(image, BufferedIOBase | RawIOBase):
        return image.read(MAX_BYTES + 1)
    if not isinstance(image, str):
        return None
    if _exists(image):
        return None
    scheme = _SCHEME.match(image)
    if scheme is not None and len(scheme[1]) > 1:  # one letter is a drive of Windows
        if scheme[1].lower() in ("http", "https"):
            return load_url(image)
        if scheme[1].lower() == "data":
            return from_data_url(image)
        if scheme[2]:
            raise CTInstructError(f"An image has a URL of the scheme '{scheme[1]}': use http, https or data.")
    content = decoded(image)
    if content is not None and suffix_of(content):
        return content
    if len(image) > _LONGEST_PATH:
        raise CTInstructError(
            f"An image of {len(image)} characters is neither a path nor a volume or picture in base64."
        )
    return None


def _exists(path: str) -> bool:
    try:
        return len(path) <= _LONGEST_PATH and Path(path).exists()
    except (OSError, ValueError):
        return False


def decoded(text: str) -> bytes | None:
    """Bytes of base64, with or without line breaks and padding, also with the letters for URLs; None where it is not."""
    compact = "".join(text.split()).replace("-", "+").replace("_", "/").rstrip("=")
    try:
        return base64.b64decode(compact + "=" * (-len(compact) % 4), validate=True)
    except (binascii.Error, ValueError):
        return None


def from_base64(text: str) -> bytes:
    """Bytes of base64 or of a data URL. Raises CTInstructError where the text is neither."""
    content = from_data_url(text) if text.lower().startswith("data:") else decoded(text)
    if content is None:
        raise CTInstructError(f"An image of {len(text)} characters is not base64.")
    return content


def from_data_url(url: str) -> bytes:
    """Bytes of `data:…;base64,…`. Raises CTInstructError for another form."""
    head, comma, body = url.partition(",")
    content = decoded(body) if comma and head.lower().endswith(";base64") else None
    if content is None:
        raise CTInstructError(f"An image of {len(url)} characters is no data URL in base64 (data:…;base64,…).")
    return content


def load_url(url: str) -> bytes:
    """The content of an http or https URL, at most `MAX_BYTES`."""
    host = urlsplit(url).hostname or "?"
    content = bytearray()
    try:
        with httpx.stream("GET", url, follow_redirects=True, timeout=_TIMEOUT) as answer:
            if answer.status_code != 200:
                raise CTInstructError(f"{host} answers {answer.status_code} to the URL of an image.")
            for part in answer.iter_bytes():
                content += part
                if len(content) > MAX_BYTES:
                    raise CTInstructError(f"{host} sends an image of more than {MAX_BYTES / 2**30:.3g} GiB.")
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        if isinstance(error, CTInstructError):
            raise
        raise CTInstructError(f"An image cannot be loaded from {host}: {type(error).__name__}.") from None
    return bytes(content)


def suffix_of(content: bytes) -> str | None:
    """The suffix of the format that the first bytes belong to, None where none is known."""
    fitting = (suffix for offset, magic, suffix in _FORMATS if content[offset : offset + len(magic)] == magic)
    return next(fitting, None)


def read_content(content: bytes, read: Callable[[Path], CTVolume]) -> CTVolume:
    """The volume in the bytes of a file, by `read` of a path; no file stays behind.

    Raises:
        CTInstructError: where the format is not known or the content is broken.
    """
    suffix = suffix_of(content)
    if suffix is None:
        raise CTInstructError(
            f"An image of {len(content)} bytes is in no known format: NIfTI, DICOM, zip, NRRD, MHA, NumPy, PNG, JPEG, BMP "
            "and TIFF are."
        )
    with tempfile.TemporaryDirectory(prefix=f"ctinstruct-image-{os.getpid()}-") as folder:
        file = Path(folder) / f"image{suffix}"
        file.write_bytes(content)
        volume = read(file)
    volume.source.name, volume.source.path, volume.source.dicom_files = "", None, []
    return volume
