"""Faster inference in less memory, equal up to rounding; `optimize_for_inference` switches it on.

The network's files follow the paper. Here modules of a model get another way to compute the same: convolutions with their
norm folded in, slices and groups of cells in chunks, masks painted through the kernel of the last upsampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import nn

from .quantization_ctinstruct import choose_compute_dtype, quicken_int8
from .saving_ctinstruct import SavesItsCode
from .segmentation_ctinstruct import CTInstructSegmentationDecoder
from .vision_attention_ctinstruct import AttentionLayer
from .vision_blocks_ctinstruct import ConvNorm
from .vision_ctinstruct import SliceEncoder

Model = TypeVar("Model", bound=nn.Module)
CELLS_PER_SLICE = 128  # cells that attention takes at once for each slice that the encoder takes at once


def optimize_for_inference(model: Model) -> Model:
    """Optimise a network for inference; it cannot be trained or saved then.

    Modules without plain weights (with adapters, quantised or offloaded) stay as they are.

    Args:
        model: any network of this package, in `eval` mode; changed in place and returned.
    """
    if getattr(model, "optimized_for_inference", False):
        return model
    cast(SavesItsCode, model).optimized_for_inference = True
    stems = {getattr(module, "stem", None) for module in model.modules()}  # their maps before the norm are needed too
    for module in model.modules():
        if isinstance(module, ConvNorm) and module not in stems and has_plain_weights(module.conv):
            fold_norm(module)
        elif isinstance(module, CTInstructSegmentationDecoder):
            if has_plain_weights(module.token_block.up):
                up = module.token_block.up
                up.forward = partial(raise_token, up)  # type: ignore[method-assign]
            module.paint = partial(paint_in_chunks, module)  # type: ignore[method-assign]
        elif type(module).__name__ == "Linear8bitLt" and module.weight.device.type == "cpu":
            quicken_int8(module)
        elif type(module).__name__ == "Linear4bit" and module.weight.device.type == "cpu":
            choose_compute_dtype(module)
    config: Any = getattr(model.config, "vision_config", model.config)
    for module in model.modules():
        if isinstance(module, SliceEncoder):
            module.forward = partial(encode_in_chunks, module.forward, config.slice_chunk_size)  # type: ignore[method-assign]
        elif isinstance(module, AttentionLayer):
            module.mix = partial(mix_in_chunks, module.mix, CELLS_PER_SLICE * config.slice_chunk_size)  # type: ignore[method-assign]
    return model


def has_plain_weights(module: nn.Module) -> bool:
    """Whether a convolution has plain weights: no adapter, not quantised, not offloaded."""
    plain = type(module) in (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)
    return plain and not hasattr(module, "_hf_hook") and not module.weight.is_meta


def fold_norm(block: ConvNorm) -> None:
    """Fold the norm into the convolution: equal to both in `eval` mode."""
    conv, norm = block.conv, cast(nn.BatchNorm2d, block.norm)
    mean, variance = cast(torch.Tensor, norm.running_mean), cast(torch.Tensor, norm.running_var)
    scale = norm.weight.float() * torch.rsqrt(variance.float() + norm.eps)
    weight = conv.weight.float() * scale.view(-1, *[1] * (conv.weight.ndim - 1))
    bias = norm.bias.float() - mean.float() * scale
    conv.weight = nn.Parameter(weight.to(conv.weight), requires_grad=False)
    conv.bias = nn.Parameter(bias.to(conv.weight), requires_grad=False)
    block.norm = nn.Identity()
    block.forward = partial(folded_forward, block)  # type: ignore[method-assign]


def folded_forward(block: ConvNorm, images: torch.Tensor) -> torch.Tensor:
    """`ConvNorm.forward` with its norm folded into the convolution, in the memory order in which 2D convolutions are fastest."""
    if images.ndim == 4:
        images = images.contiguous(memory_format=torch.channels_last)
    return block.activate(block.conv(images))


def raise_token(up: nn.ConvTranspose2d, tokens: torch.Tensor) -> torch.Tensor:
    """A transposed convolution of single pixels [N, D, 1, 1] as a matrix product: [N, C, side, side]."""
    return (tokens.flatten(1) @ up.weight.flatten(1)).view(-1, *up.weight.shape[1:])


def encode_in_chunks(
    encode: Any,
    step: int,
    pixel_values: torch.Tensor,
    grids: Any = None,
    slice_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """The slice encoder's maps with bounded memory; padding slices, if all are equal, are computed once."""
    count = pixel_values.shape[0]
    rows = torch.arange(count, device=pixel_values.device)
    padding = rows[:0]
    if slice_mask is not None:
        candidates = rows[~slice_mask.bool()]
        if len(candidates) > 1 and bool((pixel_values[candidates] == pixel_values[candidates[0]]).all()):
            padding = candidates
            keep = torch.ones(count, dtype=torch.bool, device=rows.device)
            keep[padding[1:]] = False
            rows = rows[keep]
    maps: list[torch.Tensor] = []
    for chunk in rows.split(step):
        encoded = encode(pixel_values[chunk])
        if not maps:
            maps = [
                part.new_empty((count, *part.shape[1:])).contiguous(memory_format=torch.channels_last)
                for part in encoded
            ]
        for whole, part in zip(maps, encoded, strict=True):
            whole[chunk] = part
    for whole in maps:
        if len(padding) > 1:
            whole[padding[1:]] = whole[padding[0]].clone()
    return tuple(maps)


def mix_in_chunks(
    mix: Any, most_cells: int, tokens: torch.Tensor, bias: torch.Tensor | None, kept: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`AttentionLayer.mix` for some groups at a time; without a mask where no key is padding."""
    if kept is not None and bool(kept.all()):
        kept = None
    step = max(most_cells // tokens.shape[1], 1)
    if len(tokens) <= step:
        return mix(tokens, bias, kept)
    chunks = [
        mix(tokens[first : first + step], bias, None if kept is None else kept[first : first + step])
        for first in range(0, len(tokens), step)
    ]
    weights = [part for _, part in chunks if part is not None]
    return torch.cat([part for part, _ in chunks]), torch.cat(weights) if weights else None


def paint_in_chunks(
    decoder: CTInstructSegmentationDecoder,
    queries: Sequence[torch.Tensor],
    feature_maps: tuple[torch.Tensor, ...],
    tokens: torch.Tensor,
    grids: Sequence[tuple[int, int, int, int]],
) -> list[torch.Tensor]:
    """`CTInstructSegmentationDecoder.paint`, some slices at a time, written straight onto the canvas."""
    masks = []
    start = 0
    for query, (z, y, x, s) in zip(queries, grids, strict=True):
        stop = start + z * y * x * s
        canvas: torch.Tensor | None = None
        for first in range(start, stop, decoder.config.slice_chunk_size):
            chunk = slice(first, min(first + decoder.config.slice_chunk_size, stop))
            maps = tuple(part[chunk] for part in feature_maps)
            unet_maps = maps[1:] if decoder.detail is not None else maps
            embeddings = decoder.mask_embeddings(query, *decoder.memory(unet_maps))
            half = decoder.unet(unet_maps, tokens[chunk])
            logits = paint_half(decoder, embeddings[..., : half.shape[1]], half)
            if decoder.detail is not None:
                logits += torch.einsum(
                    "ncd,ndhw->nchw", embeddings[..., half.shape[1] :], decoder.detail(maps[0], half)
                )
            if canvas is None:
                height, width = logits.shape[-2:]
                canvas = logits.new_empty((logits.shape[1], z, s, y, height, x, width))
            for row, part in enumerate(logits, start=first - start):
                patch, depth = divmod(row, s)
                canvas[:, patch // (y * x), depth, patch // x % y, :, patch % x, :] = part
        assert canvas is not None
        masks.append(canvas.flatten(5, 6).flatten(3, 4).flatten(1, 2))
        start = stop
    return masks


def paint_half(decoder: CTInstructSegmentationDecoder, embeddings: torch.Tensor, half: torch.Tensor) -> torch.Tensor:
    """Dot product of [N, C, C_stem] with the U-Net's map, brought to full resolution: [N, C, H, W].

    The last upsampling is linear, so the embeddings go through its kernel instead of the map: equal, and cheaper while
    there are fewer queries than channels.
    """
    count, queries, _ = embeddings.shape
    if queries >= half.shape[1] or not has_plain_weights(decoder.last_up):
        return torch.einsum("ncd,ndhw->nchw", embeddings, decoder.last_up(half))
    kernel = torch.einsum("ncd,edij->ncije", embeddings, decoder.last_up.weight)  # [N, C, 2, 2, C_stem]
    height, width = half.shape[-2:]
    logits = torch.einsum("nke,nehw->nkhw", kernel.flatten(1, 3), half)
    return F.pixel_shuffle(logits.reshape(count, queries * 4, height, width), 2)


__all__ = ["optimize_for_inference"]
