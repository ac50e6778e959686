"""In which numbers a model is loaded, and whether it fits: device, dtype, quantisation."""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import CTInstructError

logger = logging.getLogger(__name__)
DTYPES = ("float32", "bfloat16", "float16")
QUANTIZATIONS = {"int8": 8, "int4": 4}  # -> bits
_LARGE = 10**9  # parameters from which on a model is not loaded in float32 by itself
_QUANTIZED = re.compile(r"(model\.)?language_model\.layers\.\d+\..*\.weight")
# of a weight in 4 bits: its own half byte, and a float32 for 64 of them; in 8 bits a float32 for each row
_BYTES = {"int8": 1.01, "int4": 0.5 + 4 / 64}
_WORK = 1.5e9  # bytes beside the weights: libraries, a scan, maps of the tower, keys and values


@dataclass(frozen=True)
class Precision:
    """How to load a model.

    Attributes:
        device: where.
        dtype: of what is not quantised.
        quantization_config: of Transformers; None for none.
        note: what was chosen by itself, for the log.
    """

    device: torch.device
    dtype: torch.dtype
    quantization_config: Any = None
    note: str | None = None

    def loading(self) -> dict[str, Any]:
        """Arguments of `from_pretrained`. With a `device_map` nothing is on the CPU before it is on a GPU."""
        options: dict[str, Any] = {"dtype": self.dtype}
        if self.quantization_config is not None:
            options["quantization_config"] = self.quantization_config
        if self.device.type != "cpu":
            options["device_map"] = {"": self.device}
        return options

    def cast(self, model: torch.nn.Module) -> None:
        """Give the parts of a quantised folder that are in full this dtype, which `from_pretrained` leaves as they were saved."""
        for value in (*model.parameters(), *model.buffers()):
            if value.is_floating_point() and value.dtype != self.dtype:
                value.data = value.data.to(self.dtype)


def choose_precision(
    name: str,
    shapes: Mapping[str, tuple[int, ...]],
    device: str | None,
    dtype: str | None,
    quantize: str | None = None,
    quantized_by: Mapping[str, Any] | None = None,
) -> Precision:
    """How to load a model.

    Args:
        name: of the model, for messages.
        shapes: of its tensors by name.
        device: cpu, cuda, cuda:1, mps …; cuda where there is one.
        dtype: float32, bfloat16, float16, or auto: on a CPU that multiplies bfloat16 in tiles (AMX) that, else float32 for models
            below a billion parameters. None is float32 for those on a CPU, and auto for others; on a GPU both are bfloat16.
        quantize: int8 or int4.
        quantized_by: the settings in the model's own config, where it is quantised already.

    Raises:
        CTInstructError: for a device, dtype or quantisation that is not to be had, and where the model does not fit.
    """
    target = find_device(device)
    large = sum(math.prod(shape) for shape in shapes.values()) >= _LARGE or quantized_by is not None
    if dtype not in (None, "auto", *DTYPES):
        raise CTInstructError(f"dtype is '{dtype}': use {', '.join(DTYPES)} or auto.")
    if dtype in DTYPES:
        chosen = str(dtype)
    elif target.type != "cpu" or large or (dtype == "auto" and has_amx()):
        chosen = "bfloat16"
    else:
        chosen = "float32"
    numbers = getattr(torch, chosen)
    config = None if quantize is None else quantization_of(quantize, target, name, quantized_by)
    if quantized_by is None:
        check_memory(name, shapes, target, numbers, quantize)
    size = f"{memory_of(shapes, numbers, quantize) / 1e9:.1f} GB"
    note = (
        f"{name} is loaded in {quantize or chosen}, {size}."
        if large and dtype is None and quantized_by is None
        else None
    )
    return Precision(target, numbers, config, note)


def find_device(name: str | None) -> torch.device:
    """A device by its name; a GPU where there is one.

    Raises:
        CTInstructError: where it cannot be used.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CTInstructError(f"device '{name}' cannot be used here: {str(error).splitlines()[0]}") from error
    return device


@functools.cache
def has_amx() -> bool:
    """Whether this CPU multiplies bfloat16 in tiles: without, it is slower in bfloat16 than in float32."""
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


def quantization_of(
    quantize: str, device: torch.device, name: str = "The model", quantized_by: Mapping[str, Any] | None = None
) -> Any:
    """The settings of bitsandbytes for int8 or int4 on a device.

    Raises:
        CTInstructError: for another name, a device that it does not know, a model that is quantised already, and where the library
            is missing.
    """
    if quantize not in QUANTIZATIONS:
        raise CTInstructError(f"quantize is '{quantize}': use {' or '.join(QUANTIZATIONS)}.")
    if quantized_by is not None:
        method = quantized_by.get("quant_method", "some library")
        raise CTInstructError(
            f"{name} is quantised already (by {getattr(method, 'value', method)}): leave --quantize out."
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise CTInstructError("--quantize needs bitsandbytes: pip install 'ctinstruct-hf[quantize]'.")
    import bitsandbytes
    from transformers import BitsAndBytesConfig

    if device.type not in bitsandbytes.supported_torch_devices:
        raise CTInstructError(
            f"bitsandbytes cannot compute {quantize} on {device.type}: leave --quantize out, or use --device cpu or cuda."
        )
    if quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    # without AMX a CPU is quicker in float32 once the weights are unpacked
    compute = torch.bfloat16 if device.type != "cpu" or has_amx() else torch.float32
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


def memory_of(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, quantize: str | None = None) -> float:
    """Bytes of a model's weights."""
    plain = packed = 0
    for name, shape in shapes.items():
        if len(shape) == 2 and _QUANTIZED.fullmatch(name):
            packed += math.prod(shape)
        else:
            plain += math.prod(shape)
    return plain * dtype.itemsize + packed * (dtype.itemsize if quantize is None else _BYTES[quantize])


def check_memory(
    name: str, shapes: Mapping[str, tuple[int, ...]], device: torch.device, dtype: torch.dtype, quantize: str | None
) -> None:
    """Raises CTInstructError where a large model does not fit, with the option that would."""
    needed, free = memory_of(shapes, dtype, quantize) + _WORK, free_memory(device)
    if free is not None and needed > free and needed > 4e9:
        raise does_not_fit(name, shapes, device, needed, free)


def does_not_fit(
    name: str, shapes: Mapping[str, tuple[int, ...]], device: torch.device, needed: float, free: float
) -> CTInstructError:
    """The sentence on a model that is too large, with the first option that fits."""
    options = {
        "--dtype bfloat16": (torch.bfloat16, None),
        **{f"--quantize {q}": (torch.bfloat16, q) for q in QUANTIZATIONS},
    }
    sizes = {option: memory_of(shapes, *how) + _WORK for option, how in options.items()}
    advice = next(
        (
            f"{option} would take {size / 1e9:.1f} GB"
            for option, size in sizes.items()
            if size <= free and size < needed
        ),
        None,
    )
    where = "the memory" if device.type == "cpu" else str(device)
    if advice is None:
        other = "use a machine with more" if device.type == "cpu" else "use --device cpu"
        advice = f"even --quantize int4 would take {sizes['--quantize int4'] / 1e9:.1f} GB, {other}"
    return CTInstructError(f"{name} needs {needed / 1e9:.1f} GB, but {where} has {free / 1e9:.1f} GB free: {advice}.")


def free_memory(device: torch.device) -> float | None:
    """Bytes that can be taken; None where nobody tells."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="utf-8"))
    except OSError:
        return None
    return float(found[1]) * 1024 if found and device.type == "cpu" else None


@contextmanager
def explaining_memory(
    name: str, shapes: Mapping[str, tuple[int, ...]], device: torch.device, dtype: torch.dtype, quantize: str | None
) -> Iterator[None]:
    """A GPU that is full becomes a sentence with the option that would fit.

    Raises:
        CTInstructError: instead of torch's error.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        needed = memory_of(shapes, dtype, quantize) + _WORK
        free = free_memory(device) or 0.0
        raise does_not_fit(name, shapes, device, needed, free) from error


__all__ = [
    "QUANTIZATIONS",
    "Precision",
    "choose_precision",
    "explaining_memory",
    "find_device",
    "memory_of",
    "quantization_of",
]
