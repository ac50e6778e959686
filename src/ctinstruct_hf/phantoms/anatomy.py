"""Organs, bones, fat and vessels of a phantom, painted from the outside in, and table and clothes around the patient."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .canvas import Canvas
from .structures import ORGANS

# HU by contrast phase: native, arterial, portal venous; spread between patients
HU_BY_PHASE: dict[str, tuple[tuple[float, float, float], float]] = {
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


def paint_anatomy(c: Canvas, hu: dict[str, float], present: dict[str, int]) -> None:
    """Paint from the outside in: each structure lies inside the structures painted before."""
    rng = c.rng
    everything = (slice(None), slice(None), slice(None))
    fat_share = np.float32(rng.uniform(0.74, 0.92))
    wide, deep = 142.0 / float(fat_share), 96.0 / float(fat_share)  # more fat widens the trunk outside the wall
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
    _paint_chest(c, hu, present, breath)
    _abdomen(c, hu, breath, bowel, c.z < left_dome - 3)
    _vessels(c, hu)


def _surroundings(c: Canvas, chest: np.ndarray, deep: float) -> None:
    """Around the patient: a table, flat or hollow, of one or two shells with a mat on it, and clothes or a blanket, which
    may enclose air."""
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
    """Loops of bowel; in some patients wide with gas, close to the wall and to the domes."""

    def __init__(self, c: Canvas, fat: float) -> None:
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
        """Paint a loop inside `where` [D, H, W], with fat of `rim` mm around it; with probability `gas`, gas fills its
        front."""
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


def _back_muscles(c: Canvas, hu: dict[str, float], chest: np.ndarray) -> None:
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


def _bones(c: Canvas, hu: dict[str, float], chest: np.ndarray, fat_share: np.float32, deep: float) -> None:
    wall = (chest < (fat_share - np.float32(0.02)) ** 2) & (chest > (fat_share - np.float32(0.085)) ** 2)
    pitch, start = c.rng.uniform(26, 31), c.rng.uniform(0, 26)
    wall_voxels = np.flatnonzero(wall)
    x, y, z = c.x.ravel()[wall_voxels], c.y.ravel()[wall_voxels], c.z.ravel()[wall_voxels]
    slanted = z - np.float32(0.35) * (y - np.float32(60)) + np.float32(start)
    ring = np.abs(np.mod(slanted, np.float32(pitch)) - np.float32(pitch / 2)) < 6.5
    ribs = wall_voxels[ring & (z > -85) & (z < 210) & (np.abs(x) > 18)]
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
    plate = c.ellipsoid((0, -78, 100), (18, 8, 80))
    if plate:
        box, inside = plate
        c.organ("sternum", box, inside & (chest[box] < 1), hu["sternum"])


@dataclass(frozen=True)
class _Diaphragm:
    """Height and shape of the diaphragm.

    Attributes:
        rise: mm above its mean height; the organs under it move with it.
        across, along: curvature of a dome toward the wall and toward the back.
        edge: mm that it falls more at its edge, which leaves the lung a thin rim along the wall.
    """

    rise: float
    across: float
    along: float
    edge: float

    def height(self, x: np.ndarray | np.float32, y: np.ndarray | np.float32, side: float) -> np.ndarray:
        """Height in mm of the dome under a lung: higher on the right, falling toward the wall and the back."""
        top = self.rise + (14.0 if side < 0 else 4.0)
        x, y = np.square(x - np.float32(side * 70)), np.square(y + np.float32(15))
        at_edge = np.square(x * np.float32(1 / 60**2) + y * np.float32(1 / 85**2))
        return (
            np.float32(top)
            - np.float32(self.across) * x
            - np.float32(self.along) * y
            - np.float32(self.edge) * np.minimum(at_edge, 2)
        )


def _paint_chest(c: Canvas, hu: dict[str, float], present: dict[str, int], breath: _Diaphragm) -> None:
    rng = c.rng
    gravity, base = np.float32(rng.uniform(0.2, 1.2)), np.float32(rng.uniform(0, 150))
    for name, side in (("right lung", -1.0), ("left lung", 1.0)):
        # an ellipsoid above; below, it keeps its width down to the recesses around the dome
        centre, axes = np.array([side * 73, 2, 75]), np.array([63, 86, 128]) * rng.uniform(0.95, 1.05, 3)
        down = 1.2 * float(axes[2])
        box = c.box(centre - (axes[0], axes[1], down), centre + axes)
        if box:
            x, y, z = (
                (coordinate[box] - np.float32(middle)) / np.float32(axis)
                for coordinate, middle, axis in zip((c.x, c.y, c.z), centre, axes, strict=True)
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
        start = np.array([side * 35, 10, 60.0]) + rng.normal(0, 6, 3)
        direction = rng.normal(size=3)
        direction[0] = abs(direction[0]) * side
        radius = float(rng.uniform(1.5, 4.0))
        for _ in range(3):
            direction = direction / np.linalg.norm(direction)
            end = start + direction * rng.uniform(18, 32)
            vessel = c.tube(tuple(start), tuple(end), radius, radius * 0.72)
            if vessel:
                box, inside = vessel
                inside &= c.is_organ(box, "right lung", "left lung")
                c.hu[box][inside] = 30
            start, radius = end, radius * 0.72
            direction = direction + rng.normal(0, 0.3, 3)
    # the mediastinum between the lungs
    part = c.box(np.array([-40, -80, -20]), np.array([40, 70, 215]))
    if part:
        x, y = c.x[part], c.y[part]
        middle = (np.abs(x) < 30) & (y > -70) & (y < 62) & (c.z[part] > -5)
        middle &= ~c.is_organ(part, "spine", "sternum", "right lung", "left lung")
        c.organ("body", part, middle & (c.hu[part] > -400), -80.0)
    normal = rng.uniform(0.92, 1.05)  # always drawn, so that the rest of the anatomy does not depend on the finding
    size = np.float32(1.32 if present["cardiomegaly"] else normal)
    heart = c.ellipsoid((24 * float(size), -28, 34), (52 * float(size), 42 * float(size), 42 * float(size)))
    c.heart_size = float(size)
    if heart:
        box, inside = heart
        c.organ("heart", box, inside & ~c.is_organ(box, "sternum", "spine", "ribs"), hu["heart"])
    part = c.box(np.array([-14, 0, 88]), np.array([14, 34, 400]))
    if part:
        inside = np.square(c.x[part] / 10) + np.square((c.y[part] - 16) / 9) < 1
        inside &= c.z[part] > 98
        c.organ("trachea", part, inside, hu["trachea"])
    for side in (-1.0, 1.0):
        for step in range(6):
            bronchus = c.ellipsoid((side * (5 + 7 * step), 16 + step, 98 - 6.0 * step), (6.5, 6, 6))
            if bronchus:
                box, inside = bronchus
                c.organ("trachea", box, inside, hu["trachea"])
    part = c.box(np.array([-8, 24, -60]), np.array([16, 50, 220]))
    if part:
        inside = np.square((c.x[part] - 4) / 9) + np.square((c.y[part] - 37) / np.float32(6.5)) < 1
        inside &= (c.z[part] > -35) & (c.z[part] < 205)
        c.organ("esophagus", part, inside & ~c.is_organ(part, "spine"), hu["esophagus"])


def _abdomen(c: Canvas, hu: dict[str, float], breath: _Diaphragm, bowel: _Bowel, under_left_dome: np.ndarray) -> None:
    rng = c.rng
    rim = float(rng.uniform(2.5, 7.0))  # mm of fat around each organ; the lean have little

    def organ(
        name: str, centre: tuple[float, float, float], axes: tuple[float, float, float], side: float = 0.0
    ) -> None:
        middle = np.array(centre) + rng.normal(0, 3, 3)
        half = np.array(axes) * rng.uniform(0.92, 1.08)
        spared = ["ribs", "spine", "subcutaneous fat", "right lung", "left lung", "heart"]
        for what, more, level, kept in (("body", rim, hu["inner fat"], [*spared, name]), (name, 0, hu[name], spared)):
            part = c.ellipsoid(tuple(middle), tuple(half + more))
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


def _left_flexure(c: Canvas, breath: _Diaphragm, bowel: _Bowel, under_dome: np.ndarray, rim: float) -> None:
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


def _vessels(c: Canvas, hu: dict[str, float]) -> None:
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
