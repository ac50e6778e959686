"""RP3D (RadFM) and M3D: captions and questions over `.npy` volumes whose values were scaled to 0…1.

Their HU are lost; 0…1 is read as −1000…1000 HU, which is what the processor's window makes of it again.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import CTInstructError
from ..cases import Case, ImageRef, Question
from .common import Problem, read_json, read_table, split_in_name


def _image(folder: Path, path: str, layout: str) -> ImageRef:
    whole = Path(path) if Path(path).is_absolute() else folder / path
    return ImageRef(str(whole), 2000.0, -1000.0, [1.0, 1.0, 1.0], layout)


def _paths(text: Any) -> list[str]:
    """One path, or a list of them, also where a table holds the list as text."""
    if isinstance(text, list):
        return [str(one) for one in text]
    if str(text).startswith("["):
        return [str(one) for one in ast.literal_eval(str(text))]
    return [str(text)]


def _case(source: str, number: int, folder: Path, file: Path, paths: list[str], layout: str, **more: Any) -> Case:
    return Case(
        id=f"{source}/{file.stem}/{number}",
        images=[_image(folder, path, layout) for path in paths],
        split=split_in_name(file.stem),
        source=source,
        patient=Path(paths[0]).parent.name or Path(paths[0]).stem,
        **more,
    )


def rp3d_captions(folder: Path) -> Iterator[Case | Problem]:
    """RP3D-Caption: CSV with image_path and answer, or JSON with npy_path, finding and impression."""
    files = [*sorted(folder.glob("*.csv")), *sorted(folder.glob("*.json"))]
    if not files:
        raise CTInstructError(f"{folder} has no .csv or .json file of RP3D-Caption.")
    for file in files:
        rows = read_table(file, ("image_path", "answer")) if file.suffix == ".csv" else read_json(file)
        for number, row in enumerate(rows):
            stored = row.get("image_path") or row.get("npy_path")
            texts = {"caption": row.get("answer"), "findings": row.get("finding"), "impression": row.get("impression")}
            texts = {name: text.strip() for name, text in texts.items() if text and text.strip()}
            if not stored or not texts:
                yield Problem(f"{file.stem}/{number}", f"{file.name}, row {number + 1} has no image or no text")
                continue
            yield _case("rp3d_cap", number, folder, file, _paths(stored), "chwd", texts=texts)


def rp3d_questions(folder: Path) -> Iterator[Case | Problem]:
    """RP3D-VQA: CSV with image_path, question, answer."""
    files = sorted(folder.glob("*.csv"))
    if not files:
        raise CTInstructError(f"{folder} has no .csv file of RP3D-VQA.")
    for file in files:
        for number, row in enumerate(read_table(file, ("image_path", "question", "answer"))):
            if not row["image_path"] or not row["question"] or not row["answer"]:
                yield Problem(f"{file.stem}/{number}", f"{file.name}, row {number + 1} is incomplete")
                continue
            asked = [Question(row["question"].strip(), row["answer"].strip())]
            yield _case("rp3d_vqa", number, folder, file, _paths(row["image_path"]), "chwd", questions=asked)


def m3d_captions(folder: Path) -> Iterator[Case | Problem]:
    """M3D-Cap: one JSON of splits with image and text files."""
    files = sorted(folder.glob("*.json"))
    if not files:
        raise CTInstructError(f"{folder} has no .json file of M3D-Cap.")
    for split, rows in read_json(files[0]).items():
        for number, row in enumerate(rows):
            text = folder / row["text"]
            if not text.exists():
                yield Problem(f"m3d_cap/{split}/{number}", f"{row['text']} is missing")
                continue
            yield Case(
                id=f"m3d_cap/{split}/{number}",
                images=[_image(folder, row["image"], "cdhw")],
                split={"val": "validation"}.get(split, split),
                source="m3d_cap",
                patient=str(Path(row["image"]).parent),
                texts={"caption": text.read_text(encoding="utf-8").strip()},
            )


def m3d_questions(folder: Path) -> Iterator[Case | Problem]:
    """M3D-VQA: CSV with four choices each; asked as multiple choice and openly."""
    columns = ("Image Path", "Question", "Choice A", "Choice B", "Choice C", "Choice D", "Answer", "Answer Choice")
    files = sorted(folder.glob("*.csv"))
    if not files:
        raise CTInstructError(f"{folder} has no .csv file of M3D-VQA.")
    for file in files:
        for number, row in enumerate(read_table(file, columns)):
            choices = [row[f"Choice {letter}"] for letter in "ABCD"]
            if row["Answer Choice"] not in ("A", "B", "C", "D"):
                yield Problem(f"{file.stem}/{number}", f"{file.name}, row {number + 1} has no valid Answer Choice")
                continue
            right = choices["ABCD".index(row["Answer Choice"])]
            asked = [
                Question(row["Question"], right, "multiple_choice", choices),
                Question(row["Question"], row["Answer"]),
            ]
            yield _case("m3d_vqa", number, folder, file, [row["Image Path"]], "cdhw", questions=asked)


SOURCES = {"rp3d_cap": rp3d_captions, "rp3d_vqa": rp3d_questions, "m3d_cap": m3d_captions, "m3d_vqa": m3d_questions}
