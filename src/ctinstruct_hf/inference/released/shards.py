"""Safetensors files of a bounded size, and their index, written tensor by tensor."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..folders import INDEX

# as safetensors names them
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}
_SHARD_BYTES = 10**9  # in memory at once, and a further tensor


@dataclass(frozen=True)
class Packer:
    """How weights are quantised.

    Attributes:
        pack: (name, weight) -> the (name, tensor) pairs that are stored.
        settings: `quantization_config` of the model's config.
    """

    pack: Callable[[str, torch.Tensor], Iterable[tuple[str, torch.Tensor]]]
    settings: dict[str, Any]


def as_it_is(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    yield name, tensor


class Writer:
    """Writes a folder's shards, each when it is full, and their index.

    Args:
        folder: to write to.
        pack: see `Packer.pack`.
    """

    def __init__(
        self,
        folder: Path,
        pack: Callable[[str, torch.Tensor], Iterable[tuple[str, torch.Tensor]]] = as_it_is,
    ) -> None:
        self.folder, self.pack = folder, pack
        self.shards: list[tuple[Path, list[str]]] = []
        self.total = self.waiting_bytes = 0
        self.waiting: dict[str, torch.Tensor] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        for part, value in self.pack(name, tensor):
            if self.waiting_bytes + value.nbytes > _SHARD_BYTES:
                self.flush()
            self.waiting[part] = value
            self.waiting_bytes += value.nbytes

    def flush(self) -> None:
        if not self.waiting:
            return
        path = self.folder / f"model-{len(self.shards) + 1:05d}.safetensors"
        write_shard(path, self.waiting)
        self.shards.append((path, list(self.waiting)))
        self.total += self.waiting_bytes
        self.waiting, self.waiting_bytes = {}, 0

    def close(self) -> None:
        """Write the rest and the index."""
        self.flush()
        weight_map: dict[str, str] = {}
        for path, names in self.shards:
            final = path.with_name(f"{path.stem}-of-{len(self.shards):05d}.safetensors")
            os.replace(path, final)
            weight_map.update(dict.fromkeys(names, final.name))
        index = {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(weight_map.items()))}
        (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_shard(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A safetensors file, without a second copy of its tensors in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        header[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    packed = json.dumps(header, separators=(",", ":")).encode()
    packed += b" " * (-len(packed) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(packed)) + packed)
        for tensor in tensors.values():
            flat = tensor.contiguous().view(-1)
            if flat.numel():
                file.write(flat.view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
