"""What a frozen tower makes of each image, computed once and kept, so that training the language model costs words only."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ...data.samples import ImageRef
from ...data.store import PatchStore, Prepared, place_of, read_or_make


class TokenStore:
    """The tower's tokens of images: {tokens float16 [N, D], patch_grid int64 [1, 4]}.

    Args:
        store: gives the patches, and the folder; without one, tokens are kept in memory.
        tower: the frozen tower; its weights are part of every file's key.
    """

    def __init__(self, store: PatchStore, tower: Any) -> None:
        self.store, self.tower = store, tower
        digest = hashlib.sha256()
        for name, weight in sorted(tower.state_dict().items()):
            digest.update(name.encode())
            digest.update(weight.detach().cpu().float().numpy().tobytes())
        self.folder = None if store.folder is None else store.folder / f"tokens-{digest.hexdigest()[:16]}"
        self._kept: dict[str, Prepared] = {}

    def image(self, image: ImageRef) -> Prepared:
        """Tokens of an image that `fill` has seen; of another one they are computed now."""
        key = self.store.key(image)
        if key not in self._kept:
            self._kept[key] = self._read(key, image)
        return self._kept[key]

    def fill(self, images: Iterable[ImageRef], progress: Callable[[str], None] = lambda step: None) -> None:
        """Compute what is missing, before workers are started that have no tower."""
        unique = {self.store.key(image): image for image in images}
        missing = {key: image for key, image in unique.items() if not self._has(key)}
        for number, (key, image) in enumerate(missing.items(), start=1):
            progress(f"tower {number}/{len(missing)}")
            made = self._read(key, image)
            if self.folder is None:
                self._kept[key] = made

    def _has(self, key: str) -> bool:
        return key in self._kept or (self.folder is not None and place_of(self.folder, key).exists())

    def _read(self, key: str, image: ImageRef) -> Prepared:
        if self.folder is None:
            return self._make(image)
        return read_or_make(place_of(self.folder, key), lambda: self._make(image))

    @torch.no_grad()
    def _make(self, image: ImageRef) -> Prepared:
        prepared = self.store.image(image)
        device = next(self.tower.parameters()).device
        training = self.tower.training
        self.tower.eval()
        features = self.tower(
            prepared["pixel_values"].float().to(device),
            prepared["patch_grid"],
            prepared["slice_mask"].to(device),
            return_dict=True,
        )
        self.tower.train(training)
        return {"tokens": features.last_hidden_state.half().cpu(), "patch_grid": prepared["patch_grid"]}
