"""What a reader corrects: sentences of the report, findings and masks, kept beside what the model said."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass, field
from typing import Any

from ..errors import CTInstructError

STATES = ("open", "accepted", "changed", "struck")
_HEADING = re.compile(r"\s*([A-Z][A-Za-z ]{2,40}):\s*")


def split_report(report: str) -> list[dict[str, str]]:
    """The sentences of a report: `section` (a heading as "Findings", or ""), `original`, `text` and `state`, one of `STATES`."""
    found, section = [], ""
    for line in re.split(r"(?<=[.!?])\s+|\n+", report):
        heading = _HEADING.match(line)
        if heading:
            section, line = heading[1], line[heading.end() :]
        if line.strip():
            found.append({"section": section, "original": line.strip(), "text": line.strip(), "state": "open"})
    return found


@dataclass
class Review:
    """What a reader corrected of one study.

    Attributes:
        sentences: as `split_report` gives them, with the reader's `text` and `state`.
        labels: {finding: there or not}.
        edited: {name of a corrected mask: the structure that it is of}.
    """

    sentences: list[dict[str, str]] = field(default_factory=list)
    labels: dict[str, bool] = field(default_factory=dict)
    edited: dict[str, str] = field(default_factory=dict)

    def sentences_of(self, report: str | None) -> list[dict[str, str]]:
        """The sentences of a report, as corrected where it is still the one that was corrected."""
        fresh = split_report(report or "")
        same = [one["original"] for one in self.sentences] == [one["original"] for one in fresh]
        return self.sentences if same else fresh

    def correct(self, report: str | None, sentences: Any) -> None:
        """Keep what became of each sentence.

        Args:
            sentences: {"text", "state"} of each sentence of `sentences_of(report)`, in their order.

        Raises:
            CTInstructError: for anything else.
        """
        current = self.sentences_of(report)
        if not isinstance(sentences, list) or len(sentences) != len(current):
            raise CTInstructError(f"sentences must be a list of {len(current)}, one for each sentence of the report.")
        corrected = []
        for one, before in zip(sentences, current, strict=True):
            text, state = (one.get("text"), one.get("state")) if isinstance(one, dict) else (None, None)
            if not isinstance(text, str) or len(text) > 2000 or state not in STATES:
                raise CTInstructError(f"Each sentence needs a text of at most 2000 characters and a state of {STATES}.")
            corrected.append({**before, "text": " ".join(text.split()), "state": state})
        self.sentences = corrected

    def mark(self, labels: Any, known: list[str]) -> None:
        """Keep which findings are there, by the reader; None forgets one.

        Raises:
            CTInstructError: for a finding that the model does not know, and for another value.
        """
        if not isinstance(labels, dict):
            raise CTInstructError("labels must be an object: {finding: true, false or null}.")
        for name, value in labels.items():
            if name not in known or not (value is None or isinstance(value, bool)):
                raise CTInstructError(
                    f"labels has '{name[:60]}': give findings of the model's lists and true, false or null."
                )
        self.labels = {name: value for name, value in {**self.labels, **labels}.items() if value is not None}


def sections_of(sentences: list[dict[str, str]]) -> list[tuple[str, str]]:
    """(heading, text) of each section, without struck sentences."""
    found: dict[str, list[str]] = {}
    for one in sentences:
        if one["state"] != "struck" and one["text"]:
            found.setdefault(one["section"], []).append(one["text"])
    return [(section, " ".join(texts)) for section, texts in found.items()]


def as_text(sentences: list[dict[str, str]]) -> str:
    return "\n\n".join(f"{section}: {text}" if section else text for section, text in sections_of(sentences))


def as_markdown(sentences: list[dict[str, str]]) -> str:
    """With a heading for each section; what would be markup is escaped."""
    parts = ["# Report"]
    for section, text in sections_of(sentences):
        plain = re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", text)
        parts.append(f"## {section}\n\n{plain}" if section else plain)
    return "\n\n".join(parts)


def as_docx(sentences: list[dict[str, str]], notice: str) -> bytes:
    """A Word document.

    Raises:
        CTInstructError: where python-docx is not installed.
    """
    try:
        from docx import Document
    except ModuleNotFoundError as error:
        raise CTInstructError("DOCX needs python-docx on the server: pip install 'ctinstruct-hf[app]'.") from error
    document = Document()
    document.core_properties.author = "ctinstruct-hf"
    document.add_paragraph(notice).runs[0].bold = True
    document.add_heading("Report", 1)
    for section, text in sections_of(sentences):
        if section:
            document.add_heading(section, 2)
        document.add_paragraph(text)
    file = io.BytesIO()
    document.save(file)
    return file.getvalue()


__all__ = ["Review", "as_docx", "as_markdown", "as_text", "sections_of", "split_report"]
