"""The masks of an open study, packed: a chest has 30 to 130 million voxels, and a client may ask for any number of names."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass

import numpy as np

from ..errors import CTInstructError
from .limits import Limits


class Full(CTInstructError):
    """A study has as many masks as it may have."""


@dataclass(frozen=True, eq=False)
class _Packed:
    shape: tuple[int, ...]
    bits: bytes


class PackedMasks(MutableMapping[str, np.ndarray]):
    """Masks by name as compressed bits; each is unpacked when it is asked for.

    Args:
        limits: how many (`structures`) and how many bytes packed (`mask_bytes`).
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._masks: dict[str, _Packed] = {}

    @property
    def bytes(self) -> int:
        """Memory of all of them."""
        return sum(len(one.bits) for one in self._masks.values())

    def versions(self) -> list[tuple[str, object]]:
        """Each name with an object that is equal only as long as its mask is the same."""
        return [(name, one) for name, one in list(self._masks.items())]

    def check(self, names: list[str]) -> None:
        """Raises Full where masks of these names too would be more than a study may have."""
        known, new = len(self._masks), len(set(names) - self._masks.keys())
        most = self.limits.structures
        if new and known + new > most:
            raise Full(
                f"A study may have {most} masks and this one has {known}: ask for {most - known} or fewer new names, or "
                "open the scan again."
            )

    def __setitem__(self, name: str, mask: np.ndarray) -> None:
        self.check([name])
        packed = _Packed(mask.shape, zlib.compress(np.packbits(mask).tobytes(), 1))
        replaced = self._masks.get(name)
        total = self.bytes - (len(replaced.bits) if replaced else 0) + len(packed.bits)
        if total > self.limits.mask_bytes:
            raise Full(
                f"The masks of a study may take {self.limits.mask_bytes / 2**20:.3g} MiB packed, and with {name} they "
                "would take more: open the scan again for further ones."
            )
        self._masks[name] = packed

    def __getitem__(self, name: str) -> np.ndarray:
        one = self._masks[name]
        bits = np.frombuffer(zlib.decompress(one.bits), np.uint8)
        return np.unpackbits(bits, count=int(np.prod(one.shape))).view(bool).reshape(one.shape)

    def __delitem__(self, name: str) -> None:
        del self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __contains__(self, name: object) -> bool:
        return name in self._masks


__all__ = ["Full", "PackedMasks"]
