"""Output of other systems' evaluation scripts, as records of `predictions`.

m3d        M3D's `eval_close_vqa.csv`, `eval_open_vqa.csv`, `eval_caption.csv` (recognised by their columns)
radfm      RadFM's `output_whole_2_epoch….csv`: Question, Ground Truth, Pred, belong_to
ct_chat    CT-CHAT's `output_validation_….json`, with CT-RATE's `valid_vqa.json` for the right answers
released   the CTInstruct release's `<task>.json`: {"metric": …, "1": {"predict", "ground_truth", "question", …}}
"""

from __future__ import annotations

import ast
import csv
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import CTInstructError
from .choices import options_of
from .predictions import Predictions, Record, check_ids

_MARKS = ("<image>\n", "<image>", "<report_generation>", "<short_answer>", "<long_answer>", "<multiple_choice>")


def convert_predictions(
    converter: str, path: Path, references: Path | None = None, dataset: str = "", system: str | None = None
) -> Predictions:
    """Predictions of another system from the file that its evaluation script writes.

    Args:
        converter: of `CONVERTERS`.
        path: the file.
        references: the right answers, where the file lacks them (ct_chat).
        dataset: name of the data set, for tables (ct_rate, rp3d_vqa …); each converter has a default.
        system: its name in tables.

    Raises:
        CTInstructError: for a file of another form, naming it and what it lacks.
    """
    if converter not in CONVERTERS:
        raise CTInstructError(f"'{converter}' is not known: use {', '.join(CONVERTERS)}.")
    for file in (path, references):
        if file is not None and not file.is_file():
            raise CTInstructError(f"{file} does not exist.")
    name, usual, convert = CONVERTERS[converter]
    records = list(convert(path, references))
    if not records:
        raise CTInstructError(f"{path.name} has no sample.")
    for record in records:
        record.dataset = dataset or record.dataset or usual
    check_ids(records, path.name)
    return Predictions(system or name, records, path.parent, {"converted_from": converter})


def _rows(path: Path, needed: Sequence[str]) -> list[dict[str, str]]:
    csv.field_size_limit(10_000_000)
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in needed if name not in (reader.fieldnames or [])]
        if missing:
            raise CTInstructError(f"{path.name} lacks the columns {', '.join(missing)}.")
        return list(reader)


def _json(path: Path, expected: type) -> Any:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CTInstructError(f"{path.name} is no JSON: {error}") from error
    if not isinstance(read, expected):
        raise CTInstructError(f"{path.name} holds {type(read).__name__}, expected {expected.__name__}.")
    return read


def _m3d(path: Path, references: Path | None) -> Iterator[Record]:
    with path.open(encoding="utf-8", newline="") as file:
        columns = next(csv.reader(file), [])
    # task, columns, and how the prediction's and the right answer's are called
    task, needed, predicted, right = (
        ("multiple_choice", ("Question", "Answer", "Answer Choice", "Pred"), "Pred", "Answer")
        if "Answer Choice" in columns
        else ("caption", ("Question", "Ground Truth", "pred"), "pred", "Ground Truth")
        if "Ground Truth" in columns
        else ("question", ("Question", "Answer", "Pred"), "Pred", "Answer")
    )
    for index, row in enumerate(_rows(path, needed)):
        record = Record(f"{path.stem}-{index}", task, question=row["Question"], prediction=row[predicted].strip(),
                        reference=row[right].strip())  # fmt: skip
        if task == "multiple_choice":
            record.reference = f"{row['Answer Choice']}. {row['Answer']}".strip()
            record.options = options_of(row["Question"])
        yield record


def _unlisted(cell: str) -> str:
    """The text of a cell; RadFM writes lists of a single text as Python prints them."""
    if cell.startswith("["):
        try:
            inside = ast.literal_eval(cell)
        except (ValueError, SyntaxError):
            return cell
        if isinstance(inside, list) and inside and all(isinstance(entry, str) for entry in inside):
            return inside[0]
    return cell


def _radfm(path: Path, references: Path | None) -> Iterator[Record]:
    for index, row in enumerate(_rows(path, ("Question", "Ground Truth", "Pred"))):
        source = _unlisted(row.get("belong_to") or "")
        task = "caption" if "caption" in source.lower() else "report" if "report" in source.lower() else "question"
        yield Record(f"{path.stem}-{index}", task, dataset=source, question=_unlisted(row["Question"]),
                     prediction=_unlisted(row["Pred"]).strip(), reference=_unlisted(row["Ground Truth"]).strip())  # fmt: skip


def _plain_name(image: str) -> str:
    return Path(image).name.split(".")[0]


def _ct_chat(path: Path, references: Path | None) -> Iterator[Record]:
    if references is None:
        raise CTInstructError(
            "ct_chat needs --references: CT-RATE's valid_vqa.json, since the file has no right answers."
        )
    answered = _json(path, list)
    right = _json(references, list)
    if len(answered) != len(right):
        raise CTInstructError(f"{path.name} has {len(answered)} conversations, {references.name} {len(right)}.")
    for index, (out, truth) in enumerate(zip(answered, right, strict=True)):
        try:
            answers, turns = out["conversations_out"], truth["conversations"]
            name = str(truth.get("id", index))
            if _plain_name(out["image"]) != _plain_name(truth["image"]):
                raise CTInstructError(
                    f"{path.name}, conversation {index}: it is about {out['image']}, {references.name} about {truth['image']}."
                )
            asked = [turn for turn, content in enumerate(turns) if content["from"] == "human"]
            if len(asked) != len(answers):
                raise CTInstructError(
                    f"{path.name}, conversation {index}: {len(answers)} answers for {len(asked)} questions."
                )
            for number, (turn, answer) in enumerate(zip(asked, answers, strict=True)):
                question = _without_marks(turns[turn]["value"])
                spoken = re.sub(r"</?s>|<\|[^|]*\|>", "", answer["answer"]).strip()
                record = Record(f"{name}-{number}", "question", question=question, prediction=spoken,
                                reference=turns[turn + 1]["value"].strip())  # fmt: skip
                if turns[turn].get("type") == "report_generation":
                    record.task = "report"
                elif turns[turn].get("type") == "multiple_choice":
                    record.task, record.options = "multiple_choice", options_of(question)
                yield record
        except (KeyError, IndexError, TypeError) as error:
            raise CTInstructError(f"{path.name}, conversation {index} has another form: {error!r}.") from error


def _without_marks(text: str) -> str:
    for mark in _MARKS:
        text = text.replace(mark, "")
    return text.strip()


def _released(path: Path, references: Path | None) -> Iterator[Record]:
    read = _json(path, dict)
    samples = {name: value for name, value in read.items() if name != "metric"}
    for name, sample in samples.items():
        if not isinstance(sample, dict) or "predict" not in sample:
            raise CTInstructError(f"{path.name}, sample {name} has no 'predict'.")
        prediction, reference, question = (
            _first(sample.get(key, "")) for key in ("predict", "ground_truth", "question")
        )
        spoken = prediction.split("assistant\n", 1)[-1].strip()
        if "<disease_confidence>" in reference:
            raise CTInstructError(
                f"{path.name} is a diagnosis file: the release keeps no probabilities of its samples there."
            )
        record = Record(
            f"{path.stem}-{name}", "question", question=question, prediction=spoken, reference=reference.strip()
        )
        if "dice" in sample:
            record = Record(f"{path.stem}-{name}", "segmentation", question=question,
                            masks=[{"name": question, "dice": float(sample["dice"])}])  # fmt: skip
        elif re.search(r"report", path.stem + question, re.I):
            record.task = "report"
        elif re.search(r"cap", path.stem, re.I):
            record.task = "caption"
        yield record


def _first(value: Any) -> str:
    """The first text inside (nested) lists and message parts."""
    if isinstance(value, dict):
        value = value.get("text", "")
    if isinstance(value, list):
        return next((text for part in value if (text := _first(part))), "")
    return str(value)


CONVERTERS: dict[str, tuple[str, str, Callable[[Path, Path | None], Iterator[Record]]]] = {
    "m3d": ("M3D", "m3d", _m3d),
    "radfm": ("RadFM", "radfm", _radfm),
    "ct_chat": ("CT-CHAT", "ct_rate_vqa", _ct_chat),
    "released": ("CTInstruct (released)", "released", _released),
}

__all__ = ["CONVERTERS", "convert_predictions"]
