"""The segmentation decoder (section 3.2, figure 4): a U-Net paints features, a text-prompted transformer chooses.

Names of dimensions: N slices, C queries, D_text the width of a query, h x w the last feature map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

from .configuration_ctinstruct import CTInstructSegmentationConfig
from .saving_ctinstruct import SavesItsCode
from .small_models_ctinstruct import DetailBlock
from .training_ctinstruct import CountsBatchesOnce
from .vision_blocks_ctinstruct import ConvNorm, checkpointed_blocks, eager_attention, init_weights


class UpBlock(GradientCheckpointingLayer):
    """Transposed convolution, join with the skip map, two convolutions with batch norm."""

    def __init__(self, in_channels: int, skip_channels: int, factor: int) -> None:
        super().__init__()
        out = skip_channels
        self.up = nn.ConvTranspose2d(in_channels, out, factor, stride=factor, bias=False)
        self.first = ConvNorm(nn.Conv2d(2 * out, out, 3, padding=1, bias=False), "leaky_relu")
        self.second = ConvNorm(nn.Conv2d(out, out, 3, padding=1, bias=False), "leaky_relu")

    def forward(self, hidden: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        raised = self.up(hidden)
        if raised.shape[-2:] != skip.shape[-2:]:  # a token raised to `last_map_size`, where patches have another side
            raised = F.interpolate(raised, size=skip.shape[-2:], mode="bilinear", align_corners=False)
        return self.second(self.first(torch.cat([raised, skip], dim=1)))


class CrossAttention(nn.Module):
    """Queries [N, C, D_text] attend to the cells [N, h*w, D_text] of their slice."""

    def __init__(self, config: CTInstructSegmentationConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.is_causal = False
        self.num_heads = config.num_attention_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projected in (self.query(queries), self.key(keys), self.value(values))
        )
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation or "eager", eager_attention)
        mixed, _ = attend(self, query, key, value, None, scaling=query.shape[-1] ** -0.5, dropout=0.0)
        return self.out(mixed.flatten(2))


class DecoderLayer(GradientCheckpointingLayer):
    """Pre-norm cross-attention and feed-forward; the queries do not see each other."""

    def __init__(self, config: CTInstructSegmentationConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.attention_norm = nn.LayerNorm(width)
        self.attention = CrossAttention(config)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, width)

    def forward(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        queries = queries + self.attention(self.attention_norm(queries), keys, values)
        return queries + self.down(F.relu(self.up(self.feed_forward_norm(queries))))


class CTInstructSegmentationDecoder(SavesItsCode, CountsBatchesOnce, PreTrainedModel):
    """Masks of an image from the tower's maps and tokens, one per query."""

    config_class = CTInstructSegmentationConfig
    config: CTInstructSegmentationConfig
    base_model_prefix = "segmentation_decoder"
    main_input_name = "queries"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: CTInstructSegmentationConfig) -> None:
        super().__init__(config)
        channels = list(config.feature_channels)
        slice_channels = channels.pop(0) if config.detail_channels else 0
        width = config.hidden_size
        self.token_block = UpBlock(channels[-1], channels[-1], config.last_map_size)
        self.blocks = nn.ModuleList(
            [UpBlock(deep, skip, 2) for deep, skip in zip(channels[:0:-1], channels[-2::-1], strict=True)]
        )
        self.last_up = nn.ConvTranspose2d(channels[0], channels[0], 2, stride=2, bias=False)
        self.detail = (
            DetailBlock(slice_channels, channels[0], config.detail_channels) if config.detail_channels else None
        )
        self.fuse = nn.Sequential(nn.Linear(sum(channels), width), nn.GELU(), nn.Linear(width, width), nn.GELU())
        self.layers = nn.ModuleList([DecoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(width)
        self.mask_embedding = nn.Sequential(
            nn.Linear(width, config.mask_hidden_size),
            nn.GELU(),
            nn.Linear(config.mask_hidden_size, channels[0] + config.detail_channels),
            nn.GELU() if config.mask_activation else nn.Identity(),
        )
        self._no_split_modules = checkpointed_blocks(self)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        init_weights(module, self.config.initializer_range)

    def unet(self, feature_maps: Sequence[torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
        """The U-Net up to half resolution: [N, C_stem, H / 2, W / 2]."""
        hidden = tokens[:, :, None, None]
        for block, skip in zip([self.token_block, *self.blocks], feature_maps[::-1], strict=True):
            hidden = block(hidden, skip)
        return hidden

    def memory(self, feature_maps: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values Z_f of equation 3, [N, h*w, D_text], the same for all queries."""
        size = feature_maps[-1].shape[-2:]
        pooled = [F.avg_pool2d(part, part.shape[-1] // size[-1]) for part in feature_maps]
        values = self.fuse(torch.cat(pooled, dim=1).flatten(2).transpose(1, 2))
        return values + sinusoid_2d(size, values.shape[-1], values.device, values.dtype), values

    def mask_embeddings(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """[C, D_text] queries -> [N, C, C_stem + C_detail], since every slice answers for itself."""
        states = queries.to(values.dtype)[None].expand(values.shape[0], -1, -1)
        for layer in self.layers:
            states = layer(states, keys, values)
        return self.mask_embedding(self.norm(states))

    def paint(
        self,
        queries: Sequence[torch.Tensor],
        feature_maps: tuple[torch.Tensor, ...],
        tokens: torch.Tensor,
        grids: Sequence[tuple[int, int, int, int]],
    ) -> list[torch.Tensor]:
        """Mask logits [C, Z*S, Y*H, X*W] of each image; the slices of the images are concatenated.

        The U-Net runs once over the slices of all images; a mask is the dot product of its embedding with the map.
        """
        unet_maps = feature_maps[1:] if self.detail is not None else feature_maps
        keys, values = self.memory(unet_maps)
        half = self.unet(unet_maps, tokens)
        full = self.last_up(half)  # [N, C_stem, H, W]
        if self.detail is not None:
            full = torch.cat([full, self.detail(feature_maps[0], half)], dim=1)
        sizes = [math.prod(grid) for grid in grids]
        masks = []
        for query, key, value, painted, grid in zip(
            queries, keys.split(sizes), values.split(sizes), full.split(sizes), grids, strict=True
        ):
            embeddings = self.mask_embeddings(query, key, value)
            masks.append(assemble(torch.einsum("ncd,ndhw->nchw", embeddings, painted), grid))
        return masks

    def forward(
        self,
        queries: torch.Tensor | Sequence[torch.Tensor],
        feature_maps: tuple[torch.Tensor, ...],
        tokens: torch.Tensor,
        grid: tuple[int, int, int, int] | Sequence[tuple[int, int, int, int]],
    ) -> torch.Tensor | list[torch.Tensor]:
        """Mask logits on the canvas of an image, or of each of several.

        Args:
            queries: T_seg [C, D_text]; a list of them for several images, where an image may have none.
            feature_maps: the tower's maps [N, ...].
            tokens: the tower's tokens [N, D].
            grid: patches along depth, height and width, slices per patch; a list of them for several images, whose slices
                are concatenated. While training, their statistics in batch norm are joint.

        Returns:
            [C, Z*S, Y*patch_height, X*patch_width], or a list of such.
        """
        feature_maps, tokens = tuple(part.to(self.dtype) for part in feature_maps), tokens.to(self.dtype)
        if isinstance(queries, torch.Tensor):
            return self.paint([queries], feature_maps, tokens, [cast(tuple[int, int, int, int], grid)])[0]
        grids = cast(Sequence[tuple[int, int, int, int]], grid)
        asked = [index for index, query in enumerate(queries) if len(query)]
        masks = [tokens.new_zeros(0, 0, 0, 0) for _ in queries]
        if asked and len(asked) < len(queries):  # images without a query are left out
            spans = torch.arange(len(tokens), device=tokens.device).split([math.prod(row) for row in grids])
            kept = torch.cat([spans[index] for index in asked])
            feature_maps, tokens = tuple(part[kept] for part in feature_maps), tokens[kept]
        if asked:
            painted = self.paint([queries[i] for i in asked], feature_maps, tokens, [grids[i] for i in asked])
            for index, mask in zip(asked, painted, strict=True):
                masks[index] = mask
        return masks

    def paint_owned(
        self,
        queries: torch.Tensor,
        owners: Sequence[int],
        feature_maps: tuple[torch.Tensor, ...],
        tokens: torch.Tensor,
        grids: Sequence[tuple[int, int, int, int]],
    ) -> list[torch.Tensor]:
        """Mask logits [D, H, W] of each query in the image that owns it, in the order of the queries.

        Args:
            queries: [masks, D_text].
            owners: the image of each query.
            feature_maps, tokens, grids: of all images, see `forward`.
        """
        rows = [[row for row, owner in enumerate(owners) if owner == image] for image in range(len(grids))]
        painted = self([queries[of_image] for of_image in rows], feature_maps, tokens, grids)
        masks = {
            row: mask
            for of_image, parts in zip(rows, painted, strict=True)
            for row, mask in zip(of_image, parts, strict=True)
        }
        return [masks[row] for row in range(len(queries))]


def assemble(patches: torch.Tensor, grid: tuple[int, int, int, int]) -> torch.Tensor:
    """Slices of patches back on the canvas: [N, C, H, W] -> [C, Z*S, Y*H, X*W]."""
    z, y, x, s = grid
    cells = patches.unflatten(0, (z, y, x, s)).permute(4, 0, 3, 1, 5, 2, 6)
    return cells.flatten(5, 6).flatten(3, 4).flatten(1, 2)


def sinusoid_2d(size: torch.Size, width: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Fixed positions [h*w, width]: half of the channels for the row, half for the column."""
    height, breadth = size
    per_axis = -(-width // 4) * 2
    frequencies = 1.0 / (10000 ** (torch.arange(0, per_axis, 2, device=device).float() / per_axis))

    def table(length: int) -> torch.Tensor:
        angles = torch.arange(length, device=device).float()[:, None] * frequencies
        return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)  # [length, per_axis]

    rows = table(height)[:, None].expand(height, breadth, per_axis)
    columns = table(breadth)[None].expand(height, breadth, per_axis)
    return torch.cat([rows, columns], dim=-1)[..., :width].reshape(height * breadth, width).to(dtype)


__all__ = ["CTInstructSegmentationDecoder"]
