"""Addresses of archives: `dicomweb+http(s)://host:port/path[/studies/UID[/series/UID]]` and `dimse://TITLE@host:port`."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from ..errors import CTInstructError

WEB, DIMSE = ("dicomweb+http", "dicomweb+https"), "dimse"
_UID = re.compile(r"[0-9][0-9.]*", re.ASCII)


@dataclass(frozen=True)
class Address:
    """A parsed address.

    Attributes:
        scheme: one of `WEB`, or `DIMSE`.
        base: of a DICOMweb server, where `/studies` lies below.
        study, series: UIDs, where the address names them.
        host, port, title: of a DIMSE application entity.
    """

    scheme: str
    base: str = ""
    study: str | None = None
    series: str | None = None
    host: str = ""
    port: int = 0
    title: str = ""

    @property
    def server(self) -> str:
        """How errors name it: without UIDs."""
        return self.base or f"{self.title}@{self.host}:{self.port}"


def is_address(text: str) -> bool:
    """Whether a text is an address of an archive, not a path."""
    return text.split("://")[0].lower() in (*WEB, DIMSE) and "://" in text


def parse_address(text: str) -> Address:
    """An address from its text.

    Raises:
        CTInstructError: for what is no address; credentials in it are refused.
    """
    scheme = text.split("://")[0].lower()
    try:
        parts = urlsplit(text.removeprefix("dicomweb+") if scheme in WEB else text)
        port = parts.port
    except ValueError as error:
        raise CTInstructError(f"The address after {scheme}:// is no address: expected host:port/path.") from error
    if not parts.hostname:
        raise CTInstructError(f"The address after {scheme}:// names no host: expected host:port/path.")
    if scheme == DIMSE:
        if not port or not parts.username or parts.password or len(parts.username) > 16:
            raise CTInstructError("A DIMSE address is dimse://TITLE@host:port, with a title of at most 16 letters.")
        return Address(DIMSE, host=parts.hostname, port=port, title=parts.username)
    if parts.username or parts.password:
        raise CTInstructError(
            "The address holds a user or password: set CTINSTRUCT_DICOMWEB_USER and CTINSTRUCT_DICOMWEB_PASSWORD, or "
            "CTINSTRUCT_DICOMWEB_TOKEN, in the environment instead."
        )
    if parts.query or parts.fragment:
        raise CTInstructError("The address has a query: expected host:port/path/studies/UID[/series/UID].")
    path, _, below = parts.path.rstrip("/").partition("/studies/")
    path = path.removesuffix("/studies")
    study, _, series = below.partition("/series/")
    if any(uid and not is_uid(uid) for uid in (study, series)):
        raise CTInstructError("The address has no UID after /studies/ or /series/: it is digits and dots.")
    base = f"{parts.scheme.lower()}://{parts.netloc}{path}"
    return Address(scheme, base, study or None, series or None, host=parts.hostname)


def is_uid(text: str) -> bool:
    """Whether a text is a UID, as far as archives keep to it: digits and dots."""
    return _UID.fullmatch(text) is not None


def hashed(text: str) -> str:
    """A text that identifies as one that does not, the same each time."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def object_name(instance: str) -> str:
    """The name of an object's file: errors quote names of files, so it holds no UID."""
    return f"{hashed(instance)[:16]}.dcm"


__all__ = ["DIMSE", "WEB", "Address", "hashed", "is_address", "is_uid", "object_name", "parse_address"]
