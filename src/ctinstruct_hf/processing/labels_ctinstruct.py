"""The processor's batch, whose labels never hold an image or vision token."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers.feature_extraction_utils import BatchFeature


class CTInstructBatch(BatchFeature):
    """A batch of `CTInstructProcessor`.

    `labels` that a collator adds (`batch["labels"] = batch["input_ids"].clone()`, as TRL's does) are −100 at the tokens of
    `vision_token_ids`: these are never written, and a trainer may compute its loss without the model's `forward`.
    """

    vision_token_ids: tuple[int, ...] = ()

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, without_tokens(value, self.vision_token_ids) if name == "labels" else value)


def without_tokens(labels: Any, ids: tuple[int, ...]) -> Any:
    """`labels`, a tensor, an array or (nested) lists, with −100 in place of `ids`."""
    if isinstance(labels, torch.Tensor):
        return labels.masked_fill(torch.isin(labels, torch.tensor(ids, dtype=labels.dtype, device=labels.device)), -100)
    if isinstance(labels, np.ndarray):
        return np.where(np.isin(labels, ids), -100, labels)
    if isinstance(labels, list | tuple):
        return [without_tokens(part, ids) for part in labels]
    return -100 if labels in ids else labels
