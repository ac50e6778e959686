"""What a frozen tower makes of each image, computed once and kept, so that training the language model costs words only."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..data.samples import ImageRef
from ..data.store import PatchStore, Prepared
from ..files import whole_file


class TokenStore:
    """The tower's tokens of images: {tokens float16 [N, D], patch_grid int64 [1, 4]}.

    Args:
        store: gives the patches, and the folder.
        tower: the frozen tower; its weights are part of every file's key.
    """

    def __init__(self, store: PatchStore, tower: Any) -> None:
        self.store, self.tower = store, tower
        digest = hashlib.sha256()
        for name, weight in sorted(tower.state_dict().items()):
            digest.update(name.encode())
            digest.update(weight.detach().cpu().float().numpy().tobytes())
        self.folder = Path(store.folder or ".") / f"tokens-{digest.hexdigest()[:16]}"
        self._kept: dict[str, Prepared] = {}

    def image(self, image: ImageRef) -> Prepared:
        """Tokens of an image that `fill` has seen; of another one they are computed now."""
        key = self.store._key(image)
        if key not in self._kept:
            path = self._path(key)
            if not path.exists():
                self._make(image, path)
            with safe_open(path, framework="pt") as file:
                self._kept[key] = {name: file.get_tensor(name) for name in ("tokens", "patch_grid")}
        return self._kept[key]

    def fill(self, images: Iterable[ImageRef], tell: Callable[[str], None] = lambda step: None) -> None:
        """Compute what is missing, before workers are started that have no tower."""
        unique = {self.store._key(image): image for image in images}
        missing = [(key, image) for key, image in unique.items() if not self._path(key).exists()]
        for number, (key, image) in enumerate(missing, start=1):
            tell(f"tower {number}/{len(missing)}")
            self._make(image, self._path(key))

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    @torch.inference_mode()
    def _make(self, image: ImageRef, path: Path) -> None:
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
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = {"tokens": features.last_hidden_state.half().cpu().contiguous(), "patch_grid": prepared["patch_grid"]}
        with whole_file(path) as temporary:
            save_file(kept, temporary)
