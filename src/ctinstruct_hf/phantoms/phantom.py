"""Procedural chest-abdomen CT with the truth for every task: masks, findings, a report, questions.

Schematic, but anatomically right: the patient lies on the back, the heart points left, the liver is right, effusions lie
at the back, air rises. All lengths are mm in the patient: x toward the left, y toward the back, z toward the head, with
the origin at the dome of the diaphragm in the middle of the body.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from ..errors import CTInstructError
from ..processing.volume import CTVolume
from .anatomy import HU_BY_PHASE, paint_anatomy
from .canvas import FIELD_MM, Canvas
from .findings import PAINTERS, level_of
from .scanner import acquire, to_volume
from .structures import FINDINGS, ORGANS, UNIONS
from .wording import PhantomFinding, sides_of, write_questions, write_report

_DEFAULT_SHAPE = (128, 160, 160)


@dataclass
class Phantom:
    """A made-up scan and its truth.

    Attributes:
        volume: the scan as a `CTVolume`, HU int16.
        labels: {finding: 0 or 1} of all `FINDINGS`.
        findings: that are present, with side, size and region.
        report: in radiology style.
        questions: [{"question", "answer", "kind", "choices"}], kind `short`, `side`, `count`, `multiple_choice` …
        organ_map: uint8 (depth, height, width), index into `ORGANS` plus 1; 0 is outside.
        finding_masks: {finding: bool (depth, height, width)} of those present.
        phase: native, arterial or portal venous.
    """

    volume: CTVolume
    labels: dict[str, int]
    findings: list[PhantomFinding]
    report: str
    questions: list[dict[str, Any]]
    organ_map: np.ndarray
    finding_masks: dict[str, np.ndarray]
    phase: str
    seed: int
    structures: list[str] = field(default_factory=list)

    @cached_property
    def masks(self) -> dict[str, np.ndarray]:
        """{name: bool (depth, height, width)} of every structure and finding, empty where it is absent."""
        masks: dict[str, np.ndarray] = {"body": self.organ_map > 0}
        for index, name in enumerate(ORGANS):
            if name != "body":
                masks[name] = self.organ_map == index + 1
        for name, parts in UNIONS.items():
            masks[name] = np.logical_or.reduce([masks[part] for part in parts])
        for name in FINDINGS:
            found = self.finding_masks.get(name)
            masks[name] = found if found is not None else np.zeros(self.organ_map.shape, bool)
        return masks

    @property
    def sides(self) -> dict[str, int]:
        """{"<finding> on the right": 0 or 1, …} for both sides of all `SIDED`."""
        return sides_of(self.findings)


def make_phantom(
    seed: int,
    shape: tuple[int, int, int] | None = None,
    spacing: tuple[float, float, float] | None = None,
    kind: str = "volume",
    findings: dict[str, int] | None = None,
    through: str | None = None,
) -> Phantom:
    """A phantom from a seed: the same seed and arguments give the same phantom, voxel for voxel.

    Args:
        seed: any whole number.
        shape: voxels (depth, height, width); (128, 160, 160) by default, depth 1 for a slice.
        spacing: mm (depth, height, width); by default the chest and the upper abdomen fill that shape.
        kind: `volume`, or `slice` for an axial slice.
        findings: {finding: 0 or 1} to fix some of `FINDINGS`; the anatomy and the other findings of a seed stay, which
            gives counterfactual pairs.
        through: a finding at whose level a slice is taken, also where it is absent; few slices at a random level show a
            small finding.

    Raises:
        CTInstructError: for an unknown kind or finding, an impossible shape, or `through` for a volume.
    """
    if kind not in ("volume", "slice"):
        raise CTInstructError(f"kind is '{kind}': use 'volume' or 'slice'.")
    if through is not None and kind != "slice":
        raise CTInstructError("through is the level of a slice: a volume has none.")
    unknown = {*(findings or {}), *([] if through is None else [through])} - set(FINDINGS)
    if unknown:
        raise CTInstructError(f"findings has unknown names {sorted(unknown)}: use those of FINDINGS.")
    rng = np.random.default_rng([seed, 0])
    if shape is None:
        shape = _DEFAULT_SHAPE if kind == "volume" else (1, 160, 160)
    if kind == "slice":
        shape = (1, *shape[-2:])
    if len(shape) != 3 or min(shape) < 1 or min(shape[1:]) < 16:
        raise CTInstructError(f"shape is {tuple(shape)}: give (depth, height, width) of at least 16 x 16 in plane.")
    if spacing is None:
        deep, high, wide = (field_mm * rng.uniform(0.95, 1.1) / n for field_mm, n in zip(FIELD_MM, shape, strict=True))
        spacing = (5.0 if shape[0] == 1 else deep, wide if shape[1] == shape[2] else high, wide)
    depth, height, width = (int(n) for n in shape)
    # a slice has neighbours, as in a scan
    canvas = Canvas(
        rng, (3 if kind == "slice" else depth, height, width), (float(spacing[0]), float(spacing[1]), float(spacing[2]))
    )
    if kind == "slice":
        level = rng.uniform(-160, 175)
        if through is not None:
            level = level_of(through, seed)
        canvas.move_to(level)

    phase_index = int(rng.integers(3))
    phase = ("native", "arterial", "portal venous")[phase_index]
    hu = {name: levels[phase_index] + rng.normal(0, spread) * 0.5 for name, (levels, spread) in HU_BY_PHASE.items()}
    present = {name: int(rng.random() < 0.4) for name in FINDINGS}
    present.update(findings or {})
    paint_anatomy(canvas, hu, present)
    found = [
        finding
        for name in FINDINGS
        if present[name]
        for finding in PAINTERS[name](canvas, np.random.default_rng([seed, 1, FINDINGS.index(name)]), hu)
    ]
    acquire(canvas, np.random.default_rng([seed, 2]))
    if kind == "slice":
        canvas.keep_middle()
    seen = {finding.name for finding in found}
    for name in FINDINGS:
        if name in canvas.finding_masks and (name not in seen or not canvas.finding_masks[name].any()):
            del canvas.finding_masks[name]
    labels = {name: int(name in canvas.finding_masks) for name in FINDINGS}
    # parts of findings in the neighbours of a slice are not visible in it
    hidden = {key for key, mask in canvas.side_masks.items() if not mask.any()}
    found = [finding for finding in found if labels[finding.name] and (finding.name, finding.side) not in hidden]

    structures = [name for index, name in enumerate(ORGANS) if index and (canvas.organs == index + 1).sum() >= 8]
    volume = to_volume(canvas)
    words = np.random.default_rng([seed, 3])
    report = write_report(words, labels, found, phase)
    questions = write_questions(words, labels, found, structures, phase)
    return Phantom(
        volume,
        labels,
        found,
        report,
        questions,
        canvas.organs,
        canvas.finding_masks,
        phase,
        seed,
        ["body", *structures],
    )
