"""A safetensors file written tensor by tensor."""

from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path
from typing import Any

import torch

from ...errors import CTInstructError

# as safetensors names them
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}
Layout = dict[str, tuple[str, tuple[int, ...]]]  # name -> dtype and shape


def bytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * DTYPES[dtype].itemsize


class ShardWriter:
    """A safetensors file written tensor by tensor: the header first, then each tensor's bytes, never two at once."""

    def __init__(self, path: Path, layout: Layout) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, (dtype, shape) in layout.items():
            size = bytes_of(dtype, shape)
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
        packed = json.dumps(header, separators=(",", ":")).encode()
        packed += b" " * (-len(packed) % 8)
        self.size = offset
        self.layout = dict(layout)
        self.file = open(path, "wb")  # noqa: SIM115 -- closed by close()
        self.file.write(struct.pack("<Q", len(packed)) + packed)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """The next tensor, which must be the next one of the layout."""
        expected = next(iter(self.layout), None)
        if expected != name or self.layout[name] != (CODES[tensor.dtype], tuple(tensor.shape)):
            raise CTInstructError(f"'{name}' is written out of order or in another shape.")
        del self.layout[name]
        flat = tensor.contiguous().view(-1)
        if flat.numel():
            self.file.write(flat.view(torch.uint8).numpy().data)

    def close(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
