"""Weights in bitsandbytes' format, tensor by tensor: a model is quantised without being whole in memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CTInstructError
from ..files import whole_folder
from ..modeling.configuration_ctinstruct import CTInstructConfig
from ..modeling.modeling_ctinstruct import CTInstructForConditionalGeneration
from .folders import INDEX, MODEL_FILES, WEIGHT_FILES, read_object, require
from .models import check_weights, resolve_model
from .precision import memory_of, quantization_of
from .released.checkpoint import read_entries
from .released.download import check_space
from .released.shards import Packer, Writer


def quantize_folder(
    source: str | Path,
    output: Path,
    quantize: str,
    progress: Callable[[str], None] = lambda step: None,
    revision: str | None = None,
) -> Path:
    """A saved model with its language model quantised, which `from_pretrained` loads where bitsandbytes is installed.

    Args:
        source: a folder or a name on the Hub.
        output: the folder to write.
        quantize: int8 or int4.
        progress: called with the name of each step.
        revision: of a name on the Hub.

    Raises:
        CTInstructError: for an unusable or quantised model, and a disk without room.
    """
    folder = resolve_model(source, revision, progress=progress).folder
    require(folder, "stage two")
    settings = read_object(folder / "config.json")
    if settings.get("quantization_config") is not None:
        raise CTInstructError(f"{folder} is quantised already: give the model that it was made from.")
    shapes = check_weights(folder)
    packer = packer_of(CTInstructConfig.from_pretrained(folder), quantize)
    check_space({output: int(memory_of(shapes, torch.bfloat16, quantize))}, f"'{output}'")
    with whole_folder(output) as draft:
        writer = Writer(draft, packer.pack)
        for number, (name, entry) in enumerate(read_entries(folder, plain=False).items(), start=1):
            progress(f"tensor {number} of {len(shapes)}")
            writer.add(name, entry.read())
        writer.close()
        kept = [folder / name for name in MODEL_FILES if name not in (*WEIGHT_FILES, INDEX)]
        for path in (*kept, *folder.glob("*.py"), folder / "README.md"):
            if path.is_file():
                shutil.copyfile(path, draft / path.name)
        settings["quantization_config"] = packer.settings
        (draft / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return output


def packer_of(config: Any, quantize: str) -> Packer:
    """How the weights of a model are packed.

    Raises:
        CTInstructError: for another name than int8 or int4, and where bitsandbytes is missing.
    """
    wanted = quantization_of(quantize, torch.device("cpu"))
    if quantize == "int4":
        wanted.bnb_4bit_compute_dtype = torch.bfloat16  # of a GPU; a CPU takes its fastest dtype
    left_out = CTInstructForConditionalGeneration.leave_out(wanted)
    with torch.device("meta"):
        model: nn.Module = CTInstructForConditionalGeneration(config)
    names = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if name.startswith("model.language_model.") and isinstance(module, nn.Linear)
    }
    way = {"int8": _eight_bits, "int4": _four_bits}[quantize]

    def pack(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        return way(name, tensor) if name in names else iter([(name, tensor)])

    return Packer(pack, left_out.to_dict())


def _eight_bits(name: str, weight: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    from bitsandbytes.functional import int8_vectorwise_quant

    numbers, scale, _ = int8_vectorwise_quant(weight.half())
    module = name.removesuffix(".weight")
    yield name, numbers
    yield f"{module}.SCB", scale
    yield f"{module}.weight_format", torch.tensor(0, dtype=torch.uint8)  # row by row


def _four_bits(name: str, weight: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    from bitsandbytes.functional import quantize_4bit

    numbers, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    yield name, numbers
    for part, value in state.as_dict(packed=True).items():
        yield f"{name}.{part}", value


__all__ = ["packer_of", "quantize_folder"]
