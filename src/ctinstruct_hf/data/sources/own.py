"""Scans of one's own: a table with a path, a report, labels; conversations with images; a folder of NIfTI with masks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from ...errors import CTInstructError
from ..cases import META, SPLITS, Case, ImageRef, Label, MaskRef, Question
from ..names import distinct, in_known_words, spell
from ..reading import path_named
from ..samples import InstructionSample, parts_of, text_of
from ..templates import DISEASE_TOKEN, SEG_TOKEN
from .common import Problem, report_of, split_in_name, split_of
from .own_folder import scans_with_masks
from .own_rows import Row, is_saved_set, read_rows

PATHS = ("path", "image", "image_path", "scan", "file")
TEXTS = ("report", "findings", "impression", "caption", "technique")
KNOWN = (*TEXTS, *META, "id", "split", "patient", "question", "answer", "masks", "labels")
MASK = "mask:"  # of a column that names mask files
FEW_PATIENTS = 20
CONVERSATIONS = {"messages", "conversations"}
_ROLES = {"human": "user", "gpt": "assistant"}
_VALUES = {"1": 1, "1.0": 1, "true": 1, "yes": 1, "0": 0, "0.0": 0, "false": 0, "no": 0, "-1": -1, "-1.0": -1, "": -1,
           "nan": -1, "none": -1, "null": -1}  # fmt: skip
Found = Case | InstructionSample | Problem


def cases(
    path: Path, root: Path | None = None, files: Path | None = None, note: Callable[[str], None] = lambda sentence: None
) -> Iterator[Found]:
    """Your own: -i a CSV, JSONL or Parquet file, a set of datasets with messages and images, or a folder of NIfTI with masks.

    Args:
        path: the file or folder.
        root: the folder that relative paths start from, the file's own by default; where it is given, all files lie in it.
        files: where images that a set holds itself are written; such sets are refused without it.
        note: called with what is not used.

    Raises:
        CTInstructError: naming the file and what it lacks.
    """
    if path.is_dir() and not is_saved_set(path):
        yield from _with_splits(list(scans_with_masks(path)))
        return
    source, place = path.stem, Place(path if path.is_dir() else path.parent, root, files)
    found = read_rows(path)
    first = next(found, None)
    if first is None:
        raise CTInstructError(f"{path.name} has no row.")
    if CONVERSATIONS & set(first[1]):
        yield from _with_splits(
            [
                _conversation(row, where, f"{source}/{number}", place)
                for number, (where, row) in enumerate(chain([first], found), start=1)
            ]
        )
        return
    rows = [first, *found]
    columns = list(dict.fromkeys(name for _, row in rows for name in row))
    column = next((name for name in PATHS if name in columns), None)
    if column is None:
        raise CTInstructError(
            f"{path.name} has neither a column {', '.join(PATHS)} nor messages: it has {', '.join(columns)}."
        )
    names, unused = _label_columns(rows, [name for name in columns if name not in (*KNOWN, column)])
    if unused:
        note(f"Columns of {path.name} that hold no label are not used: {', '.join(unused)}.")
    yield from _with_splits(_scans(rows, column, names, source, place))


class Place:
    """Where the files lie that rows name."""

    def __init__(self, folder: Path, root: Path | None, files: Path | None) -> None:
        self.folder, self.root, self.files = folder, root, files

    def path(self, name: str, named_by: str) -> str:
        """Raises CTInstructError for what leads out of the folder, by `..` or by a link."""
        return path_named(name, self.root or self.folder, named_by, anywhere=self.root is None)

    def image(self, given: Any, named_by: str) -> ImageRef:
        """An image by its path, or by what `datasets` or a prepared set stores of it; one that a row holds itself is written."""
        if isinstance(given, str) and given:
            return ImageRef(self.path(given, named_by))
        if not isinstance(given, dict) or not (given.get("path") or given.get("bytes")):
            raise CTInstructError(f"{named_by} has an image that is neither a path nor a file.")
        more = {
            name: given[name] for name in ("slope", "intercept", "spacing", "layout") if given.get(name) is not None
        }
        name, held = given.get("path") or "", given.get("bytes")
        if held is None:
            return ImageRef(self.path(name, named_by), **more)
        if self.files is None:
            raise CTInstructError(f"{named_by} holds its image itself: use ctinstruct data import.")
        self.files.mkdir(parents=True, exist_ok=True)
        suffixes = "".join(Path(name).suffixes[-2:]) if name.endswith(".gz") else Path(name).suffix
        target = self.files / f"{hashlib.sha256(held).hexdigest()[:32]}{suffixes or _suffix_of(held)}"
        if not target.exists():
            target.write_bytes(held)
        return ImageRef(str(target.absolute()), **more)


def _suffix_of(held: bytes) -> str:
    starts = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"\x1f\x8b": ".nii.gz"}
    return next((suffix for start, suffix in starts.items() if held.startswith(start)), "")


def _with_splits(found: Sequence[Found]) -> Iterator[Found]:
    """Patients shared out where no row names a split; fewer than `FEW_PATIENTS` all go to train."""
    usable = [one for one in found if not isinstance(one, Problem)]
    few = len({one.patient for one in usable}) < FEW_PATIENTS
    for one in usable:
        if not one.split:
            one.split = "train" if few else split_of(one.patient)
    yield from found


def _split(row: Row, where: str) -> str:
    given = str(row.get("split") or "").strip().lower()
    if not given:
        return ""
    split = given if given in SPLITS else "train" if given == "training" else split_in_name(given)
    if split == "train" and given not in ("train", "training"):
        raise CTInstructError(f"{where} has split '{given}': use one of {', '.join(SPLITS)}.")
    return split


def _text(value: Any) -> str:
    text = "" if value is None else str(value).strip()
    return "" if text.lower() == "nan" else text


def _value(given: Any, name: str, where: str) -> int:
    value = _VALUES.get(str(given if given is not None else "").strip().lower())
    if value is None:
        raise CTInstructError(
            f"{where} has {name} = '{given}': a label is 1, 0, −1 or nothing; leave other columns out."
        )
    return value


def _label_columns(rows: Sequence[tuple[str, Row]], names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Columns with a label in some row, and those without one."""
    names = [name for name in names if not name.startswith(MASK)]
    labels = [name for name in names if any(_VALUES.get(_text(row.get(name)).lower(), -1) >= 0 for _, row in rows)]
    return labels, [name for name in names if name not in labels]


def _scans(
    rows: Sequence[tuple[str, Row]], column: str, names: Sequence[str], source: str, place: Place
) -> list[Found]:
    """A case for each scan; rows about one scan are joined: its questions are asked one after the other."""
    found: dict[str, Case] = {}
    problems: list[Found] = []
    ids: set[str] = set()
    for number, (where, row) in enumerate(rows):
        if not _text(row.get(column)) and not isinstance(row.get(column), dict):
            problems.append(Problem(f"{source}/{number}", f"{where} has no {column}"))
            continue
        image = place.image(row[column], where)
        case = found.get(image.path)
        if case is None:
            name = _text(row.get("id")) or _name_of(image.path, place)
            if name in ids:
                raise CTInstructError(f"{where} has id '{name}', which another scan has: give each its own.")
            ids.add(name)
            patient = _text(row.get("patient")) or name
            case = found[image.path] = Case(name, [image], _split(row, where), source, patient)
        _add(case, row, names, where, place)
    return [*found.values(), *problems]


def _name_of(path: str, place: Place) -> str:
    for folder in (place.root, place.folder):
        if folder is not None and Path(path).is_relative_to(folder.absolute()):
            path = Path(path).relative_to(folder.absolute()).as_posix()
    name = path.strip("/")
    return name.removesuffix(".gz").removesuffix(".nii") if ".nii" in name else name


def _add(case: Case, row: Row, names: Sequence[str], where: str, place: Place) -> None:
    for name in TEXTS:
        if text := _text(row.get(name)):
            case.texts.setdefault(name, text)
    if "report" not in case.texts and "findings" in case.texts:
        case.texts["report"] = report_of(case.texts)
    if _text(row.get("question")) and _text(row.get("answer")):
        case.questions.append(Question(_text(row["question"]), _text(row["answer"])))
    case.meta |= {name: _text(row[name]) for name in META if _text(row.get(name))}
    given = {name: _value(row.get(name), name, where) for name in names} | dict(_given_labels(row.get("labels"), where))
    if not case.labels and any(value >= 0 for value in given.values()):
        ours = distinct(given, keep_plain=True)
        case.labels = [Label(ours[name], value) for name, value in given.items()]
    masks = [*_given_masks(row.get("masks"), where)]
    masks += [
        {"name": name.removeprefix(MASK).strip(), "path": _text(value)}
        for name, value in row.items()
        if name.startswith(MASK) and _text(value)
    ]
    ours = distinct((mask["name"] for mask in masks), keep_plain=True)
    for mask in masks:
        path = place.path(mask.get("path") or "", where)
        name = ours[mask["name"]]
        case.structures.append(name)
        if path:
            case.masks.append(MaskRef(name, path, [int(value) for value in mask.get("values") or ()]))


def _unpacked(given: Any, where: str, what: str) -> Any:
    """A cell that holds JSON."""
    if not isinstance(given, str) or not given.strip():
        return given or None
    try:
        return json.loads(given)
    except ValueError as error:
        raise CTInstructError(f"{where} has {what} that are no JSON: {error}") from error


def _given_labels(given: Any, where: str) -> list[tuple[str, int]]:
    """Labels as {name: value} or a list of {name, value}."""
    found = _unpacked(given, where, "labels")
    if isinstance(found, list) and all(isinstance(one, dict) and {"name", "value"} <= set(one) for one in found):
        pairs = [(one["name"], one["value"]) for one in found]
    elif isinstance(found, dict | None):
        pairs = [pair for pair in (found or {}).items() if pair[1] is not None]
    else:
        raise CTInstructError(f"{where} has labels '{given}': write {{name: 1, 0 or −1}}.")
    return [(str(name), _value(value, str(name), where)) for name, value in pairs]


def _given_masks(given: Any, where: str) -> list[dict[str, Any]]:
    """Masks as {name: file}, {name: {path, values}} or a list of {name, path, values}. "" for a file says that the structure is
    known to be absent; null says nothing, as where a set of `datasets` has the name in another row.
    """
    found = _unpacked(given, where, "masks")
    if isinstance(found, dict):
        found = [
            {"name": name, **(one if isinstance(one, dict) else {"path": one})}
            for name, one in found.items()
            if one is not None
        ]
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(one, dict) and one.get("name") for one in found):
        raise CTInstructError(f"{where} has masks that are not {{name: file}}.")
    return found


def _conversation(row: Row, where: str, name: str, place: Place) -> Found:
    """A row with `messages` and `images` as other trainers take it; what cannot be used is a `Problem`."""
    source = name.rpartition("/")[0]
    name = _text(row.get("id")) or name
    try:
        turns, shown = _turns(row.get("messages") or row.get("conversations"), where)
        given = row.get("images", row.get("image", shown))
        listed = [given] if isinstance(given, str | dict) else list(given or shown)
        images = [place.image(one, where) for one in listed]
        _place_images(turns, len(images))
        masks = [
            MaskRef(str(one["name"]), place.path(one.get("path") or "", where), list(one.get("values") or ()))
            for one in _given_masks(row.get("masks"), where)
        ]
        known = in_known_words(mask.name for mask in masks)
        for mask in masks:
            mask.name = known.get(mask.name, mask.name)
        for part in (part for turn in turns for part in turn["content"] if part["type"] == "text"):
            part["text"] = spell(part["text"], known)
        labels = [Label(*pair) for pair in _given_labels(row.get("labels"), where)]
        answers = "".join(text_of(turn) for turn in turns if turn["role"] == "assistant")
        task = _text(row.get("task")) or next(
            (task for token, task in ((SEG_TOKEN, "segmentation"), (DISEASE_TOKEN, "diagnosis")) if token in answers),
            "question",
        )
        patient = _text(row.get("patient")) or (_name_of(images[0].path, place) if images else name)
        sample = InstructionSample(
            name, images, turns, task, _split(row, where), source, patient, masks, labels,
            {key: _text(row[key]) for key in META if _text(row.get(key))},
        )  # fmt: skip
        if not images:
            raise CTInstructError(f"{where} shows no image.")
        return sample
    except (CTInstructError, KeyError, TypeError, ValueError, AttributeError) as error:
        reason = str(error) if isinstance(error, CTInstructError) else f"{where} is malformed: {error}"
        return Problem(name, reason)


def _turns(messages: Any, where: str) -> tuple[list[dict[str, Any]], list[Any]]:
    """Turns of text and image parts, and the images that parts name themselves."""
    turns, shown = [], []
    for turn in _unpacked(messages, where, "messages") or ():
        role = turn.get("role") or turn.get("from")
        content = turn.get("content", turn.get("value"))
        parts: list[dict[str, Any]] = []
        for part in parts_of({"content": content}):
            if part.get("type") not in ("image", "text"):
                raise CTInstructError(f"{where} has a part of type {part.get('type')}: use image or text.")
            if part["type"] == "image":
                given = part.get("image") or part.get("path")
                shown += [given] if given else []
                parts.append({"type": "image"})
            else:
                pieces = (part.get("text") or "").split("<image>")
                for number, piece in enumerate(pieces):
                    text = piece.strip("\n") if len(pieces) > 1 else piece
                    parts += [{"type": "image"}] if number else []
                    parts += [{"type": "text", "text": text}] if text else []
        turns.append({"role": _ROLES.get(role, role), "content": parts})
    return turns, shown


def _place_images(turns: list[dict[str, Any]], count: int) -> None:
    """Images stand before the first question where no turn says where they belong."""
    if any(part["type"] == "image" for turn in turns for part in turn["content"]):
        return
    first = next((turn for turn in turns if turn["role"] == "user"), None)
    if first is not None:
        first["content"][:0] = [{"type": "image"} for _ in range(count)]


SOURCES = {"own": cases}
