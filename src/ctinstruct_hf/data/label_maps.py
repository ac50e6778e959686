"""Several label files of one image as one map: a code for each combination of their labels that occurs.

A hundred binary files, as TotalSegmentator has them, take the room of one. A map is {codes: int8 [D, H, W], −1 = padding; table:
int8 [files, codes], the label that each file has where a code is; files: uint8 [files, 16], which they are}.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

Map = dict[str, torch.Tensor]
MOST = 127  # codes of a map


def has_labels(shared: Map, key: str) -> bool:
    """Whether the file of this key is in a map."""
    return _row_of(shared, key) is not None


def labels_in(shared: Map, key: str) -> torch.Tensor:
    """The labels of one of its files, as they were put in."""
    row = _row_of(shared, key)
    assert row is not None
    table = np.full(256, -1, np.int8)  # by the byte of a code; padding stays
    table[: shared["table"].shape[1]] = shared["table"][row].numpy()
    return torch.from_numpy(table[shared["codes"].numpy().view(np.uint8)])


def with_labels(shared: Map | None, labels: torch.Tensor, key: str) -> Map | None:
    """A map with one more file, int8 [D, H, W] with labels from 0 and −1 for padding; None where it cannot tell all apart."""
    new = labels.numpy()
    inside = new >= 0
    if shared is None:
        codes = np.where(inside, 0, -1).astype(np.int8)
        shared = {"codes": torch.from_numpy(codes), "table": torch.zeros(0, 1, dtype=torch.int8),
                  "files": torch.zeros(0, 16, dtype=torch.uint8)}  # fmt: skip
    before = shared["codes"].numpy()[inside].astype(np.int32)
    pairs = before * (MOST + 1) + new[inside]
    found = np.flatnonzero(np.bincount(pairs, minlength=1))
    if len(found) > MOST:
        return None
    code = np.zeros(int(found.max(initial=0)) + 1, np.int8)
    code[found] = np.arange(len(found))
    codes = np.full(new.shape, -1, np.int8)
    codes[inside] = code[pairs]
    old, own = np.divmod(found, MOST + 1)
    table = np.concatenate([shared["table"].numpy()[:, old], own[None].astype(np.int8)])
    files = np.concatenate([shared["files"].numpy(), _digest(key)[None]])
    return {"codes": torch.from_numpy(codes), "table": torch.from_numpy(table), "files": torch.from_numpy(files)}


def _digest(key: str) -> np.ndarray:
    return np.frombuffer(hashlib.blake2b(key.encode(), digest_size=16).digest(), np.uint8)


def _row_of(shared: Map, key: str) -> int | None:
    rows = np.flatnonzero((shared["files"].numpy() == _digest(key)).all(axis=1))
    return int(rows[0]) if len(rows) else None


__all__ = ["has_labels", "labels_in", "with_labels"]
