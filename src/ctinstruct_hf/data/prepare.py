"""`ctinstruct data prepare`: a downloaded data set as rows of both stages, in parallel, resumable after a kill."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from itertools import starmap
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CTInstructError
from ..files import cache_folder, whole_folder, write_whole
from .cases import Case
from .instructions import to_alignment, to_instructions
from .prepared import describe, load_rows, write_rows
from .reading import open_labels, open_volume
from .samples import InstructionSample, to_row
from .sources import MADE, SOURCES, Found
from .sources.common import Problem

CASES_A_PART = 32


@dataclass(frozen=True)
class PrepareOptions:
    """How cases become samples.

    Attributes:
        seed: of phrasings and choices.
        segmentations: requests for masks a case, beside one for several at once.
        check_volumes: read every image in full, not only its label files.
    """

    seed: int = 0
    segmentations: int = 4
    check_volumes: bool = False


def finish(found: Case | InstructionSample, options: PrepareOptions) -> dict[str, Any]:
    """The rows of one case: its files are looked at, and structures that its labels lack are found absent."""
    try:
        if isinstance(found, InstructionSample):
            found.check()
            _need_files([image.path for image in found.images] + [mask.path for mask in found.masks if mask.path])
            return {"instructions": [to_row(found)]}
        _need_files([image.path for image in found.images])
        for image in found.images:
            if options.check_volumes or image.path.lower().endswith((".png", ".jpg", ".jpeg")):  # pictures are quick
                open_volume(image)
        if found.masks:
            _keep_present(found)
        aligned = [one for number in range(len(found.images)) if (one := to_alignment(found, number)).grains]
        for one in aligned:
            one.check()
        rows = {
            "instructions": [to_row(one) for one in to_instructions(found, options.seed, options.segmentations)],
            "alignment": [to_row(one) for one in aligned],
        }
        if not any(rows.values()):
            raise CTInstructError(
                f"{found.id} has no text, no known label, no mask and no question: nothing to learn from."
            )
        return rows
    except CTInstructError as error:
        return {"problems": [asdict(Problem(found.id, str(error)))]}


def _need_files(paths: Sequence[str]) -> None:
    for path in paths:
        if not Path(path).exists():
            raise CTInstructError(f"{Path(path).name} is missing ({path}).")


def _keep_present(case: Case) -> None:
    """Drop masks whose labels do not occur; each label file is read once."""
    volume = open_volume(case.images[0])
    present: dict[str, set[int]] = {}
    for path in {mask.path for mask in case.masks}:
        present[path] = set(np.flatnonzero(np.bincount(open_labels(path, volume).ravel())).tolist()) - {0}
    case.masks = [
        mask for mask in case.masks if present[mask.path] & (set(mask.values) if mask.values else present[mask.path])
    ]


def prepare(
    source: str,
    folder: Path,
    target: Path,
    options: PrepareOptions = PrepareOptions(),
    workers: int | None = None,
    limit: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Turn a downloaded data set into a prepared one.

    Args:
        source: one of `sources.SOURCES`.
        folder: as downloaded; of a source that makes its scans, the name of a set.
        target: the prepared data set; a run that was interrupted goes on where it stopped.
        options: how cases become samples.
        workers: processes; all cores by default.
        limit: only the first so many cases.
        progress: called with (cases done, cases in all).

    Returns:
        What `dataset.json` says.

    Raises:
        CTInstructError: for an unknown source, or a folder of another layout.
    """
    return prepare_cases(source, found_in(source, folder), target, options, workers, limit, progress)


def found_in(source: str, folder: Path) -> Iterator[Found]:
    """What a source lists of a downloaded folder.

    Raises:
        CTInstructError: for an unknown source, and where there is no such folder.
    """
    if source not in SOURCES:
        raise CTInstructError(f"There is no source '{source}': use one of {', '.join(SOURCES)}.")
    if source not in MADE and not folder.exists():
        raise CTInstructError(f"{folder} does not exist.")
    return SOURCES[source](folder)


def prepare_cases(
    source: str,
    found: Iterable[Found],
    target: Path,
    options: PrepareOptions = PrepareOptions(),
    workers: int | None = None,
    limit: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Cases as a prepared data set; see `prepare`.

    Raises:
        CTInstructError: where the target is finished already, and where no case can be used.
    """
    if (target / "dataset.json").exists():
        raise CTInstructError(f"{target} is a finished data set: remove it, or choose another folder.")
    listed = list(found)
    problems = [asdict(one) for one in listed if isinstance(one, Problem)]
    cases = [one for one in listed if not isinstance(one, Problem)][:limit]
    if not cases:
        raise CTInstructError(f"{source} has no usable case{_first_reason(problems)}.")
    plan = json.dumps([source, asdict(options), [case.id for case in cases]])
    drafts = target / f".parts-{hashlib.sha256(plan.encode()).hexdigest()[:12]}"
    drafts.mkdir(parents=True, exist_ok=True)
    parts = [cases[first : first + CASES_A_PART] for first in range(0, len(cases), CASES_A_PART)]
    todo = [(number, part) for number, part in enumerate(parts) if not (drafts / f"{number}.json").exists()]
    done = len(cases) - sum(len(part) for _, part in todo)
    progress(done, len(cases))
    jobs = [(number, part, options, str(drafts)) for number, part in todo]
    workers = min(workers or os.cpu_count() or 1, max(len(jobs), 1))
    if workers == 1:
        for count in starmap(_do_part, jobs):
            done += count
            progress(done, len(cases))
    else:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            for count in pool.map(_do_part, *zip(*jobs, strict=True)):
                done += count
                progress(done, len(cases))
    return _collect(source, target, drafts, len(parts), problems)


def _do_part(number: int, part: Sequence[Case | InstructionSample], options: PrepareOptions, drafts: str) -> int:
    rows: dict[str, list[dict[str, Any]]] = {"alignment": [], "instructions": [], "problems": []}
    for case in part:
        for kind, made in finish(case, options).items():
            rows[kind] += made
    write_whole(Path(drafts) / f"{number}.json", json.dumps(rows))
    return len(part)


def _collect(source: str, target: Path, drafts: Path, count: int, problems: list[dict[str, Any]]) -> dict[str, Any]:
    rows: dict[str, list[dict[str, Any]]] = {"alignment": [], "instructions": []}
    for number in range(count):
        part = json.loads((drafts / f"{number}.json").read_text(encoding="utf-8"))
        problems += part["problems"]
        for kind in rows:
            rows[kind] += part[kind]
    if not any(rows.values()):
        shutil.rmtree(drafts, ignore_errors=True)
        raise CTInstructError(f"{source} has no usable case{_first_reason(problems)}.")
    for kind, made in rows.items():
        if made:
            write_rows(target, kind, made)
    write_whole(target / "problems.jsonl", "".join(json.dumps(problem) + "\n" for problem in problems))
    summary = {
        "source": source,
        "rows": {kind: dict(Counter(row["split"] for row in made)) for kind, made in rows.items()},
        "problems": len(problems),
    }
    describe(target, summary)
    shutil.rmtree(drafts, ignore_errors=True)
    return summary


def _first_reason(problems: Sequence[dict[str, Any]]) -> str:
    if not problems:
        return ""
    more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
    return f": {problems[0]['reason'].rstrip('.')}{more}"


def is_made(data: str | Path) -> bool:
    """Whether data are named as `source:name`, of a source that makes its scans."""
    return str(data).partition(":")[0] in MADE and ":" in str(data) and not Path(data).exists()


def open_rows(data: str | Path, kind: str, split: str, streaming: bool = False) -> Any:
    """Rows of a prepared data set, see `prepared.load_rows`.

    Args:
        data: its folder, or the name of one that is made, see `sources.made`: it is prepared in the cache when it is first
            asked for, and all its rows are of whichever split is asked for.
        kind, split, streaming: see `prepared.load_rows`.

    Raises:
        CTInstructError: where there is no such data, or no row of that split.
    """
    if not is_made(data):
        return load_rows(Path(data), kind, split, streaming)
    rows = load_rows(made_set(str(data)), kind, "train", streaming)
    if streaming:
        return rows.map(lambda row: {"split": split})
    return rows.remove_columns("split").add_column("split", [split] * len(rows))


def made_set(data: str) -> Path:
    """The folder of a made data set, prepared in the cache where it is not there yet."""
    source, _, name = data.partition(":")
    slug = re.sub(r"[^\w+-]+", "_", name)
    key = hashlib.sha256(f"{_code(MADE[source].package)} {name}".encode()).hexdigest()[:12]
    target = cache_folder() / source / "sets" / f"{slug}-{key}"
    if not (target / "dataset.json").exists():
        with whole_folder(target) as draft:
            prepare(source, Path(name), draft)
    return target


@cache
def _code(package: str) -> str:
    """Of all that the rows of a made set depend on: the package that makes it, and how it is asked about."""
    folders = (Path(__file__).parent, Path(str(import_module(package).__file__)).parent)
    files = (path for folder in folders for path in sorted(folder.rglob("*.py")))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
