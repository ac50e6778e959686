"""The release's own instruction files: a JSON list of questions, image paths and answers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import CTInstructError
from ...modeling.configuration_ctinstruct import CT_RATE_DISEASES, RAD_CHESTCT_DISEASES
from ..cases import ImageRef, Label, MaskRef
from ..samples import InstructionSample
from ..templates import DISEASE_TOKEN, SEG_TOKEN
from .common import Problem, read_json, split_in_name

_LISTS = {len(names): names for names in (CT_RATE_DISEASES, RAD_CHESTCT_DISEASES)}
# tokens with which the release marks the kind of a question; the messages carry none
_MARKS = re.compile("<(binary_answer|multiple_choice|report_generation|segmentation|diagnosis)>")


def samples(folder: Path) -> Iterator[InstructionSample | Problem]:
    """Samples of every JSON file of a folder, or of one file; paths in it are taken from the file's folder.

    Crop boxes (`renorm_y1x1z1_y2x2z2`) are not used: the whole image is fitted to its canvas.
    """
    files = [folder] if folder.is_file() else sorted(folder.glob("*.json"))
    if not files:
        raise CTInstructError(f"{folder} has no .json file of the release.")
    for file in files:
        rows = read_json(file)
        if not isinstance(rows, list):
            raise CTInstructError(f"{file.name} is no list of questions.")
        for number, row in enumerate(rows):
            name = f"{file.stem}/{number}"
            try:
                yield _sample(row, name, file)
            except (CTInstructError, KeyError, TypeError, IndexError) as error:
                yield Problem(name, f"{file.name}, entry {number}: {error if str(error) else type(error).__name__}")


def _sample(row: dict[str, Any], name: str, file: Path) -> InstructionSample:
    stored = row["image_path"] if isinstance(row["image_path"], list) else [row["image_path"]]
    images = [ImageRef(str(file.parent / path)) for path in stored]
    asked = "".join(part.get("text", "") for part in row["question"] if part["type"] == "text")
    marks = _MARKS.findall(asked)
    answer = row["answer"] if isinstance(row["answer"], str) else " ".join(row["answer"])
    content: list[dict[str, Any]] = [{"type": "image"} for _ in images]
    content.append({"type": "text", "text": _MARKS.sub("", asked).strip()})
    sample = InstructionSample(
        id=name,
        images=images,
        messages=[
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ],
        task=_task(marks, answer),
        split=split_in_name(file.stem),
        source="released",
        patient=Path(stored[0]).stem,
        masks=_masks(row, file, answer),
        labels=_labels(row, answer),
    )
    sample.check()
    return sample


def _task(marks: list[str], answer: str) -> str:
    if SEG_TOKEN in answer:
        return "segmentation"
    if DISEASE_TOKEN in answer:
        return "diagnosis"
    if "report_generation" in marks:
        return "report"
    return "multiple_choice" if "multiple_choice" in marks else "question"


def _masks(row: dict[str, Any], file: Path, answer: str) -> list[MaskRef]:
    count = answer.count(SEG_TOKEN)
    if not count:
        return []
    paths = row["mask_path"] if isinstance(row["mask_path"], list) else [row["mask_path"]]
    chosen = [
        [int(one) for one in (labels if isinstance(labels, list) else [labels])] for labels in row["choose_labels"]
    ]
    flat = [(str(file.parent / path), value) for path, labels in zip(paths, chosen, strict=True) for value in labels]
    if count == len(flat):  # a token a label
        return [MaskRef(f"label {value}", path, [value]) for path, value in flat]
    if count == len(chosen):  # a token an image: all of its labels together
        return [MaskRef("label " + " ".join(map(str, labels)), str(file.parent / path), labels) for path, labels in zip(paths, chosen, strict=True)]  # fmt: skip
    raise CTInstructError(f"{count} {SEG_TOKEN} for {len(flat)} labels of {len(chosen)} images")


def _labels(row: dict[str, Any], answer: str) -> list[Label]:
    count = answer.count(DISEASE_TOKEN)
    if not count:
        return []
    targets = [int(value) for value in row["targets"]]
    if len(targets) != count:
        raise CTInstructError(f"{count} {DISEASE_TOKEN} for {len(targets)} targets")
    names = _LISTS.get(count) or [f"disease {index + 1}" for index in range(count)]
    return [Label(name, value) for name, value in zip(names, targets, strict=True)]


SOURCES = {"released": samples}
