"""`ctinstruct data prepare --estimate`: size and time of a data set, from a few of its cases."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CTInstructError
from ..files import temporary_folder
from ..processing.image_processing_ctinstruct import CTInstructImageProcessor
from .cases import ImageRef, MaskRef
from .prepare import PrepareOptions, finish, found_in
from .samples import AlignmentSample, from_row
from .sources.common import Problem
from .store import PatchStore

TRIED = 5
PACKED = 0.15  # of a row as JSON, in Parquet


@dataclass(frozen=True)
class Estimate:
    """What preparing a data set, and a first epoch over it, will take; all processes together.

    Attributes:
        cases: those that the data set lists.
        unusable: of them, those whose listing is broken already.
        tried: how many were tried, spread evenly over the list; `failed` of them could not be used.
        rows_bytes, seconds: of the prepared data set.
        cache_bytes, cache_seconds: of `cache` after every image and label file was read once.
    """

    cases: int
    unusable: int
    tried: int
    failed: int
    rows_bytes: float
    seconds: float
    cache_bytes: float
    cache_seconds: float


def estimate(
    source: str,
    folder: Path,
    options: PrepareOptions,
    workers: int | None = None,
    limit: int | None = None,
    image_processor: CTInstructImageProcessor | None = None,
) -> Estimate:
    """Try a few cases of a data set; nothing is kept.

    Args:
        source, folder, options, workers, limit: see `prepare.prepare`.
        image_processor: makes the patches; one with the paper's settings by default.

    Raises:
        CTInstructError: as `prepare`, and where none of the cases that were tried can be used.
    """
    listed = list(found_in(source, folder))
    cases = [one for one in listed if not isinstance(one, Problem)][:limit]
    chosen = cases[:: max(len(cases) // TRIED, 1)][:TRIED]
    rows_bytes = cache_bytes = 0.0
    seconds = [0.0, 0.0]
    failed = []
    for case in chosen:
        begun = time.perf_counter()
        rows = finish(case, options)
        seconds[0] += time.perf_counter() - begun
        if "problems" in rows:
            failed.append(rows["problems"][0]["reason"])
            continue
        rows_bytes += PACKED * sum(len(json.dumps(row)) for part in rows.values() for row in part)
        begun = time.perf_counter()
        try:
            cache_bytes += _cached(rows, image_processor or CTInstructImageProcessor())
        except CTInstructError as error:
            failed.append(str(error))
        seconds[1] += time.perf_counter() - begun
    if len(failed) == len(chosen):
        reason = f": {failed[0]}" if failed else ""
        raise CTInstructError(f"{folder} has no usable case of {source} among {len(chosen)} that were tried{reason}")
    share = len(cases) / len(chosen)
    shared_out = share / min(workers or os.cpu_count() or 1, len(cases))
    return Estimate(
        len(cases), sum(isinstance(one, Problem) for one in listed), len(chosen), len(failed), rows_bytes * share, seconds[0] * shared_out,
        cache_bytes * share, seconds[1] * shared_out,
    )  # fmt: skip


def _cached(rows: dict[str, list[dict[str, Any]]], image_processor: CTInstructImageProcessor) -> int:
    """Bytes that the images and label files of a case take in the cache, each read once."""
    images: dict[str, ImageRef] = {}
    labels: dict[str, tuple[ImageRef, MaskRef]] = {}
    for kind, part in rows.items():
        for sample in (from_row(row, kind) for row in part):
            shown = [sample.image] if isinstance(sample, AlignmentSample) else sample.images
            images |= {image.path: image for image in shown}
            labels |= {mask.path: (shown[0], mask) for mask in sample.masks if mask.path}
    folder = temporary_folder("estimate")
    try:
        store = PatchStore(image_processor, folder)
        for image in images.values():
            store.image(image)
        for image, mask in labels.values():
            store.mask(image, mask)
        return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


__all__ = ["Estimate", "estimate"]
