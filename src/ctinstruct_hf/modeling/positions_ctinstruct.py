"""The order of an image's tokens, and positions for language models with a rope of three axes."""

from __future__ import annotations

from typing import Any

import torch

from .configuration_ctinstruct import CTInstructConfig, CTInstructError
from .vision_blocks_ctinstruct import PatchGrid, grid_rows
from .vision_ctinstruct import CTInstructVisionOutput


def grid_coordinates(grid: tuple[int, int, int, int], order: str, device: torch.device) -> torch.Tensor:
    """Coordinates of an image's tokens: [3, tokens], (slice in the grid, patch row, patch column)."""
    z, y, x, s = grid
    plane, row, column, layer = torch.meshgrid(
        *[torch.arange(size, device=device) for size in (z, y, x, s)], indexing="ij"
    )
    coordinates = torch.stack([plane * s + layer, row, column])  # [3, Z, Y, X, S]
    if order == "slices":
        coordinates = coordinates.permute(0, 1, 4, 2, 3)
    return coordinates.flatten(1)


def to_token_order(rows: torch.Tensor, grid: tuple[int, int, int, int], order: str) -> torch.Tensor:
    """Rows [tokens, D] of an image, from the order of `pixel_values` to that in which the language model reads them."""
    if order == "patches":
        return rows
    z, y, x, s = grid
    return rows.view(z, y, x, s, -1).permute(0, 3, 1, 2, 4).reshape(z * s * y * x, -1)


class TokenPositions:
    """Mixin for the model without heads: positions of words and image tokens."""

    config: CTInstructConfig

    def get_rope_index(
        self,
        input_ids: torch.Tensor,
        patch_grid: PatchGrid | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions of Qwen2-VL's three-axis rope: words are counted, an image's tokens have their coordinates in its grid
        (slice, patch row, patch column), and the word after an image follows its largest position.

        Returns:
            positions [3, B, L], and [B, 1] what to add to a plain count for the words that follow. A plain count [B, L]
            and zeros for language models whose rope has a single axis.
        """
        if not self.config.uses_three_axis_rope:
            kept = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
            return (kept.cumsum(-1) - 1).clamp(min=0), torch.zeros_like(input_ids[:, :1])
        is_image = input_ids == self.config.image_token_id
        grids = iter(grid_rows(patch_grid) if patch_grid is not None else [])
        positions = torch.ones((3, *input_ids.shape), dtype=torch.long, device=input_ids.device)
        deltas = torch.zeros((input_ids.shape[0], 1), dtype=torch.long, device=input_ids.device)
        for sample in range(input_ids.shape[0]):
            kept = torch.ones_like(is_image[sample])
            if attention_mask is not None:
                kept = attention_mask[sample].bool()
            in_image = is_image[sample, kept]
            parts: list[torch.Tensor] = []
            done, next_position = 0, 0
            while done < len(in_image):
                rest = in_image[done:]
                if bool(rest[0]):
                    part = grid_coordinates(next(grids), self.config.image_token_order, in_image.device)
                else:
                    run = int(rest.int().argmax()) if bool(rest.any()) else len(rest)
                    part = torch.arange(run, device=in_image.device).expand(3, -1)
                parts.append(part + next_position)
                done += part.shape[1]
                next_position = int(parts[-1].max()) + 1
            if parts:
                positions[:, sample, kept] = torch.cat(parts, dim=1)
            deltas[sample] = next_position - len(in_image)
        return positions, deltas

    def positions(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        vision_features: CTInstructVisionOutput | None,
        cache: Any,
    ) -> torch.Tensor | None:
        """Three-axis positions [3, B, L], which the caller must give itself while decoding from a cache."""
        if input_ids is None or (cache is not None and cache.get_seq_length() > 0):
            if vision_features is None:
                return None
            raise CTInstructError(
                "Pass position_ids with inputs_embeds, or when a prompt with images continues a cache."
            )
        grid = vision_features.patch_grid if vision_features is not None else None
        positions, _ = self.get_rope_index(input_ids, grid, attention_mask)
        if self.config.answer_positions == "sequential":
            answers = (input_ids == self.config.seg_token_id) | (input_ids == self.config.disease_token_id)
            kept = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
            plain = (kept.cumsum(-1) - 1).clamp(min=0)
            positions = torch.where(answers.any(-1, keepdim=True), plain, positions)
        return positions
