"""Attention of the released weights where it differs from the paper; `attention_layout="released"`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .vision_attention_ctinstruct import SliceAttention, Trace, VolumeLayout


@dataclass(frozen=True)
class ReleasedGrouping:
    """The released code's groups over a volume [B, Z*S, Y, X, D] of pooled maps.

    Attributes:
        grid: patches Z, Y, X and slices S.
        over: `patches`: the in-plane patches of a slice; `slices`: the column of all slices of an in-plane patch.
    """

    grid: tuple[int, int, int, int]
    over: str

    def split(self, volume: torch.Tensor) -> torch.Tensor:
        """[B, Z*S, Y, X, D] -> [groups, cells, D], the cells as they lie in memory."""
        z, y, x, s = self.grid
        return volume.reshape(-1, y * x if self.over == "patches" else z * s, volume.shape[-1])

    def join(self, tokens: torch.Tensor) -> torch.Tensor:
        """The inverse of `split`."""
        z, y, x, s = self.grid
        return tokens.reshape(-1, z * s, y, x, tokens.shape[-1])


class ReleasedSliceAttention(SliceAttention):
    """Pools each map first, then attends.

    The position convolution of the slice-wise layers takes tokens ordered patch by patch as if they were ordered slice by
    slice; the released weights are trained with it.
    """

    position_axes = 2  # height, width

    def forward(
        self, last_map: torch.Tensor, grid: tuple[int, int, int, int], kept: torch.Tensor, trace: Trace | None = None
    ) -> torch.Tensor:
        """As in `SliceAttention`."""
        z, y, x, s = grid
        layout = VolumeLayout(grid, (1, 1))
        patches, slices = ReleasedGrouping(grid, "patches"), ReleasedGrouping(grid, "slices")
        volume = layout.volume(last_map.mean(dim=(2, 3))[:, None])  # [B, Z*S, Y, X, D]
        kept = layout.volume(kept.reshape(-1, 1, 1)).flatten(2).transpose(1, 2).reshape(-1, z * s)

        bias = self.position_bias((y, x), like=volume)
        for layer in self.patch_layers:
            volume = trace.state(volume, layout) if trace else volume
            volume, weights = layer(volume, patches, bias, None)
            if trace:
                trace.attentions.append(weights)
        volume = self.patch_norm(volume)
        for layer in self.slice_layers:
            volume = trace.state(volume, layout) if trace else volume
            columns = volume.flatten(2, 3).transpose(1, 2)  # [B, Y*X, Z*S, D]
            mixed, weights = layer(slices.join(columns), slices, None, kept)
            volume = mixed.reshape(columns.shape).transpose(1, 2).reshape(volume.shape)
            if trace:
                trace.attentions.append(weights)
        volume = self.slice_norm(volume)
        volume = trace.state(volume, layout) if trace else volume
        return layout.rows(volume)[:, 0]
