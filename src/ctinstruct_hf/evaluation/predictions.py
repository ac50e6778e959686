"""Predictions of any system as JSONL, a record per sample, with masks as files beside it.

The first line may be a header {"system": name, …}. A record has an `id`, a `task`, and by task
  report, caption, question   prediction, reference (texts); question
  multiple_choice             prediction, reference, options; question
  diagnosis                   probabilities {name: 0…1}, labels {name: 1, 0, −1}
  segmentation                masks [{name, prediction: file, reference: file or {path, values}}], or instead of the files
                              a `dice` that was computed elsewhere
  retrieval                   image_features, text_features (numbers)
and, where known, `dataset`, `split`, `meta` {scanner, sex, age, slice_thickness}. A record with an `error` failed.
`scan` is the same in all records about a scan; without it, the id up to its first "/".
Of segmentation and diagnosis, `free` is the answer that the system generated freely: {answer, as_asked: whether it has
exactly the masks or probabilities asked for, probabilities}; the files of its masks are `free` in `masks`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..data import tasks
from ..errors import CTInstructError
from ..files import whole_file

_PAPER = ("report", "caption", "question", "multiple_choice", "diagnosis", "segmentation", "retrieval")
# a task that was added to `data.tasks` is answered in text, unless its answers have masks or probabilities
SCORED_TASKS = (*_PAPER, *(name for name in tasks.TASKS if name not in _PAPER))
TEXT_TASKS = ("report", "caption", "question", *SCORED_TASKS[len(_PAPER) :])
_NEEDED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(TEXT_TASKS, ("prediction", "reference")),
    "multiple_choice": ("prediction", "reference", "options"),
    "diagnosis": ("probabilities", "labels"),
    "segmentation": ("masks",),
    "retrieval": ("image_features", "text_features"),
}


@dataclass
class Record:
    """A system's answer about a sample, and the right answer. See the module's text for the fields of each task."""

    id: str
    task: str
    dataset: str = ""
    split: str = "test"
    question: str = ""
    prediction: str = ""
    reference: str = ""
    options: list[str] = field(default_factory=list)
    probabilities: dict[str, float] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    masks: list[dict[str, Any]] = field(default_factory=list)
    image_features: list[float] = field(default_factory=list)
    text_features: list[float] = field(default_factory=list)
    free: dict[str, Any] = field(default_factory=dict)
    scan: str = ""
    meta: dict[str, str] = field(default_factory=dict)
    error: str = ""


@dataclass
class Predictions:
    """Records of a system.

    Attributes:
        system: its name in tables.
        records: of each sample.
        folder: file names in the records are relative to it.
        header: the first line of the file.
    """

    system: str
    records: list[Record]
    folder: Path = Path(".")
    header: dict[str, Any] = field(default_factory=dict)

    @property
    def failed(self) -> list[Record]:
        return [record for record in self.records if record.error]

    @property
    def good(self) -> list[Record]:
        return [record for record in self.records if not record.error]


def to_json(record: Record) -> str:
    """One line, without what is empty."""
    kept = {name: value for name, value in asdict(record).items() if value not in ("", [], {})}
    if not record.error:  # an empty answer is an answer
        kept |= {name: getattr(record, name) for name in _NEEDED[record.task]}
    return json.dumps(kept, ensure_ascii=False)


def parse_record(values: Any) -> Record:
    """A record from its fields.

    Raises:
        CTInstructError: for what is missing, unknown or no number.
    """
    if not isinstance(values, dict):
        raise CTInstructError("a record must be an object.")
    known = set(Record.__dataclass_fields__)
    unknown = sorted(set(values) - known)
    if unknown:
        raise CTInstructError(f"unknown fields {', '.join(unknown)}: known are {', '.join(sorted(known))}.")
    if not values.get("id") or values.get("task") not in SCORED_TASKS:
        raise CTInstructError(f"a record needs an id and a task of {', '.join(SCORED_TASKS)}; this one has id "
                              f"'{values.get('id', '')}' and task '{values.get('task', '')}'.")  # fmt: skip
    name = f"record '{values['id']}'"
    record = Record(**{**values, "id": str(values["id"])})
    if record.error:
        return record
    missing = [key for key in _NEEDED[record.task] if key not in values]
    if missing:
        raise CTInstructError(f"{name} lacks {', '.join(missing)}, which task {record.task} needs.")
    for key in ("prediction", "reference"):
        if not isinstance(getattr(record, key), str):
            raise CTInstructError(f"{name} has a {key} that is no text.")
    if record.free and not isinstance(record.free.get("as_asked"), bool):
        raise CTInstructError(f"{name} has a free answer without as_asked, true or false.")
    bad = [key for key, value in (record.free.get("probabilities") or {}).items() if not _is_probability(value)]
    if bad:
        raise CTInstructError(f"{name} has a free answer without a probability between 0 and 1 for {', '.join(bad)}.")
    if record.task == "diagnosis":
        bad = [key for key, value in record.probabilities.items() if not _is_probability(value)]
        if bad:
            raise CTInstructError(f"{name} has no probability between 0 and 1 for {', '.join(bad)}.")
        if set(record.probabilities) != set(record.labels):
            different = sorted(set(record.probabilities) ^ set(record.labels))
            raise CTInstructError(f"{name} has probabilities and labels of different diseases: {', '.join(different)}.")
        wrong = [key for key, value in record.labels.items() if value not in (0, 1, -1)]
        if wrong:
            raise CTInstructError(f"{name} has labels other than 1, 0, −1: {', '.join(wrong)}.")
    if record.task == "segmentation":
        for mask in record.masks:
            if "name" not in mask or not ("dice" in mask or {"prediction", "reference"} <= set(mask)):
                raise CTInstructError(f"{name} has a mask without a name, or without prediction and reference.")
    if record.task == "retrieval":
        for key in ("image_features", "text_features"):
            if not all(isinstance(value, int | float) and math.isfinite(value) for value in getattr(record, key)):
                raise CTInstructError(f"{name} has {key} that are no finite numbers.")
    return record


def _is_probability(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def read_predictions(path: Path) -> Predictions:
    """A file of predictions, checked.

    Raises:
        CTInstructError: naming the file, the line and the record; also for ids that come twice.
    """
    if not path.is_file():
        raise CTInstructError(f"{path} does not exist.")
    header: dict[str, Any] = {}
    records: list[Record] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            if not records and not header and isinstance(values, dict) and "system" in values and "id" not in values:
                header = values
                continue
            records.append(parse_record(values))
        except (CTInstructError, json.JSONDecodeError, TypeError) as error:
            raise CTInstructError(f"{path.name}, line {number}: {error}") from error
    check_ids(records, path.name)
    return Predictions(str(header.get("system") or path.stem), records, path.parent, header)


def check_ids(records: Sequence[Record], where: str) -> None:
    """Raises CTInstructError where an id comes twice in a task."""
    counts = Counter((record.task, record.id) for record in records)
    twice = sorted({name for (_, name), count in counts.items() if count > 1})
    if twice:
        raise CTInstructError(f"{where} has ids more than once: {_some(twice)}.")


def check_same(first: Predictions, second: Predictions, keys: Iterable[tuple[str, str]]) -> None:
    """Raises CTInstructError where two systems answered different samples of a (task, dataset)."""
    for task, dataset in keys:
        a, b = (
            {record.id for record in system.records if (record.task, record.dataset) == (task, dataset)}
            for system in (first, second)
        )
        if a != b:
            only = [f"{len(a - b)} only in {first.system} ({_some(sorted(a - b))})"] if a - b else []
            only += [f"{len(b - a)} only in {second.system} ({_some(sorted(b - a))})"] if b - a else []
            raise CTInstructError(f"{task} on {dataset or 'the data'} has different samples: {'; '.join(only)}.")


def _some(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(str(name) for name in names[:most]) + more


def write_predictions(predictions: Predictions, path: Path) -> None:
    """Header and records; the file appears when it is whole."""
    check_ids(predictions.records, path.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for line in lines_of(predictions):
            file.write(line + "\n")


def lines_of(predictions: Predictions) -> Iterator[str]:
    yield json.dumps({**predictions.header, "system": predictions.system, "research_use_only": True})
    yield from (to_json(record) for record in predictions.records)


__all__ = ["SCORED_TASKS", "Predictions", "Record", "check_same", "read_predictions", "write_predictions"]
