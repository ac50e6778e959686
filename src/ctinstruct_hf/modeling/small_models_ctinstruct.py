"""What is in neither the paper nor the release: options with which a tiny model learns on a CPU; off by default."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_ctinstruct import CTInstructError
from .vision_blocks_ctinstruct import ConvNorm


class StemWindows:
    """Slices seen in several windows of intensity, a channel each: `CTInstructVisionConfig.stem_windows`.

    Args:
        windows: [low, high] of each, in units of `pixel_values`.

    Raises:
        CTInstructError: where a window is empty.
    """

    def __init__(self, windows: Sequence[Sequence[float]]) -> None:
        self.windows = [(float(low), float(high)) for low, high in windows]
        if not all(low < high for low, high in self.windows):
            raise CTInstructError(f"stem_windows is {self.windows}: give [low, high] of each window.")

    def __call__(self, slices: torch.Tensor) -> torch.Tensor:
        """[n, H, W] -> [n, windows, H, W], each window stretched to −1…1."""
        views = [(slices.clamp(low, high) - low) * (2 / (high - low)) - 1 for low, high in self.windows]
        return torch.stack(views, dim=1)


class DetailBlock(GradientCheckpointingLayer):
    """A map at full resolution from the slices and the U-Net's last map: `CTInstructSegmentationConfig.detail_channels`.

    [N, C_slices, H, W] and [N, C_stem, H / 2, W / 2] -> [N, C_detail, H, W].
    """

    def __init__(self, slice_channels: int, stem_channels: int, out: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(stem_channels, out, 2, stride=2, bias=False)
        self.first = ConvNorm(nn.Conv2d(slice_channels, out, 3, padding=1, bias=False), "leaky_relu")
        self.second = ConvNorm(nn.Conv2d(2 * out, out, 1, bias=False), "leaky_relu")

    def forward(self, slices: torch.Tensor, half: torch.Tensor) -> torch.Tensor:
        return self.second(torch.cat([self.up(half), self.first(slices)], dim=1))
