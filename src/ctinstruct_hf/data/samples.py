"""The rows that data sets are made of: the samples of the two stages made from a case.

A row names its files; voxels are read when a batch is made. Rows are stored with `datasets` (Arrow, Parquet) or as JSONL.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CTInstructError
from ..files import whole_file
from .cases import LAYOUTS, META, SPLITS, ImageRef, Label, MaskRef
from .tasks import TASKS
from .templates import DISEASE_TOKEN, SEG_TOKEN

if TYPE_CHECKING:
    from datasets import Features


@dataclass
class AlignmentSample:
    """Stage one: an image with whatever of text, category labels and masks it has."""

    id: str
    image: ImageRef
    split: str
    source: str
    patient: str = ""
    texts: list[str] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    masks: list[MaskRef] = field(default_factory=list)
    meta: dict[str, str] = field(default_factory=dict)

    @property
    def grains(self) -> list[str]:
        """Which losses it can serve: contrastive, category, segmentation."""
        known = any(label.value >= 0 for label in self.labels)
        have = {"contrastive": bool(self.texts), "category": known, "segmentation": bool(self.masks)}
        return [name for name, there in have.items() if there]

    def check(self) -> None:
        """Raises CTInstructError where the sample contradicts itself."""
        _check_common(self, [self.image])
        if not self.grains:
            raise CTInstructError(f"sample '{self.id}' has no text, no known label and no mask: nothing to learn from.")


@dataclass
class InstructionSample:
    """Stage two: a conversation about one or several images.

    Attributes:
        messages: turns {"role", "content": [{"type": "image"} | {"type": "text", "text": …}]}; images in their order.
        masks: one per `<SEG>` of the answers, in reading order.
        labels: one per `<disease_confidence>` of the answers, in reading order.
        task: one of `tasks.TASKS`.
        meta: of `META`, what is known.
    """

    id: str
    images: list[ImageRef]
    messages: list[dict[str, Any]]
    task: str
    split: str
    source: str
    patient: str = ""
    masks: list[MaskRef] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    meta: dict[str, str] = field(default_factory=dict)

    @property
    def answers(self) -> list[str]:
        return [text_of(turn) for turn in self.messages if turn["role"] == "assistant"]

    def check(self) -> None:
        """Raises CTInstructError where the sample contradicts itself."""
        _check_common(self, self.images)
        if self.task not in TASKS:
            raise CTInstructError(f"sample '{self.id}' has task '{self.task}': use one of {', '.join(TASKS)}.")
        roles = [turn.get("role") for turn in self.messages]
        turns = roles[1:] if roles[:1] == ["system"] else roles
        if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
            raise CTInstructError(f"sample '{self.id}' has turns {roles}: expected user and assistant in turn.")
        shown = sum(part["type"] == "image" for turn in self.messages for part in parts_of(turn))
        if shown != len(self.images):
            raise CTInstructError(
                f"sample '{self.id}' shows {shown} images in its messages and lists {len(self.images)}."
            )
        for token, items, what in ((SEG_TOKEN, self.masks, "masks"), (DISEASE_TOKEN, self.labels, "labels")):
            asked = sum(answer.count(token) for answer in self.answers)
            if asked != len(items):
                raise CTInstructError(f"sample '{self.id}' has {asked} {token} in its answers and {len(items)} {what}.")


def parts_of(turn: dict[str, Any]) -> list[dict[str, Any]]:
    """A turn's content as a list of parts, also where it is plain text."""
    content = turn.get("content")
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content or [])


def text_of(turn: dict[str, Any]) -> str:
    """All text of a turn."""
    return "".join(part.get("text") or "" for part in parts_of(turn) if part["type"] == "text")


def _check_common(sample: AlignmentSample | InstructionSample, images: Sequence[ImageRef]) -> None:
    if not sample.id:
        raise CTInstructError("a sample has an empty id.")
    if sample.split not in SPLITS:
        raise CTInstructError(f"sample '{sample.id}' has split '{sample.split}': use one of {', '.join(SPLITS)}.")
    for image in images:
        if not image.path:
            raise CTInstructError(f"sample '{sample.id}' has an image without a path.")
        if image.layout not in LAYOUTS:
            raise CTInstructError(f"sample '{sample.id}' has layout '{image.layout}': use 'chwd', 'cdhw' or none.")
        if image.spacing and (len(image.spacing) != 3 or min(image.spacing) <= 0):
            raise CTInstructError(f"sample '{sample.id}' has spacing {image.spacing}: expected three positive mm.")
    for label in sample.labels:
        if label.value not in (0, 1, -1):
            raise CTInstructError(f"sample '{sample.id}' has label {label.name} = {label.value}: use 1, 0 or −1.")


AnySample = AlignmentSample | InstructionSample
KINDS: dict[str, type[AnySample]] = {"alignment": AlignmentSample, "instructions": InstructionSample}


def to_row(sample: AnySample) -> dict[str, Any]:
    """Plain dicts and lists, as Arrow and JSON have them."""
    row = asdict(sample)
    row["meta"] = {key: sample.meta.get(key, "") for key in META}
    if isinstance(sample, InstructionSample):  # every part with the same fields, as Arrow wants it
        row["messages"] = [
            {
                "role": turn["role"],
                "content": [{"type": part["type"], "text": part.get("text") or ""} for part in parts_of(turn)],
            }
            for turn in sample.messages
        ]
    return row


def from_row(row: dict[str, Any], kind: str) -> AnySample:
    """The sample of a row, checked.

    Raises:
        CTInstructError: for a missing or unknown field, or a sample that contradicts itself.
    """
    target = KINDS[kind]
    known = {one.name for one in fields(target)}
    unknown = set(row) - known
    if unknown:
        raise CTInstructError(f"a sample has unknown fields {sorted(unknown)}: known are {sorted(known)}.")
    values = dict(row)
    try:
        for name, item in (("masks", MaskRef), ("labels", Label), ("images", ImageRef)):
            if name in values:
                values[name] = [item(**_filled(one)) for one in values[name] or []]
        if "meta" in values:
            values["meta"] = {key: str(value) for key, value in (values["meta"] or {}).items() if value}
        if isinstance(values.get("image"), dict):
            values["image"] = ImageRef(**_filled(values["image"]))
        if kind == "instructions":  # Arrow gives an image an empty text
            values["messages"] = [{"role": turn["role"], "content": _parts_of_row(turn)} for turn in values["messages"]]
        sample = target(**values)
    except (TypeError, KeyError) as error:
        raise CTInstructError(f"sample '{row.get('id', '?')}' is malformed: {error}.") from error
    sample.check()
    return sample


def _parts_of_row(turn: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"type": "image"} if part["type"] == "image" else dict(part) for part in parts_of(turn)]


def _filled(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def write_jsonl(samples: Iterable[AnySample], path: Path) -> int:
    """One sample a line; the number of lines. The file appears when it is whole."""
    count = 0
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for sample in samples:
            sample.check()
            file.write(json.dumps(to_row(sample), ensure_ascii=False) + "\n")
            count += 1
    return count


def read_jsonl(path: Path, kind: str = "instructions") -> Iterator[AnySample]:
    """Samples of a JSONL file.

    Raises:
        CTInstructError: naming the file and the line.
    """
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield from_row(json.loads(line), kind)
            except (CTInstructError, json.JSONDecodeError, AttributeError) as error:
                raise CTInstructError(f"{path.name}, line {number}: {error}") from error


def features(kind: str) -> Features:
    """The Arrow schema of a kind of sample."""
    from datasets import Features, List, Value

    text, number = Value("string"), Value("float32")
    image = {"path": text, "slope": number, "intercept": number, "spacing": List(number), "layout": text}
    label = {"name": text, "value": Value("int8")}
    shared: dict[str, Any] = {
        "id": text,
        "split": text,
        "source": text,
        "patient": text,
        "labels": List(label),
        "masks": List({"name": text, "path": text, "values": List(Value("int32"))}),
        "meta": dict.fromkeys(META, text),
    }
    if kind == "alignment":
        return Features({**shared, "image": image, "texts": List(text)})
    part = {"type": text, "text": text}
    return Features(
        {**shared, "images": List(image), "task": text, "messages": List({"role": text, "content": List(part)})}
    )
