"""Phantoms as a data set on disk: NIfTI, label maps and JSONL, each scan made once and kept in the cache.

<cache>/phantoms/scans/<hash of the code that makes them>/<kind>/
  cases.jsonl                    a line per scan: its truth and its files
  images/12.nii.gz
  labels/12-organs.nii.gz        index into `ORGANS` plus 1
  labels/12-findings.nii.gz      a value for each combination of findings that overlap
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from isal import igzip

from ..data.cases import Case, ImageRef, Label, MaskRef, Question
from ..errors import CTInstructError
from ..files import cache_folder, whole_file
from .phantom import Phantom
from .scans import KINDS, SLICE_KINDS, PhantomRef, phantom_of
from .structures import FINDINGS, ORGANS, UNIONS

STRUCTURES = [name for name in ORGANS if name != "body"] + list(UNIONS)
_LINE_ID = re.compile(rb'\{"id": "([^"]+)"')


def name_of(settings: Any) -> str:
    """The name of a set, as `trunk:0-700`, from a recipe's {kind, seeds: [first, last + 1], without: [finding]}.

    Raises:
        CTInstructError: where there is no such set.
    """
    seeds = settings.get("seeds") if isinstance(settings, dict) else None
    if not isinstance(seeds, list) or len(seeds) != 2 or not all(isinstance(seed, int) for seed in seeds):
        raise CTInstructError("write {kind: trunk, seeds: [first, last + 1]}")
    if settings.get("kind", "trunk") not in KINDS:
        raise CTInstructError(f"there is no kind '{settings['kind']}', use one of {', '.join(KINDS)}")
    without = "".join(f":-{name}" for name in settings.get("without", ()))
    name = f"{settings.get('kind', 'trunk')}:{seeds[0]}-{seeds[1]}{without}"
    refs_of(name)
    return name


def refs_of(name: str) -> list[PhantomRef]:
    """The phantoms of a set, as `trunk:0-700`, or `trunk:0-700:-lung nodule` without a finding.

    Raises:
        CTInstructError: where there is no such set.
    """
    found = re.fullmatch(rf"({'|'.join(KINDS)}):(\d+)-(\d+)((?::[+-][a-z ]+)*)", name)
    seeds = range(int(found[2]), int(found[3])) if found else range(0)
    if not found or not seeds:
        raise CTInstructError(f"'{name}' is no set of scans: write <{'|'.join(KINDS)}>:<first seed>-<last + 1>.")
    return [PhantomRef.parse(f"phantom:{found[1]}:{seed}{found[4]}") for seed in seeds]


def of_slices(name: str) -> bool:
    """Whether the scans of a set are slices."""
    return refs_of(name)[0].kind in SLICE_KINDS


def cases(name: str) -> Iterator[Case]:
    """The scans of a set, in the order of their seeds; missing scans are made, on all cores, and cached."""
    refs = refs_of(name)
    folder = cache_folder() / "phantoms" / "scans" / _code() / refs[0].kind
    lines = _read_lines(folder / "cases.jsonl", {str(ref) for ref in refs})
    jobs = [(str(ref), folder) for ref in refs if str(ref) not in lines]
    if jobs:
        from tqdm.auto import tqdm

        with _append_to(folder / "cases.jsonl") as file:
            for line in tqdm(_make_all(jobs), total=len(jobs), desc=f"making {name}", unit="scan"):
                file.write(json.dumps(line).encode() + b"\n")
                lines[line["id"]] = line
    for ref in refs:
        yield _case(lines[str(ref)], folder)


def make(ref: str, folder: Path) -> dict[str, Any]:
    """Write the files of a phantom; its line of `cases.jsonl`, with paths relative to the folder."""
    phantom = phantom_of(ref)
    name = re.sub(r"[^\w+-]+", "_", ref.split(":", 2)[2])
    volume = phantom.volume

    def write(path: str, array: np.ndarray) -> str:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        with whole_file(folder / path) as temporary:
            temporary.write_bytes(igzip.compress(volume.to_source(array).to_bytes(), 1))
        return path

    masks = organ_masks(phantom, write(f"labels/{name}-organs.nii.gz", phantom.organ_map))
    labels, values = label_findings(phantom)
    if values:
        path = write(f"labels/{name}-findings.nii.gz", labels)
        masks += [MaskRef(finding, path, values[finding]) for finding in FINDINGS if finding in values]
    case = Case(
        id=ref,
        images=[ImageRef(write(f"images/{name}.nii.gz", volume.hu))],
        split="train",
        source="phantoms",
        patient=f"phantom-{phantom.seed}",
        masks=masks,
        structures=[*STRUCTURES, *FINDINGS],
        meta={"phase": phantom.phase},
        **words_of(phantom.report, phantom.questions, phantom.labels | phantom.sides),
    )
    return asdict(case)


def words_of(report: str, questions: Sequence[dict[str, Any]], labels: dict[str, int]) -> dict[str, Any]:
    """The text fields of a `Case`: the parts of a report, questions with answers, labels, and the findings as diseases."""
    findings, _, impression = report.partition("Findings: ")[2].partition(" Impression: ")
    return {
        "texts": {"report": report, "findings": findings, "impression": impression},
        "questions": [
            Question(asked["question"], asked["answer"], asked["kind"], list(asked["choices"])) for asked in questions
        ],
        "labels": [Label(name, value) for name, value in labels.items()],
        "diseases": list(FINDINGS),
    }


def organ_masks(phantom: Phantom, path: str) -> list[MaskRef]:
    """The structures that a phantom shows, and the unions of them, as values of the map of organs."""
    shown = set(phantom.structures)
    masks = [MaskRef(name, path, [ORGANS.index(name) + 1]) for name in ORGANS if name in shown and name != "body"]
    return masks + [
        MaskRef(name, path, [ORGANS.index(part) + 1 for part in parts])
        for name, parts in UNIONS.items()
        if shown & set(parts)
    ]


def label_findings(phantom: Phantom) -> tuple[np.ndarray, dict[str, list[int]]]:
    """Findings, which may overlap, as one label map: uint8 (depth, height, width) with a value for each combination, and
    {finding: its values}."""
    bits = np.zeros(phantom.organ_map.shape, np.uint16)
    for number, name in enumerate(FINDINGS):
        if name in phantom.finding_masks:
            bits |= phantom.finding_masks[name].astype(np.uint16) << number
    combinations = np.flatnonzero(np.bincount(bits.ravel()))
    table = np.zeros(2 ** len(FINDINGS), np.uint8)
    values: dict[str, list[int]] = {}
    for value, combination in enumerate(combinations[combinations > 0].tolist(), start=1):
        table[combination] = value
        for number, name in enumerate(FINDINGS):
            if combination >> number & 1:
                values.setdefault(name, []).append(value)
    return table[bits], values


def _make_all(jobs: Sequence[tuple[str, Path]]) -> Iterator[dict[str, Any]]:
    """The lines of `jobs`, in order; few phantoms are made in this process, which is faster than starting others."""
    workers = os.cpu_count() or 1
    if workers == 1 or len(jobs) < 16:
        yield from (make(*job) for job in jobs)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:  # threads do not survive a fork
        yield from pool.map(make, *zip(*jobs, strict=True), chunksize=4)


def _case(line: dict[str, Any], folder: Path) -> Case:
    images = [ImageRef(**image | {"path": str(folder / image["path"])}) for image in line["images"]]
    masks = [MaskRef(**mask | {"path": str(folder / mask["path"])}) for mask in line["masks"]]
    questions = [Question(**question) for question in line["questions"]]
    labels = [Label(**label) for label in line["labels"]]
    return Case(**line | {"images": images, "masks": masks, "questions": questions, "labels": labels})


@cache
def _code() -> str:
    """A hash of the phantoms' code, by which the cache keeps scans of different code apart."""
    code = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    return hashlib.sha256(code).hexdigest()[:16]


def _append_to(path: Path) -> Any:
    """The file, unbuffered: each line is written at once, also by several processes."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab", buffering=0)
    except OSError as error:
        raise CTInstructError(f"{path} cannot be written: {error.strerror or error}.") from error
    if file.tell() and not path.read_bytes().endswith(b"\n"):  # a killed process left the beginning of a line
        file.write(b"\n")
    return file


def _read_lines(path: Path, wanted: set[str]) -> dict[str, dict[str, Any]]:
    """{id: line} of the wanted scans; only their lines are parsed."""
    lines: dict[str, dict[str, Any]] = {}
    if path.exists():
        with path.open("rb") as file:
            for text in file:
                found = _LINE_ID.match(text)
                if found is None or found[1].decode() not in wanted:
                    continue
                try:
                    line = json.loads(text)
                except ValueError:  # the last line of a killed process
                    continue
                lines[line["id"]] = line
    return lines
