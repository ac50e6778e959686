"""The two other towers of the paper's table 4, behind the same interface: five maps per slice for the same decoder.

Both read volumes: the patches of an image, each a block of S slices, with depth among the axes they mix. Their maps are
brought back to one per slice, so that tokens and masks keep the granularity of the hybrid tower.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_ctinstruct import CTInstructVisionConfig
from .vision_blocks_ctinstruct import ConvNorm


def blocks_of(
    pixel_values: torch.Tensor, grids: Sequence[tuple[int, int, int, int]]
) -> list[tuple[int, list[slice], torch.Tensor]]:
    """The patches of all images, grouped by depth S: (S, their rows, [P, 1, S, H, W])."""
    spans: dict[int, list[slice]] = {}
    start = 0
    for z, y, x, s in grids:
        for _ in range(z * y * x):
            spans.setdefault(s, []).append(slice(start, start + s))
            start += s
    return [(s, rows, torch.stack([pixel_values[row] for row in rows])[:, None]) for s, rows in sorted(spans.items())]


def per_slice(volume: torch.Tensor, slices: int) -> torch.Tensor:
    """A map of s depth cells, repeated to S slices: [P, C, s, H, W] -> [P * S, C, H, W]."""
    cells = torch.arange(slices, device=volume.device) * volume.shape[2] // slices
    return volume[:, :, cells].transpose(1, 2).flatten(0, 1)


class Tower3D(nn.Module):
    """Runs `encode` over blocks of equal depth and puts the maps back into the order of `pixel_values`."""

    def encode(self, volume: torch.Tensor) -> list[torch.Tensor]:
        """[P, 1, S, H, W] -> five maps [P * S, C, H / 2^k, W / 2^k]."""
        raise NotImplementedError

    def forward(
        self,
        pixel_values: torch.Tensor,
        grids: Sequence[tuple[int, int, int, int]],
        slice_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        groups = blocks_of(pixel_values, grids)
        encoded = [self.encode(volume) for _, _, volume in groups]
        if len(groups) == 1:
            return tuple(encoded[0])
        order = torch.cat(
            [torch.arange(row.start, row.stop, device=pixel_values.device) for _, rows, _ in groups for row in rows]
        ).argsort()
        return tuple(torch.cat(parts)[order] for parts in zip(*encoded, strict=True))


class Block3D(GradientCheckpointingLayer):
    """Two 3 x 3 x 3 convolutions, added to the input."""

    def __init__(self, in_channels: int, out_channels: int, stride: tuple[int, int, int]) -> None:
        super().__init__()
        self.first = ConvNorm(nn.Conv3d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False), "relu")
        self.second = ConvNorm(nn.Conv3d(out_channels, out_channels, 3, padding=1, bias=False))
        self.shortcut = None
        if stride != (1, 1, 1) or in_channels != out_channels:
            self.shortcut = ConvNorm(nn.Conv3d(in_channels, out_channels, 1, stride=stride, bias=False))

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        residual = volume if self.shortcut is None else self.shortcut(volume)
        return F.relu(self.second(self.first(volume)) + residual)


class ResNet3D(Tower3D):
    """3D residual network. A 1 x 1 x 1 projection gives each stage the channels of the hybrid tower."""

    def __init__(self, config: CTInstructVisionConfig) -> None:
        super().__init__()
        self.stem = ConvNorm(
            nn.Conv3d(1, config.stem_channels, (3, 7, 7), stride=(1, 2, 2), padding=(1, 3, 3), bias=False)
        )
        channels = config.stem_channels
        stages, projections = [], []
        stages_of = zip(config.resnet3d_planes, config.stage_depths, config.stage_channels, strict=True)
        for index, (planes, depth, out_channels) in enumerate(stages_of):
            stride = (1, 1, 1) if index == 0 else (2, 2, 2)
            blocks = []
            for block in range(depth):
                blocks.append(Block3D(channels, planes, stride if block == 0 else (1, 1, 1)))
                channels = planes
            stages.append(nn.Sequential(*blocks))
            projections.append(nn.Conv3d(planes, out_channels, 1))
        self.stages = nn.ModuleList(stages)
        self.projections = nn.ModuleList(projections)

    def encode(self, volume: torch.Tensor) -> list[torch.Tensor]:
        slices = volume.shape[2]
        stem = self.stem.conv(volume)
        maps = [per_slice(stem, slices)]
        hidden = F.max_pool3d(F.relu(self.stem.norm(stem)), (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1))
        for stage, projection in zip(self.stages, self.projections, strict=True):
            hidden = stage(hidden)
            maps.append(per_slice(projection(hidden), slices))
        return maps


class ViTLayer(GradientCheckpointingLayer, nn.TransformerEncoderLayer):
    """A pre-norm layer of torch that can be recomputed in the backward pass."""


class ViT3D(Tower3D):
    """3D vision transformer with sinusoid positions; the ends of its four layer groups give the maps."""

    def __init__(self, config: CTInstructVisionConfig) -> None:
        super().__init__()
        width = config.vit_hidden_size
        self.patch = tuple(config.vit_patch_size)
        self.embed = nn.Linear(self.patch[0] * self.patch[1] * self.patch[2], width)
        self.groups = nn.ModuleList(
            [
                nn.ModuleList(
                    [
                        ViTLayer(
                            width,
                            max(1, width // 48),
                            dim_feedforward=4 * width,
                            dropout=0.0,
                            activation="gelu",
                            batch_first=True,
                            norm_first=True,
                        )
                        for _ in range(depth)
                    ]
                )
                for depth in config.vit_depths
            ]
        )
        self.norm = nn.LayerNorm(width)
        # the fine maps also see the pixels themselves, as in U-Nets over transformers
        self.stem = nn.Conv2d(1, config.stem_channels, 7, stride=2, padding=3, bias=False)
        self.projections = nn.ModuleList([nn.Conv2d(width, channels, 1) for channels in config.stage_channels])
        self.stem_projection = nn.Conv2d(width, config.stem_channels, 1)

    def encode(self, volume: torch.Tensor) -> list[torch.Tensor]:
        slices, height, width = volume.shape[2:]
        depth_step, height_step, width_step = self.patch
        missing = -slices % depth_step
        if missing:
            volume = torch.cat([volume, volume[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2)
        grid = (volume.shape[2] // depth_step, height // height_step, width // width_step)
        cells = volume[:, 0].unflatten(1, (grid[0], depth_step)).unflatten(3, (grid[1], height_step))
        cells = cells.unflatten(5, (grid[2], width_step)).permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(1, 3)
        tokens = self.embed(cells)
        tokens = tokens + sinusoid(grid, tokens.shape[-1], tokens.device, tokens.dtype)
        ends = []
        for group in self.groups:
            for layer in cast(nn.ModuleList, group):
                tokens = layer(tokens)
            ends.append(tokens)
        ends[-1] = self.norm(ends[-1])
        grids = [end.transpose(1, 2).unflatten(2, grid) for end in ends]  # [P, width, z, y, x]
        stack = [per_slice(end, grid[0] * depth_step).unflatten(0, (-1, grid[0] * depth_step)) for end in grids]
        stack = [end[:, :slices].flatten(0, 1) for end in stack]  # [P * S, width, y, x]
        flat = volume[:, 0, :slices].flatten(0, 1)[:, None]
        maps = [self.stem(flat) + resize(self.stem_projection(stack[0]), (height // 2, width // 2))]
        for level, (end, projection) in enumerate(zip(stack, self.projections, strict=True)):
            scale = 4 * 2**level
            maps.append(resize(projection(end), (height // scale, width // scale)))
        return maps


def resize(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    if images.shape[-2:] == size:
        return images
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False)


def sinusoid(grid: tuple[int, int, int], width: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Fixed positions [z * y * x, width], a third of the channels per axis."""
    per_axis = width // 6 * 2
    frequencies = 10000.0 ** (-torch.arange(0, per_axis, 2, device=device) / per_axis)
    parts = []
    for axis, size in enumerate(grid):
        angles = torch.arange(size, device=device)[:, None] * frequencies
        table = torch.cat([angles.sin(), angles.cos()], dim=-1)
        shape = [1, 1, 1, per_axis]
        shape[axis] = size
        parts.append(table.view(shape).expand(*grid, per_axis))
    positions = torch.cat(parts, dim=-1).flatten(0, 2)
    return F.pad(positions, (0, width - positions.shape[-1])).to(dtype)
