"""Phantoms by kind and seed: the shapes, fields of view and levels that data sets are made of."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ..errors import CTInstructError
from .phantom import Phantom, make_phantom
from .structures import FINDINGS

SLICE_KINDS = ("slice", "focus")
# the findings at whose level slices of `focus` lie, in turn: small or pale findings more often; None for a random level
_FOCUS: tuple[str | None, ...] = (
    *FINDINGS, *["lung nodule"] * 2, *["lymphadenopathy"] * 3, *["liver lesion"] * 7, *[None] * 3
)  # fmt: skip
KINDS = ("trunk", "cropped", "whole", *SLICE_KINDS)


@dataclass(frozen=True)
class PhantomRef:
    """A made-up scan by kind and seed, written `phantom:trunk:12`, or `phantom:trunk:12:-lung nodule` without a finding.

    `trunk` is 64 x 128 x 128 voxels of the whole chest and upper abdomen, `cropped` 32 x 128 x 128 of any part of it,
    `whole` 128 x 160 x 160, `slice` an axial slice of 128 x 128 at a random level, `focus` a slice at the level of a finding,
    which is present in two slices of three; see `_FOCUS` for how often each finding is chosen.
    """

    kind: str
    seed: int
    changes: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        parts = [f"{'+' if there else '-'}{name}" for name, there in self.changes]
        return ":".join(["phantom", self.kind, str(self.seed), *parts])

    @classmethod
    def parse(cls, text: str) -> PhantomRef:
        parts = text.split(":")
        names = [part[1:] for part in parts[3:]]
        if len(parts) < 3 or parts[1] not in KINDS or not parts[2].isdigit() or not set(names) <= set(FINDINGS):
            raise CTInstructError(f"'{text}' is no made-up scan: write phantom:<{'|'.join(KINDS)}>:<seed>.")
        return cls(parts[1], int(parts[2]), tuple((part[1:], int(part[0] == "+")) for part in parts[3:]))

    def make(self) -> Phantom:
        """The scan; field of view and spacing are drawn from the seed too."""
        rng = np.random.default_rng([self.seed, 77])
        changes = dict(self.changes)
        if self.kind == "whole":
            return make_phantom(self.seed, findings=changes)
        field = rng.uniform(330, 420)
        if self.kind in SLICE_KINDS:
            spacing = (5.0, field / 128, field / 128)
            turn, index = divmod(self.seed, len(_FOCUS))
            through = _FOCUS[index] if self.kind == "focus" else None
            if through is not None:
                changes = {through: int(turn % 3 > 0), **changes}
            return make_phantom(self.seed, (1, 128, 128), spacing, kind="slice", findings=changes, through=through)
        if self.kind == "cropped":
            field = rng.uniform(300, 420)
            return make_phantom(
                self.seed, (32, 128, 128), (rng.uniform(2.2, 4.0), field / 128, field / 128), findings=changes
            )
        length = rng.uniform(300, 350)
        return make_phantom(self.seed, (64, 128, 128), (length / 64, field / 128, field / 128), findings=changes)


@lru_cache(maxsize=4)
def phantom_of(path: str) -> Phantom:
    """The made-up scan of a reference, kept while its masks are asked for."""
    return PhantomRef.parse(path).make()
