"""The request file of `ctinstruct watch`: what to ask of which studies, and where they come from and results go."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CTInstructError
from ..files import read_yaml
from ..inference.predict import Request
from .transfer import with_sent_types


@dataclass(frozen=True)
class Order:
    """A request file; its keys are the names of `predict`'s options with underscores, and what follows.

    Attributes:
        input: a folder, dicomweb+http(s)://host:port/path, or dimse://TITLE@host:port to listen on.
        output: folder of results, of the ledger `watch.sqlite` and of `failures.csv`.
        send: an address to store SEG and SR at.
        series_description, body_part: regular expressions, in any case; a series must fit all that are given.
        stable_seconds: how long nothing of a study may change before it is answered.
        poll_seconds: how often the input is looked at.
        days: of a DICOMweb server, studies of so many days back; 0 for all.
        keep_study_uid: write the StudyInstanceUID to `failures.csv`.
        report, ask, segment, diagnose, output_type, model, revision, device, dtype: as for `ctinstruct predict`.
    """

    input: str
    output: str
    send: str | None = None
    series_description: str | None = None
    body_part: str | None = None
    stable_seconds: float = 60.0
    poll_seconds: float = 10.0
    days: int = 7
    keep_study_uid: bool = False
    report: bool = False
    ask: list[str] = field(default_factory=list)
    segment: list[str] = field(default_factory=list)
    diagnose: str | None = None
    output_type: list[str] = field(default_factory=lambda: ["nifti"])
    model: str | None = None
    revision: str | None = None
    device: str | None = None
    dtype: str | None = None

    def request(self) -> Request:
        """What is asked of every scan."""
        output_types = tuple(self.output_type)
        if self.send is not None:
            output_types = with_sent_types(output_types)
        request = Request(self.report, list(self.ask), list(self.segment), self.diagnose, output_types)
        request.report = request.report or request.empty
        return request

    def wants(self, description: str, body_part: str) -> bool:
        """Whether a series is one of those asked for."""
        asked = ((self.series_description, description), (self.body_part, body_part))
        return all(pattern is None or re.search(pattern, text, re.IGNORECASE) for pattern, text in asked)

    @property
    def folder(self) -> Path:
        return Path(self.output)


def read_order(path: Path, changes: Mapping[str, Any]) -> Order:
    """The order of a request file.

    Args:
        path: YAML.
        changes: values that come before the file's; None changes nothing.

    Raises:
        CTInstructError: naming the file and the key.
    """
    found = read_yaml(path)
    if not isinstance(found, dict):
        raise CTInstructError(f"{path.name} is no request: expected 'key: value' lines.")
    settings = {**found, **{key: value for key, value in changes.items() if value is not None}}
    fields = {one.name: one for one in dataclasses.fields(Order)}
    unknown = sorted(str(key) for key in settings if key not in fields)
    if unknown:
        raise CTInstructError(f"{path.name} has unknown keys: {', '.join(unknown)}. It takes {', '.join(fields)}.")
    for key in ("input", "output"):
        if not settings.get(key):
            raise CTInstructError(f"{path.name} has no {key}: add '{key}: …'.")
    for key, value in settings.items():
        settings[key] = _checked(path.name, key, value, str(fields[key].type))
    return Order(**settings)


def _checked(file: str, key: str, value: Any, wanted: str) -> Any:
    """A value of the type that its key has; one word is a list of one."""
    if "list" in wanted:
        value = [value] if isinstance(value, str) else value
        fits = isinstance(value, list) and all(isinstance(one, str) for one in value)
    elif wanted == "bool":
        fits = isinstance(value, bool)
    elif wanted in ("float", "int"):
        fits = isinstance(value, int | (float if wanted == "float" else int)) and not isinstance(value, bool)
        fits = fits and 0 <= value < 10**9
    else:
        fits = isinstance(value, str) or (value is None and "None" in wanted)
    if not fits:
        raise CTInstructError(f"{file} has {key}: {str(value)[:40]}, expected {wanted.replace(' | None', '')}.")
    if key in ("series_description", "body_part") and value is not None:
        try:
            re.compile(value)
        except re.error as error:
            raise CTInstructError(
                f"{file} has {key}: {value[:40]}, which is no regular expression ({error})."
            ) from error
    return value


__all__ = ["Order", "read_order"]
