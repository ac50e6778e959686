"""The findings of a phantom, each painted into the anatomy with its own random generator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .anatomy import HU_BY_PHASE
from .canvas import Canvas
from .structures import FINDINGS
from .wording import PhantomFinding


def _lung_point(c: Canvas, rng: np.random.Generator, side: float) -> tuple[float, float, float]:
    return side * rng.uniform(45, 100), rng.uniform(-40, 50), rng.uniform(30, 150)


def _side(rng: np.random.Generator) -> tuple[str, float]:
    return ("right", -1.0) if rng.random() < 0.5 else ("left", 1.0)


def _lobe(side: str, z: float) -> str:
    if z > 95:
        return f"{side} upper lobe"
    return f"{side} middle lobe" if side == "right" and z > 60 else f"{side} lower lobe"


def _paint_nodules(c: Canvas, rng: np.random.Generator, hu: dict[str, float]) -> Iterator[PhantomFinding]:
    for _ in range(int(rng.integers(1, 4))):
        side, sign = _side(rng)
        centre = _lung_point(c, rng, sign)
        diameter = float(rng.uniform(10, 26))
        part = c.ellipsoid(centre, (diameter / 2,) * 3)
        if part is None:
            continue
        box, inside = part
        inside &= c.is_organ(box, f"{side} lung")
        if c.finding("lung nodule", box, inside, float(rng.uniform(10, 60))) >= 4:
            yield PhantomFinding("lung nodule", side, round(diameter), _lobe(side, centre[2]))


def _paint_effusion(c: Canvas, rng: np.random.Generator, hu: dict[str, float]) -> Iterator[PhantomFinding]:
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


def _paint_consolidation(c: Canvas, rng: np.random.Generator, hu: dict[str, float]) -> Iterator[PhantomFinding]:
    side, sign = _side(rng)
    centre = _lung_point(c, rng, sign)
    part = c.ellipsoid(centre, rng.uniform(22, 36, 3))
    if part is None:
        return
    box, inside = part
    inside &= c.is_organ(box, f"{side} lung") & ~_taken(c, box)
    if c.finding("consolidation", box, inside, 30.0, side) >= 8:
        for step in range(4):  # air bronchograms
            tube = c.ellipsoid((centre[0] + sign * step * 6, centre[1], centre[2] - step * 4), (5, 3, 3))
            if tube:
                c.hu[tube[0]][tube[1] & c.finding_masks["consolidation"][tube[0]]] = -700
        yield PhantomFinding("consolidation", side, 0, _lobe(side, centre[2]))


def _paint_emphysema(c: Canvas, rng: np.random.Generator, hu: dict[str, float]) -> Iterator[PhantomFinding]:
    painted = 0
    for _ in range(46):
        sign = rng.choice([-1.0, 1.0])
        centre = (sign * rng.uniform(35, 110), rng.uniform(-60, 60), rng.uniform(90, 185))
        part = c.ellipsoid(centre, rng.uniform(7, 15, 3))
        if part:
            box, inside = part
            inside &= c.is_organ(box, "right lung", "left lung") & ~_taken(c, box)
            painted += c.finding("emphysema", box, inside, -985.0)
    if painted >= 8:
        yield PhantomFinding("emphysema", "both", 0, "upper lobes")


def _paint_cardiomegaly(c: Canvas, rng: np.random.Generator, hu: dict[str, float]) -> Iterator[PhantomFinding]:
    everything = (slice(None), slice(None), slice(None))
    if c.finding("cardiomegaly", everything, c.is_organ(everything, "heart"), None) >= 8:
        yield PhantomFinding("cardiomegaly")


def _paint_calcification(c: Canvas, rng: np.random.Generator, hu: dict[str, float]) -> Iterator[PhantomFinding]:
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


def _paint_pericardial(c: Canvas, rng: np.random.Generator, hu: dict[str, float]) -> Iterator[PhantomFinding]:
    size = c.heart_size
    width = float(rng.uniform(9, 15))
    part = c.ellipsoid((24 * size, -28, 34), (52 * size + width, 42 * size + width, 42 * size + width))
    if part is None:
        return
    box, inside = part
    inside &= ~c.is_organ(box, "heart", "aorta", "sternum", "ribs", "spine", "esophagus", "trachea", "liver", "stomach")
    inside &= (c.organs[box] > 0) & (c.z[box] > -10)
    if c.finding("pericardial effusion", box, inside, 12.0, displaces_lung=True) >= 8:
        yield PhantomFinding("pericardial effusion", "", round(width))


def _paint_atelectasis(c: Canvas, rng: np.random.Generator, hu: dict[str, float]) -> Iterator[PhantomFinding]:
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


def _paint_hernia(c: Canvas, rng: np.random.Generator, hu: dict[str, float]) -> Iterator[PhantomFinding]:
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


def _paint_device(c: Canvas, rng: np.random.Generator, hu: dict[str, float]) -> Iterator[PhantomFinding]:
    side, sign = _side(rng)
    part = c.ellipsoid((sign * 75, -88, 150), (22, 8, 20))
    painted = 0
    if part:
        box, inside = part
        inside &= c.organs[box] > 0
        painted += c.finding("medical material", box, inside, 2800.0, side)
    for step in range(22):  # the lead toward the heart
        t = step / 21
        centre = (sign * 75 * (1 - t) + 10 * t, -80 + 52 * t, 150 - 100 * t)
        lead = c.ellipsoid(centre, (3.2, 3.2, 4.5))
        if lead:
            painted += c.finding("medical material", lead[0], lead[1] & (c.organs[lead[0]] > 0), 2500.0, side)
    if painted >= 4:
        yield PhantomFinding("medical material", side)


def _paint_nodes(c: Canvas, rng: np.random.Generator, hu: dict[str, float]) -> Iterator[PhantomFinding]:
    painted, largest = 0, 0.0
    for centre in ((-22, 8, 108), (24, 4, 96), (-4, 30, 84), (-26, 12, 78)):
        size = float(rng.uniform(14, 26))
        part = c.ellipsoid(np.array(centre) + rng.normal(0, 3, 3), (size / 2,) * 3)
        if part:
            box, inside = part
            inside &= ~c.is_organ(box, "trachea", "aorta", "spine", "esophagus", "heart", "right lung", "left lung")
            inside &= ~_taken(c, box)
            count = c.finding("lymphadenopathy", box, inside & (c.organs[box] > 0), 45.0)
            painted += count
            largest = max(largest, size if count else 0.0)
    if painted >= 6:
        yield PhantomFinding("lymphadenopathy", "", round(largest))


def _paint_stone(c: Canvas, rng: np.random.Generator, hu: dict[str, float]) -> Iterator[PhantomFinding]:
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


def _paint_lesion(c: Canvas, rng: np.random.Generator, hu: dict[str, float]) -> Iterator[PhantomFinding]:
    for _ in range(int(rng.integers(1, 3))):
        size = float(rng.uniform(20, 42))
        centre = (rng.uniform(-105, -35), rng.uniform(-35, 35), rng.uniform(-90, -35))
        part = c.ellipsoid(centre, (size / 2,) * 3)
        if part is None:
            continue
        box, inside = part
        inside &= c.is_organ(box, "liver")
        if c.finding("liver lesion", box, inside, hu["liver"] - float(rng.uniform(42, 60))) >= 6:
            yield PhantomFinding("liver lesion", "right", round(size))


def _taken(c: Canvas, box: tuple[slice, slice, slice]) -> np.ndarray:
    """bool: voxels of the box that another finding of the lung fills already."""
    taken = np.zeros(c.organs[box].shape, bool)
    for name in ("lung nodule", "pleural effusion", "consolidation"):
        if name in c.finding_masks:
            taken |= c.finding_masks[name][box]
    return taken


PAINTERS = {
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


class _Plan:
    """Stands in for a canvas to record the level of a finding; paints nothing."""

    heart_size = 1.0

    def __init__(self) -> None:
        self.levels: list[float] = []

    def ellipsoid(self, centre: Sequence[float] | np.ndarray, axes: Sequence[float] | np.ndarray) -> None:
        self.levels.append(float(centre[2]))

    def box(self, low: np.ndarray, high: np.ndarray) -> None:
        self.levels.append(float(low[2] + high[2]) / 2)

    def is_organ(self, box: tuple[slice, slice, slice], *names: str) -> np.ndarray:
        return np.zeros(0, bool)

    def finding(
        self, name: str, box: object, inside: object, hu: object, side: str = "", displaces_lung: bool = False
    ) -> int:
        return 0


def level_of(name: str, seed: int) -> float:
    """Height in mm at which the phantom of a seed has a finding, or would have it."""
    plan: Any = _Plan()
    rng = np.random.default_rng([seed, 4])
    painter_rng = np.random.default_rng([seed, 1, FINDINGS.index(name)])
    for _ in PAINTERS[name](plan, painter_rng, dict.fromkeys(HU_BY_PHASE, 0.0)):
        pass
    levels = plan.levels or [34.0 + rng.normal(0, 20)]  # of the heart
    if name in ("lung nodule", "liver lesion"):
        levels = levels[:1]  # a painted finding draws a further random number, which moves the later ones
    return float(rng.choice(levels)) + float(rng.normal(0, 3))
