"""Convolution blocks that the towers and the segmentation decoder share, and the initial weights of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

PatchGrid = torch.Tensor | Sequence[Sequence[int]]


def grid_rows(patch_grid: PatchGrid) -> list[tuple[int, int, int, int]]:
    """`patch_grid` as Python numbers. A list of tuples passes through, which keeps `torch.compile` in a single graph."""
    rows = patch_grid.tolist() if isinstance(patch_grid, torch.Tensor) else patch_grid
    return [(int(z), int(y), int(x), int(s)) for z, y, x, s in rows]


def checkpointed_blocks(model: nn.Module) -> list[str]:
    """Names of the blocks that gradient checkpointing recomputes and sharding keeps whole; FSDP refuses missing names."""
    return sorted(
        {type(module).__name__ for module in model.modules() if isinstance(module, GradientCheckpointingLayer)}
    )


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain attention in the interface of Transformers: [B, heads, L, d] in, ([B, L, heads, d], weights) out."""
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm, activation."""

    def __init__(self, conv: nn.Conv2d | nn.Conv3d, activation: Literal["relu", "leaky_relu"] | None = None) -> None:
        super().__init__()
        self.conv = conv
        norm = nn.BatchNorm2d if isinstance(conv, nn.Conv2d) else nn.BatchNorm3d
        self.norm: nn.BatchNorm2d | nn.BatchNorm3d | nn.Identity = norm(conv.out_channels)
        self.activation = activation

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.activate(self.norm(self.conv(images)))

    def activate(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.activation == "relu":
            return F.relu(hidden)
        if self.activation == "leaky_relu":
            return F.leaky_relu(hidden, 0.01)
        return hidden


class Bottleneck(GradientCheckpointingLayer):
    """1 x 1, 3 x 3 with the stride, 1 x 1, added to the input. [N, C, H, W] both ways."""

    def __init__(self, in_channels: int, planes: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.reduce = ConvNorm(nn.Conv2d(in_channels, planes, 1, bias=False), "relu")
        self.spatial = ConvNorm(nn.Conv2d(planes, planes, 3, stride=stride, padding=1, bias=False), "relu")
        self.expand = ConvNorm(nn.Conv2d(planes, out_channels, 1, bias=False))
        self.shortcut = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = ConvNorm(nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        residual = images if self.shortcut is None else self.shortcut(images)
        return F.relu(self.expand(self.spatial(self.reduce(images))) + residual)


def init_weights(module: nn.Module, deviation: float) -> None:
    """Initial weights of the layer types of this package; loaded weights stay."""
    if isinstance(module, nn.Conv2d | nn.Conv3d):
        if module.groups > 1:
            init.normal_(module.weight, std=deviation)
        else:
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, nn.ConvTranspose2d):
        # each output pixel of a stride-k, size-k transposed convolution sums over in_channels
        init.normal_(module.weight, std=module.in_channels**-0.5)
        if module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        init.normal_(module.weight, std=deviation)
        if module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        init.normal_(module.weight, std=deviation)
    elif isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d | nn.LayerNorm):
        if module.weight is not None:
            init.ones_(module.weight)
        if module.bias is not None:
            init.zeros_(module.bias)
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            for buffer, fill in (
                (module.running_mean, init.zeros_),
                (module.running_var, init.ones_),
                (module.num_batches_tracked, init.zeros_),
            ):
                if buffer is not None:
                    fill(buffer)
