"""Image-text retrieval over a pool (section 4.1): IR@k finds the image of a text, TR@k the text of an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import CTInstructError


def recall_at_k(
    image_features: Any, text_features: Any, k: Sequence[int] = (5, 10), pool: int | None = None, seed: int = 0
) -> dict[str, float]:
    """Recall among the k most similar, in 0…1; pair i is row i of both.

    Args:
        image_features, text_features: [N, D], normalised or not; array or tensor.
        k: at which ranks.
        pool: compare within pools of this size (the paper's is 200), drawn by `seed`, and average; the whole by default.

    Returns:
        {"ir@5", "tr@5", …}. Among equal similarities the right pair ranks last, so that constant features score 0.

    Raises:
        CTInstructError: for features that do not fit each other or are not finite.
    """
    images, texts = _rows(image_features, "image_features"), _rows(text_features, "text_features")
    if images.shape != texts.shape:
        raise CTInstructError(
            f"image_features has shape {images.shape}, text_features {texts.shape}: they must be equal."
        )
    images = images / np.maximum(np.linalg.norm(images, axis=1, keepdims=True), 1e-12)
    texts = texts / np.maximum(np.linalg.norm(texts, axis=1, keepdims=True), 1e-12)
    order = np.arange(len(images))
    if pool is not None and pool < len(images):
        order = np.random.default_rng(seed).permutation(len(images))
    size = min(pool or len(images), len(images))
    groups = [order[start : start + size] for start in range(0, len(order) - size + 1, size)]
    ranks: dict[str, list[np.ndarray]] = {"ir": [], "tr": []}
    for group in groups:
        scores = texts[group] @ images[group].T  # [texts, images]
        ranks["ir"].append(_rank_of_diagonal(scores))
        ranks["tr"].append(_rank_of_diagonal(scores.T))
    return {f"{name}@{top}": float((np.concatenate(rank) < top).mean()) for name, rank in ranks.items() for top in k}


def _rows(features: Any, name: str) -> np.ndarray:
    array = np.asarray(features.detach().float().cpu() if hasattr(features, "detach") else features, dtype=np.float64)
    if array.ndim != 2 or not len(array) or not np.isfinite(array).all():
        raise CTInstructError(f"{name} must be [N, D] of finite numbers, N at least 1.")
    return array


def _rank_of_diagonal(scores: np.ndarray) -> np.ndarray:
    """int [N]: how many others in the row score at least as high as the diagonal of scores [N, N]."""
    return (scores >= np.diagonal(scores)[:, None]).sum(axis=1) - 1
