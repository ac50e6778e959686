"""Attention of the vision tower (section 3.2): it relates the patches of a volume, then the slices of each patch.

Names of dimensions, the same everywhere: N slices of all images, D width of a token, Z x Y x X the patches of an image
along depth, height and width, S slices in a patch, h x w the last feature map, B images of the same grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_ctinstruct import CTInstructVisionConfig
from .vision_blocks_ctinstruct import eager_attention


class PositionConv(nn.Module):
    """Depthwise 3 x 3 x 3 convolution as position encoding; in depth it looks back only. [B, Z, Y, X, D] both ways."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(width, width, 3, padding=(2, 1, 1), groups=width)

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        return self.conv(volume.movedim(-1, 1))[:, :, :-2].movedim(1, -1)


class RelativePositionBias(nn.Module):
    """Continuous relative position bias: log-spaced offsets -> MLP -> a number per attention head."""

    def __init__(self, width: int, heads: int, axes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(axes, width), nn.Linear(width, width)])
        self.out = nn.Linear(width, heads)

    def forward(self, sizes: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        """Bias [heads, L, L] over a grid of `sizes`, L its cells, with the device and dtype of `like`.

        Each different offset is computed once.
        """
        offsets = torch.stack(
            torch.meshgrid(*[torch.arange(1 - size, size, device=like.device) for size in sizes], indexing="ij"), dim=-1
        ).flatten(0, -2)
        hidden = torch.sign(offsets) * torch.log(offsets.abs() + 1.0)
        hidden = hidden.to(like.dtype)
        for layer in self.layers:
            hidden = F.leaky_relu(layer(hidden), 0.1)
        table = self.out(hidden)  # [offsets, heads]
        cells = torch.meshgrid(*[torch.arange(size, device=like.device) for size in sizes], indexing="ij")
        index = torch.zeros_like(cells[0])  # of a cell in the table, had its axes the lengths of the table's
        middle = 0
        for cell, size in zip(cells, sizes, strict=True):
            index = index * (2 * size - 1) + cell
            middle = middle * (2 * size - 1) + size - 1
        index = index.flatten()
        return table.t()[:, index[:, None] - index[None] + middle]


class CosineAttention(nn.Module):
    """Attention by cosine similarity with learned scales per channel. [B, L, D] both ways."""

    def __init__(self, config: CTInstructVisionConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.is_causal = False
        self.num_heads = config.num_attention_heads
        self.head_dim = config.attention_head_dim
        inner = self.num_heads * self.head_dim
        self.norm = nn.LayerNorm(width, bias=False)
        self.query = nn.Linear(width, inner, bias=False)
        self.key = nn.Linear(width, inner, bias=False)
        self.value = nn.Linear(width, inner, bias=False)
        self.query_scale = nn.Parameter(torch.ones(self.head_dim))
        self.key_scale = nn.Parameter(torch.ones(self.head_dim))
        self.out = nn.Linear(inner, width, bias=False)

    def reset_scales(self) -> None:
        init.ones_(self.query_scale)
        init.ones_(self.key_scale)

    def forward(self, tokens: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[B, L, D] and, with eager attention, the weights [B, heads, L, L].

        `bias` [1 or B, 1 or heads, 1 or L, L] is added to the similarities, -inf-like where a key is padding."""
        shape = (*tokens.shape[:2], self.num_heads, self.head_dim)
        normed = self.norm(tokens)
        query = F.normalize(self.query(normed).view(shape), dim=-1).transpose(1, 2) * self.query_scale
        key = F.normalize(self.key(tokens).view(shape), dim=-1).transpose(1, 2) * self.key_scale
        value = self.value(tokens).view(shape).transpose(1, 2)
        implementation = self.config._attn_implementation or "eager"
        if "flash" in implementation:
            implementation = "sdpa"  # flash kernels take no bias
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)
        mask = None
        if bias is not None:
            mask = bias.to(query.dtype).expand(query.shape[0], -1, query.shape[2], -1)
        mixed, weights = attend(self, query, key, value, mask, scaling=self.config.attention_scale, dropout=0.0)
        return self.out(mixed.flatten(2)), weights


class GatedFeedForward(nn.Module):
    """LayerNorm and GEGLU. [..., D] both ways."""

    def __init__(self, width: int, multiple: float) -> None:
        super().__init__()
        inner = int(width * multiple * 2 / 3)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        value, gate = self.up(self.norm(tokens)).chunk(2, dim=-1)
        return self.down(F.gelu(gate) * value)


class AttentionLayer(GradientCheckpointingLayer):
    """Position convolution, attention within groups of cells, feed-forward; each added to its input."""

    def __init__(self, config: CTInstructVisionConfig, width: int) -> None:
        super().__init__()
        self.position = PositionConv(width)
        self.attention = CosineAttention(config, width)
        self.feed_forward = GatedFeedForward(width, config.feed_forward_multiple)

    def forward(
        self, volume: torch.Tensor, grouping: Grouping, bias: torch.Tensor | None, kept: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The volume [B, Z*S, Y*h, X*w, D] after this layer, and with eager attention the weights.

        Args:
            bias: [heads, cells, cells], the same in all groups.
            kept: bool [groups, cells], False for keys that are padding; None where all count.
        """
        volume = volume + self.position(volume)
        tokens, weights = self.mix(grouping.split(volume), bias, kept)
        return grouping.join(tokens), weights

    def mix(
        self, tokens: torch.Tensor, bias: torch.Tensor | None, kept: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention and feed-forward within groups: [groups, cells, D], and the weights [groups, heads, cells, cells]."""
        if bias is not None:
            bias = bias[None]
        if kept is not None:
            padding = torch.zeros(kept.shape, dtype=tokens.dtype, device=tokens.device)
            padding = padding.masked_fill(~kept, torch.finfo(tokens.dtype).min)[:, None, None, :]
            bias = padding if bias is None else bias + padding
        mixed, weights = self.attention(tokens, bias)
        tokens = tokens + mixed
        return tokens + self.feed_forward(tokens), weights


@dataclass(frozen=True)
class Grouping:
    """Which cells of a volume [B, Z*S, Y*h, X*w, D] attend to each other.

    Attributes:
        grid: patches Z, Y, X and slices S.
        map_size: h, w of the map within a patch (1, 1 once pooled).
        over: `patches`: the same slice of all patches; `slices`: all slices of a patch at the same cell of the map.
    """

    grid: tuple[int, int, int, int]
    map_size: tuple[int, int]
    over: str

    def split(self, volume: torch.Tensor) -> torch.Tensor:
        """[B, Z*S, Y*h, X*w, D] -> [groups, cells, D]."""
        (z, y, x, s), (h, w) = self.grid, self.map_size
        cells = volume.reshape(-1, z, s, y * h, x * w, volume.shape[-1])
        if self.over == "patches":
            return cells.transpose(1, 2).reshape(-1, z * y * h * x * w, volume.shape[-1])
        return cells.permute(0, 1, 3, 4, 2, 5).reshape(-1, s, volume.shape[-1])

    def join(self, tokens: torch.Tensor) -> torch.Tensor:
        """The inverse of `split`."""
        (z, y, x, s), (h, w) = self.grid, self.map_size
        width = tokens.shape[-1]
        if self.over == "patches":
            cells = tokens.reshape(-1, s, z, y * h, x * w, width).transpose(1, 2)
        else:
            cells = tokens.reshape(-1, z, y * h, x * w, s, width).permute(0, 1, 4, 2, 3, 5)
        return cells.reshape(-1, z * s, y * h, x * w, width)


@dataclass(frozen=True)
class VolumeLayout:
    """Between the rows of `pixel_values` and the volume that they are cut from."""

    grid: tuple[int, int, int, int]
    map_size: tuple[int, int]

    def volume(self, rows: torch.Tensor) -> torch.Tensor:
        """[B*Z*Y*X*S, h*w, D] -> [B, Z*S, Y*h, X*w, D]."""
        (z, y, x, s), (h, w) = self.grid, self.map_size
        cells = rows.reshape(-1, z, y, x, s, h, w, rows.shape[-1]).permute(0, 1, 4, 2, 5, 3, 6, 7)
        return cells.reshape(-1, z * s, y * h, x * w, rows.shape[-1])

    def rows(self, volume: torch.Tensor) -> torch.Tensor:
        """The inverse of `volume`."""
        (z, y, x, s), (h, w) = self.grid, self.map_size
        cells = volume.reshape(-1, z, s, y, h, x, w, volume.shape[-1]).permute(0, 1, 3, 5, 2, 4, 6, 7)
        return cells.reshape(-1, h * w, volume.shape[-1])

    def means(self, volume: torch.Tensor) -> torch.Tensor:
        """[B*Z*Y*X*S, D]: the mean of `rows` over a slice of a patch."""
        (z, y, x, s), (h, w) = self.grid, self.map_size
        cells = volume.view(-1, z, s, y, h, x, w, volume.shape[-1]).mean(dim=(4, 6))
        return cells.permute(0, 1, 3, 4, 2, 5).flatten(0, -2)


class Trace:
    """Records hidden states [N, h*w, D] before each layer and after the last, and attention weights."""

    def __init__(self) -> None:
        self.states: list[torch.Tensor] = []
        self.attentions: list[torch.Tensor | None] = []

    def state(self, volume: torch.Tensor, layout: VolumeLayout) -> torch.Tensor:
        """Record the state and return it, so that its gradient can be kept."""
        self.states.append(layout.rows(volume))
        return layout.volume(self.states[-1])


class SliceAttention(nn.Module):
    """Patch-wise, then slice-wise attention on the h x w grid of the last map, then the mean over a slice."""

    position_axes = 3  # depth, height, width

    def __init__(self, config: CTInstructVisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.patch_layers = nn.ModuleList(
            [AttentionLayer(config, width) for _ in range(config.num_patch_attention_layers)]
        )
        self.patch_norm = nn.LayerNorm(width, bias=False)
        self.position_bias = RelativePositionBias(width, config.num_attention_heads, self.position_axes)
        self.slice_layers = nn.ModuleList(
            [AttentionLayer(config, width) for _ in range(config.num_slice_attention_layers)]
        )
        self.slice_norm = nn.LayerNorm(width, bias=False)

    def forward(
        self, last_map: torch.Tensor, grid: tuple[int, int, int, int], kept: torch.Tensor, trace: Trace | None = None
    ) -> torch.Tensor:
        """Tokens of B images of the same grid.

        Args:
            last_map: [B*Z*Y*X*S, D, h, w].
            grid: Z, Y, X, S.
            kept: bool [B, Z*Y*X*S], False for padding slices.
            trace: records states and attention weights.

        Returns:
            [B*Z*Y*X*S, D].
        """
        z, y, x, _ = grid
        h, w = last_map.shape[2:]
        layout = VolumeLayout(grid, (h, w))
        patches, slices = Grouping(grid, (h, w), "patches"), Grouping(grid, (h, w), "slices")
        volume = layout.volume(last_map.flatten(2).transpose(1, 2))  # [B, Z*S, Y*h, X*w, D]
        kept = layout.volume(kept.reshape(-1, 1, 1).expand(-1, h * w, 1))

        bias, keys = self.position_bias((z, y * h, x * w), like=volume), patches.split(kept)[..., 0]
        for layer in self.patch_layers:
            volume = trace.state(volume, layout) if trace else volume
            volume, weights = layer(volume, patches, bias, keys)
            if trace:
                trace.attentions.append(weights)
        volume = self.patch_norm(volume)
        keys = slices.split(kept)[..., 0]
        for layer in self.slice_layers:
            volume = trace.state(volume, layout) if trace else volume
            volume, weights = layer(volume, slices, None, keys)
            if trace:
                trace.attentions.append(weights)
        volume = self.slice_norm(volume)
        volume = trace.state(volume, layout) if trace else volume
        return layout.means(volume)  # equation 2
