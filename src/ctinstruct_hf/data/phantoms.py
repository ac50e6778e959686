"""Procedural chest-abdomen CT with the truth for every task: masks, findings, a report, questions.

Schematic, but anatomically right: the patient lies on the back, the heart points left, the liver is right, effusions lie
at the back, air rises. All lengths are mm in the patient: x toward the left, y toward the back, z toward the head, with
the origin at the dome of the diaphragm in the middle of the body.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from ..errors import CTInstructError
from ..processing.volume import CTVolume, VolumeSource
from .phantom_text import SIDED, PhantomFinding, sides_of, write_questions, write_report

FINDINGS: list[str] = [
    "lung nodule",
    "pleural effusion",
    "consolidation",
    "emphysema",
    "cardiomegaly",
    "arterial wall calcification",
    "pericardial effusion",
    "atelectasis",
    "hiatal hernia",
    "medical material",
    "lymphadenopathy",
    "kidney stone",
    "liver lesion",
]
ORGANS: list[str] = [
    "body",
    "right lung",
    "left lung",
    "trachea",
    "heart",
    "aorta",
    "esophagus",
    "liver",
    "spleen",
    "stomach",
    "right kidney",
    "left kidney",
    "pancreas",
    "spine",
    "ribs",
    "sternum",
    "urinary bladder",
    "subcutaneous fat",
    "muscle",
]
# groups that people ask for
UNIONS: dict[str, tuple[str, ...]] = {
    "lungs": ("right lung", "left lung"),
    "kidneys": ("right kidney", "left kidney"),
    "bones": ("spine", "ribs", "sternum"),
}
# HU by contrast phase: native, arterial, portal venous; spread between patients
_HU: dict[str, tuple[tuple[float, float, float], float]] = {
    "heart": ((40, 190, 120), 12),
    "aorta": ((40, 310, 150), 20),
    "liver": ((52, 68, 108), 10),
    "spleen": ((45, 120, 118), 10),
    "right kidney": ((30, 150, 185), 15),
    "left kidney": ((30, 150, 185), 15),
    "pancreas": ((38, 95, 85), 10),
    "stomach": ((35, 45, 55), 12),
    "esophagus": ((35, 50, 55), 8),
    "urinary bladder": ((5, 5, 10), 5),
    "muscle": ((52, 58, 62), 6),
    "subcutaneous fat": ((-105, -105, -105), 6),
    "inner fat": ((-98, -98, -98), 8),
    "spine": ((190, 200, 210), 40),
    "ribs": ((330, 330, 340), 60),
    "sternum": ((160, 165, 170), 30),
    "lung": ((-845, -840, -840), 70),
    "trachea": ((-985, -985, -985), 8),
}
_GAS = (-1000.0, -950.0)  # HU of gas in stomach and bowel
_DEFAULT_SHAPE = (128, 160, 160)
_FIELD_MM = (320.0, 384.0, 384.0)


@dataclass
class Phantom:
    """One made-up scan and all that is true about it.

    Attributes:
        volume: the scan as a `CTVolume`, HU int16.
        labels: {finding: 0 or 1} for every one of `FINDINGS`.
        findings: the present ones with side, size and place.
        report: in radiology style.
        questions: [{"question", "answer", "kind", "choices"}], kind `short`, `side`, `count`, `multiple_choice` …
        organ_map: uint8 (depth, height, width), index into `ORGANS` plus 1; 0 is outside.
        finding_masks: {finding: bool (depth, height, width)} of the present ones.
        phase: native, arterial or portal venous.
    """

    volume: CTVolume
    labels: dict[str, int]
    findings: list[PhantomFinding]
    report: str
    questions: list[dict[str, object]]
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
        """{"<finding> on the right": 0 or 1, …} for both sides of every one of `SIDED`."""
        return sides_of(self.findings)


class _Canvas:
    """Coordinates of every voxel in the patient, and the arrays being painted."""

    def __init__(
        self, rng: np.random.Generator, shape: tuple[int, int, int], spacing: tuple[float, float, float]
    ) -> None:
        self.rng = rng
        self.shape = shape
        self.spacing = spacing
        # where the scan's middle lies in the patient, and how obliquely the patient lies
        free = max(0.0, _FIELD_MM[0] - shape[0] * spacing[0]) / 2  # a short scan may lie anywhere in the trunk
        self.centre = np.array(
            [rng.uniform(-8, 8), rng.uniform(-8, 8), rng.uniform(-12, 22) + rng.uniform(-free, free)]
        )
        build = rng.uniform(0.92, 1.08) * rng.uniform(0.95, 1.05, 3)  # the patient's size: breadth, depth, length
        # from mm of the scanner to mm of the patient
        self.turn = (_rotation(*np.radians(rng.normal(0, 2.0, 3))) / build[:, None]).astype(np.float32)
        self.back = np.linalg.inv(self.turn)
        depth, height, width = [
            ((np.arange(n) - (n - 1) / 2) * mm).astype(np.float32) for n, mm in zip(shape, spacing, strict=True)
        ]
        axes = [width[None, None, :], height[None, :, None], depth[:, None, None]]  # x, y, z of the scanner
        # with a smooth warp, so that no organ is an exact ellipsoid
        self.x, self.y, self.z = (self._coordinate(axes, row, 4.0) for row in range(3))
        self.hu = np.full(shape, -1000.0, dtype=np.float32)
        self.organs = np.zeros(shape, dtype=np.uint8)
        self.finding_masks: dict[str, np.ndarray] = {}
        self.side_masks: dict[tuple[str, str], np.ndarray] = {}  # the same of one side, for findings that have one

    def move_to(self, level: float) -> None:
        """Put the scan's middle at this height of the patient, mm."""
        shift = level - float(self.z.mean())
        self.z += np.float32(shift)
        self.centre[2] += shift  # `box` must look for body parts there too

    def _coordinate(self, axes: list[np.ndarray], row: int, height: float) -> np.ndarray:
        """One coordinate of the patient at every voxel, with two waves of `height` mm and half of it."""
        plane = self.turn[row, 0] * axes[0] + self.turn[row, 1] * axes[1] + np.float32(self.centre[row])
        total = plane + self.turn[row, 2] * axes[2]
        for length in (190.0, 95.0):
            phases = self.rng.uniform(0, 2 * np.pi, 3).astype(np.float32)
            k = np.float32(2 * np.pi / length)
            wave = np.sin(k * axes[0] + phases[0]) * np.cos(k * axes[1] + phases[1]) * np.float32(height * length / 190)
            total += wave * np.sin(k * axes[2] + phases[2])
        return total

    def box(self, low: np.ndarray, high: np.ndarray, margin: float = 10.0) -> tuple[slice, slice, slice] | None:
        """The voxels that may hold a body part between two corners (x, y, z) in the patient."""
        corners = np.array([[a, b, c] for a in (low[0], high[0]) for b in (low[1], high[1]) for c in (low[2], high[2])])
        scanner = (corners - self.centre) @ self.back.T
        first, last = scanner.min(0) - margin, scanner.max(0) + margin
        spans = []
        for axis, n, mm in (
            (2, self.shape[0], self.spacing[0]),
            (1, self.shape[1], self.spacing[1]),
            (0, self.shape[2], self.spacing[2]),
        ):
            start = int(np.floor(first[axis] / mm + (n - 1) / 2))
            stop = int(np.ceil(last[axis] / mm + (n - 1) / 2)) + 1
            start, stop = max(start, 0), min(stop, n)
            if start >= stop:
                return None
            spans.append(slice(start, stop))
        return tuple(spans)  # type: ignore[return-value]

    def ellipsoid(
        self, centre: tuple[float, float, float], axes: tuple[float, float, float]
    ) -> tuple[tuple[slice, slice, slice], np.ndarray] | None:
        """(box, inside) of an ellipsoid in the patient."""
        c, a = np.array(centre), np.array(axes)
        box = self.box(c - a, c + a)
        if box is None:
            return None
        distance = np.square((self.x[box] - np.float32(c[0])) * np.float32(1 / a[0]))
        distance += np.square((self.y[box] - np.float32(c[1])) * np.float32(1 / a[1]))
        distance += np.square((self.z[box] - np.float32(c[2])) * np.float32(1 / a[2]))
        return box, distance < 1

    def tube(
        self,
        start: tuple[float, float, float],
        end: tuple[float, float, float],
        first_radius: float,
        last_radius: float,
    ) -> tuple[tuple[slice, slice, slice], np.ndarray] | None:
        """(box, inside) of a straight tube between two points in the patient, with round ends."""
        a, b = np.array(start), np.array(end)
        box = self.box(np.minimum(a, b) - first_radius, np.maximum(a, b) + first_radius)
        if box is None:
            return None
        along = (b - a).astype(np.float32)
        x, y, z = (field[box] - np.float32(at) for field, at in zip((self.x, self.y, self.z), a, strict=True))
        share = np.clip((x * along[0] + y * along[1] + z * along[2]) / np.square(along).sum(), 0, 1)
        distance = np.square(x - share * along[0])
        distance += np.square(y - share * along[1])
        distance += np.square(z - share * along[2])
        return box, distance < np.square(np.float32(first_radius) + share * np.float32(last_radius - first_radius))

    def organ(self, name: str, box: tuple[slice, slice, slice], inside: np.ndarray, hu: float) -> None:
        self.organs[box][inside] = ORGANS.index(name) + 1
        self.hu[box][inside] = hu

    def finding(
        self,
        name: str,
        box: tuple[slice, slice, slice],
        inside: np.ndarray,
        hu: float | None,
        side: str = "",
        displaces_lung: bool = False,
    ) -> int:
        """Mark a finding and give it its HU; the number of voxels it got. What displaces lung is no lung."""
        masks = [self.finding_masks.setdefault(name, np.zeros(self.shape, bool))]
        if side:
            masks.append(self.side_masks.setdefault((name, side), np.zeros(self.shape, bool)))
        for mask in masks:
            mask[box] |= inside
        if displaces_lung:
            self.organs[box][inside & self.is_organ(box, "left lung", "right lung")] = ORGANS.index("body") + 1
        if hu is not None:
            self.hu[box][inside] = hu
        return int(inside.sum())

    def keep_middle(self) -> None:
        """Leave one slice of the three."""
        self.shape = (1, *self.shape[1:])
        self.hu, self.organs = self.hu[1:2].copy(), self.organs[1:2].copy()
        self.finding_masks = {name: mask[1:2].copy() for name, mask in self.finding_masks.items()}
        self.side_masks = {key: mask[1:2].copy() for key, mask in self.side_masks.items()}

    def is_organ(self, box: tuple[slice, slice, slice], *names: str) -> np.ndarray:
        labels = self.organs[box]
        found = labels == ORGANS.index(names[0]) + 1
        for name in names[1:]:
            found |= labels == ORGANS.index(name) + 1
        return found


def _rotation(a: float, b: float, c: float) -> np.ndarray:
    rx = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    ry = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    rz = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    return rx @ ry @ rz


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
        spacing: mm between them; by default what shows the chest and the upper abdomen in that shape.
        kind: `volume`, or `slice` for one axial slice.
        findings: {finding: 0 or 1} to fix some of `FINDINGS`; the anatomy and the other findings of a seed stay, which
            gives counterfactual pairs.
        through: a finding that a slice is taken at the level of, whether it is there or not: few slices at a level of
            chance show a small one.

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
        spacing = tuple(field_mm * rng.uniform(0.95, 1.1) / n for field_mm, n in zip(_FIELD_MM, shape, strict=True))  # type: ignore[assignment]
        spacing = (spacing[0], spacing[2], spacing[2]) if shape[1] == shape[2] else spacing
        if shape[0] == 1:
            spacing = (5.0, *spacing[1:])
    painted = (3, *shape[1:]) if kind == "slice" else shape  # a slice has neighbours, as in a scan
    canvas = _Canvas(rng, tuple(int(n) for n in painted), tuple(float(mm) for mm in spacing))  # type: ignore[arg-type]
    if kind == "slice":
        level = rng.uniform(-160, 175)
        if through is not None:
            level = _level_of(through, seed)
        canvas.move_to(level)

    phase_index = int(rng.integers(3))
    phase = ("native", "arterial", "portal venous")[phase_index]
    hu = {name: levels[phase_index] + rng.normal(0, spread) * 0.5 for name, (levels, spread) in _HU.items()}
    present = {name: int(rng.random() < 0.4) for name in FINDINGS}
    present.update(findings or {})
    _anatomy(canvas, hu, present)
    found = [
        one
        for name in FINDINGS
        if present[name]
        for one in _FINDING_PAINTERS[name](canvas, np.random.default_rng([seed, 1, FINDINGS.index(name)]), hu)
    ]
    _acquire(canvas, np.random.default_rng([seed, 2]))
    if kind == "slice":
        canvas.keep_middle()
    seen = {one.name for one in found}
    for name in FINDINGS:
        if name in canvas.finding_masks and (name not in seen or not canvas.finding_masks[name].any()):
            del canvas.finding_masks[name]
    labels = {name: int(name in canvas.finding_masks) for name in FINDINGS}
    # of a slice's findings, what lies in its neighbours is not seen
    hidden = {key for key, mask in canvas.side_masks.items() if not mask.any()}
    found = [one for one in found if labels[one.name] and (one.name, one.side) not in hidden]

    structures = [name for index, name in enumerate(ORGANS) if index and (canvas.organs == index + 1).sum() >= 8]
    volume = _volume(canvas)
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


class _Plan:
    """Stands in for a canvas where only the level of a finding is wanted: takes it down and paints nothing."""

    heart_size = 1.0

    def __init__(self) -> None:
        self.levels: list[float] = []

    def ellipsoid(self, centre: tuple[float, float, float], axes: tuple[float, float, float]) -> None:
        self.levels.append(float(centre[2]))

    def box(self, low: np.ndarray, high: np.ndarray) -> None:
        self.levels.append(float(low[2] + high[2]) / 2)

    def is_organ(self, box: tuple[slice, slice, slice], *names: str) -> np.ndarray:
        return np.zeros(0, bool)

    def finding(
        self, name: str, box: object, inside: object, hu: object, side: str = "", displaces_lung: bool = False
    ) -> int:
        return 0


def _level_of(name: str, seed: int) -> float:
    """Height in mm at which the phantom of a seed has a finding, or would have it."""
    plan, rng = _Plan(), np.random.default_rng([seed, 4])
    painter_rng = np.random.default_rng([seed, 1, FINDINGS.index(name)])
    for _ in _FINDING_PAINTERS[name](plan, painter_rng, dict.fromkeys(_HU, 0.0)):  # type: ignore[arg-type]
        pass
    levels = plan.levels or [34.0 + rng.normal(0, 20)]  # of the heart
    if name in ("lung nodule", "liver lesion"):
        levels = levels[:1]  # a painted one takes a number more, which moves those after it
    return float(rng.choice(levels)) + float(rng.normal(0, 3))


def _anatomy(c: _Canvas, hu: dict[str, float], present: dict[str, int]) -> None:
    """Paint from the outside in; what comes later lies inside what came before."""
    rng = c.rng
    everything = (slice(None), slice(None), slice(None))
    fat_share = np.float32(rng.uniform(0.74, 0.92))
    wide, deep = 142.0 / float(fat_share), 96.0 / float(fat_share)  # the wall stays where it is, the fat lies around it
    across = np.square(c.x * np.float32(1 / wide))
    along = np.square((c.y - np.float32(5)) * np.float32(1 / deep))
    chest = across + along
    across *= np.float32(rng.uniform(0.0, 0.45)) * along  # trunks are squarer than an ellipse
    chest -= across
    inner = chest < fat_share**2
    c.organ("subcutaneous fat", everything, chest < 1, hu["subcutaneous fat"])
    c.organ("muscle", everything, inner, hu["muscle"])
    c.hu[(chest >= np.float32(0.97)) & (chest < 1)] = 10  # skin
    _surroundings(c, chest, deep)

    breath = _Diaphragm(
        float(rng.uniform(-16, 16)),
        float(rng.uniform(0.006, 0.014)),
        float(rng.uniform(0.005, 0.013)),
        float(rng.uniform(0, 45)),
    )
    # the abdominal cavity: fat with bowel, up to the domes
    left_dome = breath.height(c.x, c.y, 1.0)
    roof = np.where(c.x < 0, breath.height(c.x, c.y, -1.0), left_dome)
    below = (chest < (fat_share - np.float32(0.10)) ** 2) & (c.z < np.maximum(roof, 0))
    c.organ("body", everything, below, hu["inner fat"])
    bowel = _Bowel(c, hu["inner fat"])
    for _ in range(int(rng.integers(10, 26))):  # small bowel
        centre = (rng.uniform(-95, 95), rng.uniform(-75, 20), rng.uniform(-240, -75))
        bowel.loop(below, centre, rng.uniform(12, 26, 3), rng.uniform(0, 65), 0.3)
    for side, top in ((-1.0, -95.0), (1.0, -70.0)):  # ascending and descending colon
        for step in range(5):
            centre = (side * rng.uniform(92, 108), rng.uniform(-10, 30), top - 34.0 * step)
            bowel.loop(below, centre, rng.uniform(18, 27, 3), bowel.stool, 0.6)
    level = rng.uniform(-110, -60)
    for step in range(7):  # transverse colon
        centre = (-90 + 30.0 * step, rng.uniform(-78, -58), level + rng.uniform(-15, 15))
        bowel.loop(below, centre, rng.uniform(17, 25, 3), bowel.stool, 0.7)
    _back_muscles(c, hu, chest)

    _bones(c, hu, chest, fat_share, deep)
    _chest(c, hu, present, breath)
    _abdomen(c, hu, breath, bowel, c.z < left_dome - 3)
    _vessels(c, hu)


def _surroundings(c: _Canvas, chest: np.ndarray, deep: float) -> None:
    """Around the patient: a table, flat or hollow, of one or two shells with a mat on it, and clothes or a blanket. The
    air between them lies enclosed as that of a lung does."""
    rng = c.rng
    outside = chest >= 1
    hollow = np.float32(rng.uniform(0.5, 2.5) * 1e-3 if rng.random() < 0.6 else 0.0)
    below = c.y + hollow * np.square(c.x)  # mm; of a hollow table the edges lie higher
    below -= np.float32(deep + 9)
    wide = outside & (np.abs(c.x) < np.float32(rng.uniform(170, 260)))
    foam, thick = np.float32(rng.uniform(0, 22)), np.float32(rng.uniform(2, 6))
    core = np.float32(rng.uniform(8, 40) if rng.random() < 0.6 else 0.0)
    c.hu[wide & (below > 0) & (below < foam)] = rng.uniform(-985, -880)
    shells = (below > foam) & (below < foam + thick)
    if core:
        c.hu[wide & (below > foam) & (below < foam + core)] = rng.uniform(-1000, -930)
        shells |= (below > foam + core) & (below < foam + core + thick)
    c.hu[wide & shells] = rng.uniform(-500, 150)
    for _ in range(int(rng.integers(3))):  # layers of cloth over the front
        away = np.float32(1 + rng.uniform(0.02, 0.5))
        folds = np.sin(c.x * np.float32(rng.uniform(0.03, 0.12)) + np.float32(rng.uniform(0, 6)))
        folds *= np.float32(rng.uniform(0.0, 0.1))
        folds += chest
        layer = outside & (np.abs(folds - away) < np.float32(rng.uniform(0.01, 0.03))) & (below < 0)
        c.hu[layer] = rng.uniform(-950, -650)


class _Bowel:
    """Loops of bowel. In some patients they are wide with gas, which lies as close to wall and domes as a lung does."""

    def __init__(self, c: _Canvas, fat: float) -> None:
        self.canvas, self.fat = c, fat
        self.gassy = c.rng.random() < 0.4
        self.stool = float(c.rng.uniform(-60, 60))

    def loop(
        self,
        where: np.ndarray,
        centre: tuple[float, float, float],
        axes: np.ndarray,
        hu: float,
        gas: float,
        rim: float = 0.0,
    ) -> None:
        """One loop where a mask of the whole scan allows, with fat of `rim` mm around it; gas, of this probability,
        rises to the front."""
        c, rng = self.canvas, self.canvas.rng
        has_gas = rng.random() < (max(gas, 0.8) if self.gassy else gas)
        axes = axes * (rng.uniform(1, 1.7) if self.gassy and has_gas else 1)
        level = np.float32(rng.uniform(-0.5, 0.8 if self.gassy else 0.3))  # from the front, -1, to the back, 1
        gas_hu = rng.uniform(*_GAS)
        for more, value in ((rim, self.fat), (0.0, hu)) if rim else ((0.0, hu),):
            part = c.ellipsoid(centre, tuple(axes + more))
            if part is None:
                return
            box, inside = part
            c.organ("body", box, inside & where[box], value)
        if has_gas:
            part = c.ellipsoid(centre, tuple(axes - 2.5))  # inside the wall
            if part:
                box, inside = part
                inside &= where[box] & (c.y[box] < np.float32(centre[1]) + level * np.float32(axes[1]))
                c.hu[box][inside] = gas_hu


def _back_muscles(c: _Canvas, hu: dict[str, float], chest: np.ndarray) -> None:
    """The long muscles behind and beside the spine."""
    for side in (-1.0, 1.0):
        for (x, y), (across, deep), top in (((34, 84), (27, 17), 400.0), ((40, 58), (19, 21), -85.0)):
            part = c.box(np.array([side * x - across, y - deep, -400]), np.array([side * x + across, y + deep, top]))
            if part:
                inside = np.square((c.x[part] - np.float32(side * x)) / np.float32(across)) < 1 - np.square(
                    (c.y[part] - np.float32(y)) / np.float32(deep)
                )
                inside &= (chest[part] < 0.97) & (c.z[part] < top)
                c.organ("muscle", part, inside, hu["muscle"])


def _bones(c: _Canvas, hu: dict[str, float], chest: np.ndarray, fat_share: np.float32, deep: float) -> None:
    wall = (chest < (fat_share - np.float32(0.02)) ** 2) & (chest > (fat_share - np.float32(0.085)) ** 2)
    pitch, start = c.rng.uniform(26, 31), c.rng.uniform(0, 26)
    places = np.flatnonzero(wall)  # few of all voxels
    x, y, z = c.x.ravel()[places], c.y.ravel()[places], c.z.ravel()[places]
    slanted = z - np.float32(0.35) * (y - np.float32(60)) + np.float32(start)
    ring = np.abs(np.mod(slanted, np.float32(pitch)) - np.float32(pitch / 2)) < 6.5
    ribs = places[ring & (z > -85) & (z < 210) & (np.abs(x) > 18)]
    c.organs.ravel()[ribs] = ORGANS.index("ribs") + 1
    c.hu.ravel()[ribs] = hu["ribs"]
    part = c.box(np.array([-26, 40, -400]), np.array([26, deep, 400]))
    if part:
        x, y, z = c.x[part], c.y[part], c.z[part]
        body = np.square(x / np.float32(19)) + np.square((y - np.float32(66)) / np.float32(16)) < 1
        arch = (np.abs(x) < 7) & (y >= 80) & (y < 100) | (np.abs(x) < 22) & (np.abs(y - 84) < 4)
        disc = np.abs(np.mod(z, np.float32(28)) - 14) > 11.5
        canal = np.square(x / np.float32(7)) + np.square((y - np.float32(86)) / np.float32(6)) < 1
        c.organ("spine", part, (body | arch) & ~canal, hu["spine"])
        shell = body & (np.square(x / np.float32(16.5)) + np.square((y - np.float32(66)) / np.float32(13.5)) >= 1)
        c.hu[part][shell] = hu["spine"] + 180
        c.hu[part][body & disc] = 80
        c.hu[part][canal] = 15
    part = c.ellipsoid((0, -78, 100), (18, 8, 80))
    if part:
        box, inside = part
        c.organ("sternum", box, inside & (chest[box] < 1), hu["sternum"])


@dataclass(frozen=True)
class _Diaphragm:
    """How far a patient has breathed out, and how steep the domes are.

    Attributes:
        rise: mm above its mean place; the organs under it go with it.
        across, along: how fast a dome falls toward the wall and toward the back.
        edge: mm that it falls more at its very edge, which leaves the lung a thin rim along the wall.
    """

    rise: float
    across: float
    along: float
    edge: float

    def height(self, x: np.ndarray, y: np.ndarray, side: float) -> np.ndarray:
        """Height of the dome under a lung: higher on the right, falling toward the wall and the back."""
        top = self.rise + (14.0 if side < 0 else 4.0)
        x, y = np.square(x - np.float32(side * 70)), np.square(y + np.float32(15))
        at_edge = np.square(x * np.float32(1 / 60**2) + y * np.float32(1 / 85**2))
        return (
            np.float32(top)
            - np.float32(self.across) * x
            - np.float32(self.along) * y
            - np.float32(self.edge) * np.minimum(at_edge, 2)
        )


def _chest(c: _Canvas, hu: dict[str, float], present: dict[str, int], breath: _Diaphragm) -> None:
    rng = c.rng
    gravity, base = np.float32(rng.uniform(0.2, 1.2)), np.float32(rng.uniform(0, 150))
    for name, side in (("right lung", -1.0), ("left lung", 1.0)):
        # an ellipsoid above; below, the chest wall holds its width down to the recesses around the dome
        centre, axes = np.array([side * 73, 2, 75]), np.array([63, 86, 128]) * rng.uniform(0.95, 1.05, 3)
        down = 1.2 * float(axes[2])
        box = c.box(centre - (axes[0], axes[1], down), centre + axes)
        if box:
            x, y, z = (
                (one[box] - np.float32(middle)) / np.float32(axis)
                for one, middle, axis in zip((c.x, c.y, c.z), centre, axes, strict=True)
            )
            along = np.where(z > 0, np.square(z), np.square(np.square(z * np.float32(axes[2] / down))))
            inside = np.square(x) + np.square(y) + along < 1
            above = c.z[box] - breath.height(c.x[box], c.y[box], side)
            inside &= above > 0
            inside &= side * c.x[box] > 14
            c.organ(name, box, inside, hu["lung"])
            # denser where gravity pulls, and over the dome
            denser = gravity * (c.y[box] + np.float32(20)) + base * np.exp(np.float32(-1 / 25) * np.maximum(above, 0))
            c.hu[box][inside] += denser[inside]
    for _ in range(70):  # lung vessels run away from the hilum and grow thin
        side = rng.choice([-1.0, 1.0])
        place = np.array([side * 35, 10, 60.0]) + rng.normal(0, 6, 3)
        direction = rng.normal(size=3)
        direction[0] = abs(direction[0]) * side
        radius = float(rng.uniform(1.5, 4.0))
        for _ in range(3):
            direction = direction / np.linalg.norm(direction)
            end = place + direction * rng.uniform(18, 32)
            vessel = c.tube(tuple(place), tuple(end), radius, radius * 0.72)
            if vessel:
                box, inside = vessel
                inside &= c.is_organ(box, "right lung", "left lung")
                c.hu[box][inside] = 30
            place, radius = end, radius * 0.72
            direction = direction + rng.normal(0, 0.3, 3)
    # the mediastinum between the lungs
    part = c.box(np.array([-40, -80, -20]), np.array([40, 70, 215]))
    if part:
        x, y = c.x[part], c.y[part]
        middle = (np.abs(x) < 30) & (y > -70) & (y < 62) & (c.z[part] > -5)
        middle &= ~c.is_organ(part, "spine", "sternum", "right lung", "left lung")
        c.organ("body", part, middle & (c.hu[part] > -400), -80.0)
    normal = rng.uniform(0.92, 1.05)  # drawn either way, so that the rest of the anatomy does not depend on the finding
    size = np.float32(1.32 if present["cardiomegaly"] else normal)
    part = c.ellipsoid((24 * float(size), -28, 34), (52 * float(size), 42 * float(size), 42 * float(size)))
    c.heart_size = float(size)  # type: ignore[attr-defined]
    if part:
        box, inside = part
        c.organ("heart", box, inside & ~c.is_organ(box, "sternum", "spine", "ribs"), hu["heart"])
    part = c.box(np.array([-14, 0, 88]), np.array([14, 34, 400]))
    if part:
        inside = np.square(c.x[part] / 10) + np.square((c.y[part] - 16) / 9) < 1
        inside &= c.z[part] > 98
        c.organ("trachea", part, inside, hu["trachea"])
    for side in (-1.0, 1.0):
        for step in range(6):
            part = c.ellipsoid((side * (5 + 7 * step), 16 + step, 98 - 6.0 * step), (6.5, 6, 6))
            if part:
                box, inside = part
                c.organ("trachea", box, inside, hu["trachea"])
    part = c.box(np.array([-8, 24, -60]), np.array([16, 50, 220]))
    if part:
        inside = np.square((c.x[part] - 4) / 9) + np.square((c.y[part] - 37) / np.float32(6.5)) < 1
        inside &= (c.z[part] > -35) & (c.z[part] < 205)
        c.organ("esophagus", part, inside & ~c.is_organ(part, "spine"), hu["esophagus"])


def _abdomen(c: _Canvas, hu: dict[str, float], breath: _Diaphragm, bowel: _Bowel, under_left_dome: np.ndarray) -> None:
    rng = c.rng
    rim = float(rng.uniform(2.5, 7.0))  # mm of fat around each organ; the lean have little

    def organ(
        name: str, centre: tuple[float, float, float], axes: tuple[float, float, float], side: float = 0.0
    ) -> None:
        place = np.array(centre) + rng.normal(0, 3, 3)
        half = np.array(axes) * rng.uniform(0.92, 1.08)
        spared = ["ribs", "spine", "subcutaneous fat", "right lung", "left lung", "heart"]
        for what, more, level, kept in (("body", rim, hu["inner fat"], [*spared, name]), (name, 0, hu[name], spared)):
            part = c.ellipsoid(tuple(place), tuple(half + more))
            if part is None:
                return
            box, inside = part
            if side:
                inside &= c.z[box] < breath.height(c.x[box], c.y[box], side) - 2
            inside &= ~c.is_organ(box, *kept)
            inside &= c.organs[box] > 0
            c.organ(what, box, inside, level)

    rise = breath.rise
    organ("liver", (-62, -6, rise - 48), (88, 80, 72), side=-1.0)
    organ("liver", (8, -42, rise - 36), (62, 38, 34), side=-1.0)
    organ("spleen", (98, 34, rise - 46), (32, 48, 50), side=1.0)
    organ("stomach", (56, -34, rise - 52), (42, 34, 44), side=1.0)
    part = c.ellipsoid((56, -34, rise - 52), (38, 30, 40))
    level, gas_hu = np.float32(-34 + rng.uniform(-24, 4)), rng.uniform(*_GAS)
    if part:
        box, inside = part
        c.hu[box][inside & c.is_organ(box, "stomach") & (c.y[box] < level)] = gas_hu
    _left_flexure(c, breath, bowel, under_left_dome, rim)
    organ("pancreas", (12, 8, -84), (52, 13, 14))
    organ("right kidney", (-58, 52, -112), (27, 27, 53))
    organ("left kidney", (58, 52, -102), (27, 27, 53))
    for side, height in ((-1, -112), (1, -102)):
        part = c.ellipsoid((side * 46, 46, height), (12, 11, 24))
        if part:
            box, inside = part
            pelvis = inside & c.is_organ(box, "right kidney", "left kidney")
            c.hu[box][pelvis] = hu["right kidney"] * 0.4 - 20
    organ("urinary bladder", (0, -22, -290), (38, 32, 32))


def _left_flexure(c: _Canvas, breath: _Diaphragm, bowel: _Bowel, under_dome: np.ndarray, rim: float) -> None:
    """The colon's bend under the left dome, close to the lung and often full of gas."""
    rng = c.rng
    everything = (slice(None), slice(None), slice(None))
    where = under_dome & ~c.is_organ(
        everything, "ribs", "spine", "muscle", "subcutaneous fat", "left lung", "heart", "liver"
    )
    where &= c.organs > 0
    for _ in range(int(rng.integers(2, 7))):
        x, y = rng.uniform(50, 112), rng.uniform(-70, 10)
        axes = rng.uniform(9, 20, 3)
        top = float(breath.height(np.float32(x), np.float32(y), 1.0))
        bowel.loop(where, (x, y, top - axes[2] - rng.uniform(2, 30)), axes, bowel.stool, 0.7, rim)


def _vessels(c: _Canvas, hu: dict[str, float]) -> None:
    def tube(low: float, high: float, x: float, y: float, radius: float) -> None:
        part = c.box(np.array([x - radius, y - radius, low]), np.array([x + radius, y + radius, high]))
        if part:
            inside = (
                np.square((c.x[part] - np.float32(x)) / radius) + np.square((c.y[part] - np.float32(y)) / radius) < 1
            )
            inside &= (c.z[part] > low) & (c.z[part] < high)
            c.organ("aorta", part, inside & ~c.is_organ(part, "spine"), hu["aorta"])

    tube(-330, 122, 20, 42, 11.5)  # descending
    tube(72, 122, -8, -22, 15)  # ascending
    part = c.box(np.array([-30, -45, 105]), np.array([45, 65, 160]))
    if part:  # the arch, from front right to back left
        along = np.hypot(c.x[part] - 6, (c.y[part] - 10) * np.float32(0.9))
        ring = np.square((np.hypot(along, c.z[part] - 118) - 34) / 13)
        line = np.abs((c.x[part] - 6) * np.float32(0.93) - (c.y[part] - 10) * np.float32(0.40)) < 14
        c.organ(
            "aorta", part, (ring < 1) & line & (c.z[part] > 118) & ~c.is_organ(part, "trachea", "spine"), hu["aorta"]
        )
    part = c.box(np.array([-36, 15, -330]), np.array([-8, 50, 10]))
    if part:  # inferior vena cava
        inside = np.square((c.x[part] + 22) / 12) + np.square((c.y[part] - 34) / 9) < 1
        inside &= ~c.is_organ(part, "spine", "right kidney")
        c.hu[part][inside & (c.z[part] < 5)] = hu["aorta"] * 0.5 + 40


def _lung_place(c: _Canvas, rng: np.random.Generator, side: float) -> tuple[float, float, float]:
    return side * rng.uniform(45, 100), rng.uniform(-40, 50), rng.uniform(30, 150)


def _side(rng: np.random.Generator) -> tuple[str, float]:
    return ("right", -1.0) if rng.random() < 0.5 else ("left", 1.0)


def _lobe(side: str, z: float) -> str:
    if z > 95:
        return f"{side} upper lobe"
    return f"{side} middle lobe" if side == "right" and z > 60 else f"{side} lower lobe"


def _paint_nodules(c: _Canvas, rng: np.random.Generator, hu: dict[str, float]) -> Iterator[PhantomFinding]:
    for _ in range(int(rng.integers(1, 4))):
        side, sign = _side(rng)
        place = _lung_place(c, rng, sign)
        diameter = float(rng.uniform(10, 26))
        part = c.ellipsoid(place, (diameter / 2,) * 3)
        if part is None:
            continue
        box, inside = part
        inside &= c.is_organ(box, f"{side} lung")
        if c.finding("lung nodule", box, inside, float(rng.uniform(10, 60))) >= 4:
            yield PhantomFinding("lung nodule", side, round(diameter), _lobe(side, place[2]))


def _paint_effusion(c: _Canvas, rng: np.random.Generator, hu: dict[str, float]) -> Iterator[PhantomFinding]:
    sides = [[("right", -1.0)], [("left", 1.0)], [("right", -1.0), ("left", 1.0)]][int(rng.integers(3))]
    for side, sign in sides:
        level = rng.uniform(15, 48)  # y of the fluid's surface; gravity takes it to the back
        part = c.box(np.array([min(sign * 140, 0), 0, -80]), np.array([max(sign * 140, 0), 110, 220]))
        if part is None:
            continue
        height = np.float32(rng.uniform(60, 140))
        inside = c.is_organ(part, f"{side} lung") & ~_taken(c, part)
        inside &= c.y[part] > np.float32(level) + np.float32(0.28) * (c.z[part] - height * 0.5)
        if c.finding("pleural effusion", part, inside, float(rng.uniform(2, 18)), side, displaces_lung=True) >= 8:
            yield PhantomFinding("pleural effusion", side, 0, "", "large" if level < 26 else "small")


def _paint_consolidation(c: _Canvas, rng: np.random.Generator, hu: dict[str, float]) -> Iterator[PhantomFinding]:
    side, sign = _side(rng)
    place = _lung_place(c, rng, sign)
    part = c.ellipsoid(place, tuple(rng.uniform(22, 36, 3)))  # type: ignore[arg-type]
    if part is None:
        return
    box, inside = part
    inside &= c.is_organ(box, f"{side} lung") & ~_taken(c, box)
    if c.finding("consolidation", box, inside, 30.0, side) >= 8:
        for step in range(4):  # air bronchograms
            tube = c.ellipsoid((place[0] + sign * step * 6, place[1], place[2] - step * 4), (5, 3, 3))
            if tube:
                c.hu[tube[0]][tube[1] & c.finding_masks["consolidation"][tube[0]]] = -700
        yield PhantomFinding("consolidation", side, 0, _lobe(side, place[2]))


def _paint_emphysema(c: _Canvas, rng: np.random.Generator, hu: dict[str, float]) -> Iterator[PhantomFinding]:
    painted = 0
    for _ in range(46):
        sign = rng.choice([-1.0, 1.0])
        place = (sign * rng.uniform(35, 110), rng.uniform(-60, 60), rng.uniform(90, 185))
        part = c.ellipsoid(place, tuple(rng.uniform(7, 15, 3)))  # type: ignore[arg-type]
        if part:
            box, inside = part
            inside &= c.is_organ(box, "right lung", "left lung") & ~_taken(c, box)
            painted += c.finding("emphysema", box, inside, -985.0)
    if painted >= 8:
        yield PhantomFinding("emphysema", "both", 0, "upper lobes")


def _paint_cardiomegaly(c: _Canvas, rng: np.random.Generator, hu: dict[str, float]) -> Iterator[PhantomFinding]:
    everything = (slice(None), slice(None), slice(None))
    if c.finding("cardiomegaly", everything, c.is_organ(everything, "heart"), None) >= 8:
        yield PhantomFinding("cardiomegaly")


def _paint_calcification(c: _Canvas, rng: np.random.Generator, hu: dict[str, float]) -> Iterator[PhantomFinding]:
    painted = 0
    for _ in range(34):
        angle, z = rng.uniform(0, 2 * np.pi), rng.uniform(-150, 110)
        part = c.ellipsoid((20 + 11 * np.cos(angle), 42 + 11 * np.sin(angle), z), (4, 4, 7))
        if part:
            box, inside = part
            inside &= c.is_organ(box, "aorta")
            painted += c.finding("arterial wall calcification", box, inside, float(rng.uniform(650, 1100)))
    if painted >= 4:
        yield PhantomFinding("arterial wall calcification")


def _paint_pericardial(c: _Canvas, rng: np.random.Generator, hu: dict[str, float]) -> Iterator[PhantomFinding]:
    size = getattr(c, "heart_size", 1.0)
    width = float(rng.uniform(9, 15))
    part = c.ellipsoid((24 * size, -28, 34), (52 * size + width, 42 * size + width, 42 * size + width))
    if part is None:
        return
    box, inside = part
    inside &= ~c.is_organ(box, "heart", "aorta", "sternum", "ribs", "spine", "esophagus", "trachea", "liver", "stomach")
    inside &= (c.organs[box] > 0) & (c.z[box] > -10)
    if c.finding("pericardial effusion", box, inside, 12.0, displaces_lung=True) >= 8:
        yield PhantomFinding("pericardial effusion", "", round(width))


def _paint_atelectasis(c: _Canvas, rng: np.random.Generator, hu: dict[str, float]) -> Iterator[PhantomFinding]:
    side, sign = _side(rng)
    slope = np.float32(rng.uniform(-0.3, 0.3))
    height = np.float32(rng.uniform(28, 48))
    part = c.box(np.array([min(sign * 140, 0), -60, -20]), np.array([max(sign * 140, 0), 90, 90]))
    if part is None:
        return
    band = np.abs(c.z[part] - height - slope * (c.y[part] - 20)) < 5.5
    inside = c.is_organ(part, f"{side} lung") & band & (c.y[part] > -30) & ~_taken(c, part)
    if c.finding("atelectasis", part, inside, 15.0, side) >= 8:
        yield PhantomFinding("atelectasis", side, 0, f"{side} lower lobe")


def _paint_hernia(c: _Canvas, rng: np.random.Generator, hu: dict[str, float]) -> Iterator[PhantomFinding]:
    radius = float(rng.uniform(20, 29))
    part = c.ellipsoid((6, 28, 18), (radius, radius * 0.8, radius))
    if part is None:
        return
    box, inside = part
    inside &= ~c.is_organ(box, "spine", "aorta") & (c.organs[box] > 0)
    if c.finding("hiatal hernia", box, inside, 40.0, displaces_lung=True) >= 8:
        air = inside & (c.y[box] < 24)
        c.hu[box][air] = -900
        yield PhantomFinding("hiatal hernia", "", round(2 * radius))


def _paint_device(c: _Canvas, rng: np.random.Generator, hu: dict[str, float]) -> Iterator[PhantomFinding]:
    side, sign = _side(rng)
    part = c.ellipsoid((sign * 75, -88, 150), (22, 8, 20))
    painted = 0
    if part:
        box, inside = part
        inside &= c.organs[box] > 0
        painted += c.finding("medical material", box, inside, 2800.0, side)
    for step in range(22):  # the lead toward the heart
        t = step / 21
        place = (sign * 75 * (1 - t) + 10 * t, -80 + 52 * t, 150 - 100 * t)
        lead = c.ellipsoid(place, (3.2, 3.2, 4.5))
        if lead:
            painted += c.finding("medical material", lead[0], lead[1] & (c.organs[lead[0]] > 0), 2500.0, side)
    if painted >= 4:
        yield PhantomFinding("medical material", side)


def _paint_nodes(c: _Canvas, rng: np.random.Generator, hu: dict[str, float]) -> Iterator[PhantomFinding]:
    painted, largest = 0, 0.0
    for place in ((-22, 8, 108), (24, 4, 96), (-4, 30, 84), (-26, 12, 78)):
        size = float(rng.uniform(14, 26))
        part = c.ellipsoid(tuple(np.array(place) + rng.normal(0, 3, 3)), (size / 2, size / 2, size / 2))  # type: ignore[arg-type]
        if part:
            box, inside = part
            inside &= ~c.is_organ(box, "trachea", "aorta", "spine", "esophagus", "heart", "right lung", "left lung")
            inside &= ~_taken(c, box)
            count = c.finding("lymphadenopathy", box, inside & (c.organs[box] > 0), 45.0)
            painted += count
            largest = max(largest, size if count else 0.0)
    if painted >= 6:
        yield PhantomFinding("lymphadenopathy", "", round(largest))


def _paint_stone(c: _Canvas, rng: np.random.Generator, hu: dict[str, float]) -> Iterator[PhantomFinding]:
    side, sign = _side(rng)
    size = float(rng.uniform(9, 15))
    centre = -112 if side == "right" else -102
    part = c.ellipsoid((sign * 50, 48, centre + rng.uniform(-20, 20)), (size / 2,) * 3)
    if part is None:
        return
    box, inside = part
    inside &= c.is_organ(box, f"{side} kidney")
    if c.finding("kidney stone", box, inside, float(rng.uniform(700, 1200)), side) >= 3:
        yield PhantomFinding("kidney stone", side, round(size))


def _paint_lesion(c: _Canvas, rng: np.random.Generator, hu: dict[str, float]) -> Iterator[PhantomFinding]:
    for _ in range(int(rng.integers(1, 3))):
        size = float(rng.uniform(20, 42))
        place = (rng.uniform(-105, -35), rng.uniform(-35, 35), rng.uniform(-90, -35))
        part = c.ellipsoid(place, (size / 2,) * 3)
        if part is None:
            continue
        box, inside = part
        inside &= c.is_organ(box, "liver")
        if c.finding("liver lesion", box, inside, hu["liver"] - float(rng.uniform(42, 60))) >= 6:
            yield PhantomFinding("liver lesion", "right", round(size))


def _taken(c: _Canvas, box: tuple[slice, slice, slice]) -> np.ndarray:
    """What was lung and another finding already fills."""
    taken = np.zeros(c.organs[box].shape, bool)
    for name in ("lung nodule", "pleural effusion", "consolidation"):
        if name in c.finding_masks:
            taken |= c.finding_masks[name][box]
    return taken


_FINDING_PAINTERS = {
    "lung nodule": _paint_nodules,
    "pleural effusion": _paint_effusion,
    "consolidation": _paint_consolidation,
    "emphysema": _paint_emphysema,
    "cardiomegaly": _paint_cardiomegaly,
    "arterial wall calcification": _paint_calcification,
    "pericardial effusion": _paint_pericardial,
    "atelectasis": _paint_atelectasis,
    "hiatal hernia": _paint_hernia,
    "medical material": _paint_device,
    "lymphadenopathy": _paint_nodes,
    "kidney stone": _paint_stone,
    "liver lesion": _paint_lesion,
}


def _acquire(c: _Canvas, rng: np.random.Generator) -> None:
    """What the scanner does to it: partial volume, streaks from metal, noise with texture."""
    hu = c.hu
    for axis, n in enumerate(c.shape):
        if n > 2:
            front = [slice(None)] * 3
            back = [slice(None)] * 3
            middle = [slice(None)] * 3
            front[axis], back[axis], middle[axis] = slice(2, None), slice(None, -2), slice(1, -1)
            inner = hu[tuple(front)] + hu[tuple(back)]
            inner *= np.float32(0.2)
            inner += np.float32(0.6) * hu[tuple(middle)]
            hu[tuple(middle)] = inner
    metal = c.finding_masks.get("medical material")
    if metal is not None and metal.any():
        _streaks(c, metal, rng)
    sigma = float(rng.uniform(4, 24))
    noise = rng.standard_normal(c.shape, dtype=np.float32)
    for axis in (2, 1, 0):  # neighbours in plane share their noise, as after a smooth kernel
        if c.shape[axis] > 1:
            behind, ahead = [slice(None)] * 3, [slice(None)] * 3
            behind[axis], ahead[axis] = slice(None, -1), slice(1, None)
            noise[tuple(behind)] += np.float32(0.8 if axis else 0.4) * noise[tuple(ahead)]
    noise *= np.float32(sigma / max(float(noise[:1].std()), 1e-6))
    hu += noise
    np.clip(hu, -1024, 3071, out=hu)


def _streaks(c: _Canvas, metal: np.ndarray, rng: np.random.Generator) -> None:
    """Alternating dark and bright rays in the slices that metal lies in."""
    for depth in np.flatnonzero(metal.any(axis=(1, 2))):
        rows, columns = np.nonzero(metal[depth])
        row, column = rows.mean(), columns.mean()
        y = (np.arange(c.shape[1], dtype=np.float32) - row)[:, None]
        x = (np.arange(c.shape[2], dtype=np.float32) - column)[None, :]
        strength = min(len(rows) / 60, 1.0) * 130
        rays = np.cos(np.arctan2(y, x) * 14 + rng.uniform(0, 6)) * strength
        rays *= np.exp(-np.hypot(x, y) * np.float32(c.spacing[2] / 60))
        c.hu[depth] += np.where(metal[depth], 0, rays).astype(np.float32)


def _volume(c: _Canvas) -> CTVolume:
    """HU as a volume whose world is the scanner's, with the origin in its middle."""
    depth, height, width = c.spacing
    affine = np.diag([-width, -height, depth, 1.0])
    n = np.array([c.shape[2], c.shape[1], c.shape[0]])
    affine[:3, 3] = -affine[:3, :3] @ ((n - 1) / 2)
    source = VolumeSource(tuple(int(k) for k in n), affine, np.array([[0, 1], [1, 1], [2, 1]]), name="phantom")  # type: ignore[arg-type]
    return CTVolume(np.rint(c.hu).astype(np.int16), affine, source, [])


__all__ = ["FINDINGS", "ORGANS", "SIDED", "UNIONS", "Phantom", "make_phantom"]
