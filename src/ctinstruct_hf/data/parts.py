"""The parts of a recipe's mixture, by their settings."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CTInstructError
from . import templates
from .cases import SPLITS
from .mixture import MixtureEntry
from .prepare import is_made, open_rows
from .sources import MADE

KEYS = (
    "name",
    "dataset",
    "split",
    "streaming",
    "sources",
    "tasks",
    "weight",
    "limit",
    "batch_size",
    "slices",
    "turns",
    "choices_from_labels",
)
_NEEDS = {"contrastive": "texts", "category": "labels", "segmentation": "masks"}  # the column that a row needs
GRAINS = tuple(_NEEDS)
logger = logging.getLogger(__name__)


def check_part(part: Any, kind: str, tasks: Sequence[str]) -> None:
    """Raises CTInstructError for a part that cannot be loaded; reads nothing but names."""
    if not isinstance(part, dict):
        raise CTInstructError(f"A part of the mixture is '{part}': write its keys, as 'dataset: folder'.")
    keys = (*KEYS, *MADE)
    if unknown := sorted(set(part) - set(keys)):
        raise CTInstructError(
            f"A part of the mixture has unknown keys {', '.join(unknown)}: known are {', '.join(keys)}."
        )
    name = part_name(part)
    wrong = sorted(set(part.get("tasks", ())) - set(tasks))
    if wrong:
        raise CTInstructError(f"Part '{name}' has unknown tasks {', '.join(wrong)}: known are {', '.join(tasks)}.")
    for key in ("turns", "choices_from_labels"):
        if key in part and (not isinstance(part[key], int) or part[key] < 1):
            raise CTInstructError(f"Part '{name}' has {key}: {part[key]}: give a number of at least 1.")
    if part.get("split", "train") not in SPLITS:
        raise CTInstructError(f"Part '{name}' has split '{part['split']}': use one of {', '.join(SPLITS)}.")
    data = data_of(part)
    if is_made(data):
        source, _, what = data.partition(":")
        MADE[source].dataset.refs_of(what)
    elif not (Path(data) / kind).is_dir():
        raise CTInstructError(
            f"Part '{name}': {Path(data) / kind} does not exist; make it with ctinstruct data prepare."
        )


def part_name(part: dict[str, Any]) -> str:
    return str(part.get("name") or part.get("dataset") or next((name for name in MADE if name in part), "part"))


def data_of(part: dict[str, Any]) -> str:
    """The data set of a part: its `dataset`, or the made one that a key of `MADE` describes.

    Raises:
        CTInstructError: where it names none or two, or there is no such set.
    """
    name = part_name(part)
    named = [key for key in ("dataset", *MADE) if key in part]
    if len(named) != 1:
        raise CTInstructError(f"Part '{name}' of the mixture needs either {' or '.join(('dataset', *MADE))}.")
    if named == ["dataset"]:
        return str(part["dataset"])
    try:
        return f"{named[0]}:{MADE[named[0]].dataset.name_of(part[named[0]])}"
    except CTInstructError as error:
        raise CTInstructError(f"Part '{name}' needs {named[0]}: {error}") from error


def of_slices(part: dict[str, Any]) -> bool:
    """Whether the images of a part are slices: where it says so, or is made of them."""
    source, _, name = data_of(part).partition(":")
    return bool(part.get("slices")) or (source in MADE and MADE[source].dataset.of_slices(name))


def load_part(part: dict[str, Any], kind: str) -> MixtureEntry:
    """Rows of one part, as `check_part` has found it right.

    Args:
        part: {dataset: folder of `ctinstruct data prepare` or name of a made set, split, sources, tasks, weight, limit,
            streaming, batch_size, turns: so many questions about the same images as one conversation,
            choices_from_labels: so many conversations of multiple choice for each image with labels, in place of its
            rows}; a key of `MADE` may describe a made set instead of `dataset`.
        kind: alignment or instructions.
    """
    rows = open_rows(data_of(part), kind, part.get("split", "train"), bool(part.get("streaming")))
    if part.get("sources"):
        rows = rows.filter(lambda row: row["source"] in part["sources"])
    tasks = tuple(part.get("tasks") or (GRAINS if kind == "alignment" else ()))
    if tasks:
        rows = _with_what_tasks_need(rows, kind, tasks, part_name(part))
    for key in ("turns", "choices_from_labels"):
        if part.get(key) and kind == "instructions" and not hasattr(rows, "__len__"):
            raise CTInstructError(f"Part '{part_name(part)}' is streamed: {key} needs stored rows.")
    if part.get("choices_from_labels") and kind == "instructions":
        rows = choices_from_labels(list(rows), part["choices_from_labels"], part.get("turns", 1))
    elif part.get("turns") and kind == "instructions":
        rows = join_turns(list(rows), part["turns"])
    if part.get("limit"):
        rows = rows[: part["limit"]] if isinstance(rows, list) else rows.take(part["limit"])
    return MixtureEntry(part_name(part), rows, tasks, float(part.get("weight", 1.0)), part.get("batch_size"))


def _with_what_tasks_need(rows: Any, kind: str, tasks: Sequence[str], name: str) -> Any:
    """The rows that can serve one of the tasks, with the number of the others in the log.

    Raises:
        CTInstructError: where none can, unless they are streamed.
    """
    if kind == "alignment":
        columns, serves = list(_NEEDS.values()), partial(_serves, tasks)
    else:
        columns, serves = ["task"], partial(_is_of, tasks)
    kept = rows.filter(serves, input_columns=columns)
    if not hasattr(rows, "__len__"):
        return kept
    left_out = len(rows) - len(kept)
    if not len(kept) and len(rows):
        raise CTInstructError(f"Part '{name}': none of its {len(rows)} rows has what {' or '.join(tasks)} needs.")
    if left_out:
        logger.warning("Part '%s': %d of %d rows have nothing for %s and are left out.", name, left_out, len(rows), ", ".join(tasks))  # fmt: skip
    return kept


def _serves(tasks: Sequence[str], texts: list[str], labels: list[dict[str, Any]], masks: list[dict[str, Any]]) -> bool:
    known = any(label["value"] >= 0 for label in labels)
    there = {"contrastive": bool(texts), "category": known, "segmentation": bool(masks)}
    return any(there[task] for task in tasks)


def _is_of(tasks: Sequence[str], task: str) -> bool:
    return task in tasks


def join_turns(rows: Sequence[dict[str, Any]], turns: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows about the same images as conversations of up to so many turns, in random order: the images are read once for
    all of them.

    Args:
        rows: of `InstructionSample`.
        turns: at least 1.
        seed: of the order.
    """
    by_images: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_images.setdefault(repr(row["images"]), []).append(row)
    rng = np.random.default_rng([seed, 109])
    joined = []
    for group in by_images.values():
        order = [group[int(place)] for place in rng.permutation(len(group))]
        for start in range(0, len(order), turns):
            first, *rest = order[start : start + turns]
            more = [{**turn, "content": _words_of(turn)} for row in rest for turn in row["messages"]]
            joined.append(
                {
                    **first,
                    "messages": [*first["messages"], *more],
                    "masks": [mask for row in (first, *rest) for mask in row["masks"]],
                    "labels": [label for row in (first, *rest) for label in row["labels"]],
                }
            )
    return joined


def choices_from_labels(
    rows: Sequence[dict[str, Any]], conversations: int, turns: int = 1, seed: int = 0
) -> list[dict[str, Any]]:
    """Multiple choice about what is known of an image, with other choices each time: a data set's own questions are few,
    and a model learns them by heart before it learns to choose.

    Args:
        rows: of `InstructionSample`; of each image the first with a known label is taken.
        conversations: for each image.
        turns: questions of one conversation, of one to four choices. Whether a choice is right is drawn for each alone:
            where their number is fixed, or drawn, what was said of one choice foretells the next without the image. Half
            of those with one right choice ask for one ("Which … is present?"), all others for any number ("are present").
        seed: of the choices, with the row's id.
    """
    asked: dict[str, dict[str, Any]] = {}
    for row in rows:
        if any(label["value"] >= 0 for label in row["labels"]):
            asked.setdefault(repr(row["images"]), row)
    made = []
    for row in asked.values():
        rng = np.random.default_rng([seed, zlib.crc32(row["id"].encode())])
        sides = [[label["name"] for label in row["labels"] if label["value"] == value] for value in (1, 0)]
        if not all(sides):
            continue
        images = [part for part in row["messages"][0]["content"] if part["type"] == "image"]
        for number in range(conversations):
            messages = []
            for turn in range(turns):
                kind, asks_for_one = (int(number) for number in rng.integers(2, size=2))
                those, others = sides[kind], sides[1 - kind]
                number_of_choices = int(rng.integers(1, 5))
                right = int(rng.binomial(number_of_choices, 0.5))
                right = min(max(right, number_of_choices - len(others)), len(those))
                picked = [*rng.permutation(those)[:right], *rng.permutation(others)[: number_of_choices - right]]
                choices = [str(name) for name in rng.permutation(picked)]
                single = asks_for_one and right == 1 and len(choices) > 1
                question = templates.ask_choice(
                    (templates.WHICH if single else templates.WHICH_ALL)[kind], choices, rng
                )
                content = [*([] if turn else images), {"type": "text", "text": question}]
                there = [choice in sides[0] for choice in choices]
                answer = templates.weigh_choices(choices, there, [choice for choice in choices if choice in those])
                messages += [
                    {"role": "user", "content": content},
                    {"role": "assistant", "content": [{"type": "text", "text": answer}]},
                ]
            made.append({
                **row, "id": f"{row['id']}/choices-{number}", "task": "multiple_choice",
                "messages": messages, "masks": [], "labels": [],
            })  # fmt: skip
    return made


def _words_of(turn: dict[str, Any]) -> list[dict[str, Any]]:
    """A turn without images, which the conversation has shown already."""
    return [part for part in turn["content"] if part["type"] != "image"]
