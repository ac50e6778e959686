"""Quantisation of the language model's layers only, with any library, and their products on a CPU."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

_FEW_ROWS = {torch.bfloat16: 16, torch.float32: 2}  # up to which torch's product with int8 is faster
_CHUNK = 2048  # rows of a weight that are in float32 at once


class QuantizesItsLanguageModel:
    """Mixin for models: `from_pretrained(quantization_config=…)` leaves out `modules_not_quantized`, beside the modules that
    the settings leave out."""

    modules_not_quantized = (
        "model.vision_tower",
        "model.bridger",
        "lm_head",
        "segmentation_query",
        "segmentation_decoder",
        "disease_head",
    )

    @classmethod
    def from_pretrained(cls, *args: Any, quantization_config: Any = None, **kwargs: Any) -> Any:
        """As in Transformers."""
        if quantization_config is not None:
            kwargs["quantization_config"] = cls.leave_out(quantization_config)
        return super().from_pretrained(*args, **kwargs)  # type: ignore[misc]

    @classmethod
    def leave_out(cls, settings: Any) -> Any:
        """A copy of `quantization_config`, an object or a dict, that leaves our modules out."""
        settings = copy.deepcopy(settings)
        names = [*cls.modules_not_quantized, *(name.removeprefix("model.") for name in cls.modules_not_quantized)]
        as_dict = settings if isinstance(settings, dict) else vars(settings)
        method = as_dict.get("quant_method", "bitsandbytes" if {"load_in_4bit", "load_in_8bit"} & set(as_dict) else "")
        bitsandbytes = getattr(method, "value", method) == "bitsandbytes"
        ours = "llm_int8_skip_modules" if bitsandbytes else "modules_to_not_convert"
        as_dict[ours] = list(dict.fromkeys([*(as_dict.get(ours) or []), *names]))
        return settings


def choose_compute_dtype(layer: Any) -> None:
    """Have a 4-bit layer of bitsandbytes on a CPU multiply in float32, which is quicker than bfloat16 without AMX."""
    if not torch.cpu._is_amx_tile_supported():
        layer.compute_dtype = torch.float32


def quicken_int8(layer: nn.Module) -> None:
    """Give an 8-bit layer of bitsandbytes on a CPU torch's product with int8 weights, exact in its activations.

    That of bitsandbytes rounds the activations to 8 bits and takes ten times as long without AVX-512.
    """
    weight: Any = layer.weight
    state: Any = layer.state
    scale = weight.SCB if getattr(weight, "SCB", None) is not None else state.SCB
    layer.forward = partial(multiply_int8, weight.data, scale.float() / 127, layer.bias)  # type: ignore[arg-type]


def multiply_int8(
    weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, states: torch.Tensor
) -> torch.Tensor:
    """A linear layer of int8 `weight` [out, in] with a float32 `scale` [out]: [..., in] -> [..., out]."""
    rows = states.reshape(-1, states.shape[-1])
    if len(rows) <= _FEW_ROWS.get(rows.dtype, 0):
        ones = torch.ones(len(weight), dtype=rows.dtype)
        product = torch._weight_int8pack_mm(rows.contiguous(), weight, ones).float()
    else:
        parts = [F.linear(rows.float(), part.float()) for part in weight.split(_CHUNK)]
        product = torch.cat(parts, dim=-1)
    product = product * scale
    if bias is not None:
        product = product + bias
    return product.to(states.dtype).view(*states.shape[:-1], len(weight))


__all__ = ["QuantizesItsLanguageModel", "choose_compute_dtype", "quicken_int8"]
