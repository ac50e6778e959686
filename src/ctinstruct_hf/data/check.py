"""`ctinstruct data check`: what a prepared data set holds, and what is wrong with it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CTInstructError
from .cases import ImageRef
from .prepared import iterate
from .reading import open_volume
from .samples import AlignmentSample, from_row


@dataclass
class Findings:
    """Counts and faults of a prepared data set.

    Attributes:
        counts: {(kind, source, task or grains, split): rows}.
        labels: {(kind, name): {1: …, 0: …, −1: …}}.
        faults: sentences naming file and row.
        missing: paths that rows name and that do not exist.
        broken: {path: why it cannot be read}, where volumes were read.
        leaks: patients in more than one split.
    """

    counts: Counter[tuple[str, str, str, str]] = field(default_factory=Counter)
    labels: dict[tuple[str, str], Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    faults: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    leaks: dict[str, list[str]] = field(default_factory=dict)

    @property
    def sound(self) -> bool:
        return not (self.faults or self.missing or self.broken or self.leaks)


def check(folder: Path, volumes: bool = False, progress: Callable[[str], None] = lambda step: None) -> Findings:
    """Look through a prepared data set or a JSONL file of instructions.

    Args:
        volumes: read every image too, which takes long.
        progress: called with a sentence on progress.

    Raises:
        CTInstructError: where it is none.
    """
    findings = Findings()
    splits: dict[tuple[str, str], set[str]] = defaultdict(set)
    images: dict[str, ImageRef] = {}
    paths: set[str] = set()
    ids: dict[str, set[str]] = defaultdict(set)
    for kind, file, number, row in iterate(folder):
        try:
            sample: Any = from_row(row, kind)
        except CTInstructError as error:
            findings.faults.append(f"{file}, row {number}: {error}")
            continue
        if sample.id in ids[kind]:
            findings.faults.append(f"{file}, row {number}: id '{sample.id}' occurs twice.")
        ids[kind].add(sample.id)
        what = "+".join(sample.grains) if isinstance(sample, AlignmentSample) else sample.task
        findings.counts[kind, sample.source, what, sample.split] += 1
        if sample.patient:
            splits[sample.source, sample.patient].add(sample.split)
        for label in sample.labels:
            findings.labels[kind, label.name][label.value] += 1
        shown = [sample.image] if isinstance(sample, AlignmentSample) else sample.images
        images.update({image.path: image for image in shown})
        paths |= {image.path for image in shown} | {mask.path for mask in sample.masks if mask.path}
    findings.missing = sorted(path for path in paths if not Path(path).exists())
    findings.leaks = {patient: sorted(found) for (_, patient), found in sorted(splits.items()) if len(found) > 1}
    if volumes:
        for number, (path, image) in enumerate(images.items(), start=1):
            progress(f"reading volume {number}/{len(images)}")
            if path in findings.missing:
                continue
            try:
                open_volume(image)
            except CTInstructError as error:
                findings.broken[path] = str(error)
    return findings
