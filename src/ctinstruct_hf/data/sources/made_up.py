"""Phantoms as a data set: rows by seed, made once and kept."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from .. import tasks, templates
from ..phantoms import FINDINGS, ORGANS, UNIONS, Phantom
from ..reading import PhantomRef, phantom_of
from ..samples import Case, ImageRef, Label, MaskRef, Question, to_row
from ..store import PatchStore, phantom_code
from ..tasks import to_alignment, to_instructions

_LEDGER_ID = re.compile(rb'\{"id": "([^"]+)"')
STRUCTURES = [name for name in ORGANS if name != "body"] + list(UNIONS)


def phantom_case(ref: PhantomRef, split: str) -> Case:
    """A made-up scan with everything that is true about it."""
    phantom: Phantom = phantom_of(str(ref))
    present = set(phantom.structures)
    masks = [MaskRef(name, str(ref)) for name in ORGANS if name in present and name != "body"]
    masks += [MaskRef(name, str(ref)) for name, parts in UNIONS.items() if present & set(parts)]
    masks += [MaskRef(name, str(ref)) for name in FINDINGS if phantom.labels[name]]
    return Case(
        id=str(ref),
        images=[ImageRef(str(ref))],
        split=split,
        source="phantoms",
        patient=f"phantom-{ref.seed}",
        masks=masks,
        structures=[*STRUCTURES, *FINDINGS],
        meta={"phase": phantom.phase},
        **labelled_texts(phantom.report, phantom.questions, phantom.labels | phantom.sides),
    )


def labelled_texts(report: str, questions: Sequence[dict[str, Any]], labels: dict[str, int]) -> dict[str, Any]:
    """What a `Case` has of words: the parts of a report, questions with answers, labels."""
    findings, _, impression = report.partition("Findings: ")[2].partition(" Impression: ")
    return {
        "texts": {"report": report, "findings": findings, "impression": impression},
        "questions": [Question(one["question"], one["answer"], one["kind"], list(one["choices"])) for one in questions],
        "labels": [Label(name, value) for name, value in labels.items()],
    }


_worker_store: PatchStore | None = None


def _start_worker(store: PatchStore | None) -> None:
    import torch

    global _worker_store
    torch.set_num_threads(1)
    _worker_store = store


def _make_in_worker(job: tuple[str, str]) -> dict[str, Any]:
    return _make(*job, _worker_store)


def _make(ref: str, split: str, store: PatchStore | None) -> dict[str, Any]:
    """The samples of both stages of one scan, as the ledger keeps them."""
    case = phantom_case(PhantomRef.parse(ref), split)
    if store is not None:
        store.image(case.images[0])  # patches too, while the scan is at hand
    instructions = [to_row(sample) for sample in to_instructions(case, diseases=FINDINGS)]
    return {"id": ref, "alignment": [to_row(to_alignment(case))], "instructions": instructions}


def _make_all(jobs: Sequence[tuple[str, str]], store: PatchStore | None, workers: int) -> Iterator[dict[str, Any]]:
    """In order; in this process where starting others would take longer."""
    if workers == 1 or len(jobs) < 16:
        yield from (_make(*job, store) for job in jobs)
        return
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(workers, context, _start_worker, (store,)) as pool:
        yield from pool.map(_make_in_worker, jobs, chunksize=4)


def phantom_rows(
    kind: str,
    seeds: Iterable[int],
    split: str = "train",
    store: PatchStore | None = None,
    workers: int | None = None,
    without: Sequence[str] = (),
    samples: str = "alignment",
) -> list[dict[str, Any]]:
    """Rows of made-up scans; their patches go to the store. Kept beside the store and made only once.

    Args:
        kind: of `reading.PhantomRef`.
        seeds: one scan each.
        split: what the rows say.
        workers: processes; all cores by default.
        without: findings to leave out.
        samples: `alignment`, one row a scan, or `instructions`, many.
    """
    from tqdm.auto import tqdm

    refs = [str(PhantomRef(kind, int(seed), tuple((name, 0) for name in without))) for seed in seeds]
    kept: dict[str, dict[str, Any]] = {}
    ledger: Path | None = None
    if store is not None and store.folder is not None:
        store.folder.mkdir(parents=True, exist_ok=True)
        ledger = store.folder / f"phantoms-{rows_code()}.jsonl"
        kept = _read_ledger(ledger, set(refs))
    jobs = [(ref, split) for ref in refs if ref not in kept]
    if jobs:
        made = _make_all(jobs, store, workers or os.cpu_count() or 1)
        for entry in tqdm(made, total=len(jobs), desc=f"phantoms ({kind})", unit="scan"):
            kept[entry["id"]] = entry
            if ledger is not None:
                with ledger.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(entry) + "\n")
    return [{**row, "split": split} for ref in refs for row in kept[ref][samples]]


@cache
def rows_code() -> str:
    """Of everything that a phantom's rows depend on: the phantoms, and how they are asked about."""
    words = b"".join(Path(path).read_bytes() for path in (templates.__file__, tasks.__file__, __file__))
    return hashlib.sha256(phantom_code().encode() + words).hexdigest()[:16]


def _read_ledger(path: Path, wanted: set[str]) -> dict[str, dict[str, Any]]:
    """What the ledger has of the wanted scans; only their lines are parsed."""
    rows: dict[str, dict[str, Any]] = {}
    if not path.exists():
        return rows
    with path.open("rb") as file:
        for line in file:
            named = _LEDGER_ID.match(line)
            if named is None or named[1].decode() not in wanted:
                continue
            try:
                row = json.loads(line)
            except ValueError:  # the last line of a killed process
                continue
            rows[row["id"]] = row
    return rows
