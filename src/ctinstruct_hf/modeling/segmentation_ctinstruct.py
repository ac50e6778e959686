"""The segmentation decoder (section 3.2, figure 4): a U-Net paints features, a text-prompted transformer chooses.

Names of dimensions: N slices, C queries, D_text the width of a query, h x w the last feature map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

from .configuration_ctinstruct import CTInstructSegmentationConfig
from .saving_ctinstruct import SavesItsCode
from .vision_blocks_ctinstruct import ConvNorm, eager_attention, fastest_layout, init_weights, needs_plain_forward


class UpBlock(GradientCheckpointingLayer):
    """Transposed convolution, join with the skip map, two convolutions with batch norm."""

    def __init__(self, in_channels: int, skip_channels: int, factor: int) -> None:
        super().__init__()
        out = skip_channels
        self.up = nn.ConvTranspose2d(in_channels, out, factor, stride=factor, bias=False)
        self.first = ConvNorm(nn.Conv2d(2 * out, out, 3, padding=1, bias=False), "leaky_relu")
        self.second = ConvNorm(nn.Conv2d(out, out, 3, padding=1, bias=False), "leaky_relu")

    def raise_to(self, hidden: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        """`hidden` at the size of `skip`."""
        return self.up(hidden)

    def forward(self, hidden: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        joined = torch.cat([self.raise_to(hidden, skip), skip], dim=1)
        return self.second(self.first(fastest_layout(joined)))


class TokenUpBlock(UpBlock):
    """The first step, from the slice's token [N, D, 1, 1] to the last map's h x w; patches of another side than
    `last_map_size` stands for are interpolated."""

    def raise_to(self, hidden: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        # a transposed convolution of one pixel is a matrix product, and much faster as one
        weight = self.up.weight  # [D, C, side, side]
        if weight.is_meta:  # offloaded: only the module's own call brings it back
            raised = self.up(hidden)
        else:
            raised = (hidden.flatten(1) @ weight.flatten(1)).view(-1, *weight.shape[1:])
        if raised.shape[-2:] != skip.shape[-2:]:
            raised = F.interpolate(raised, size=skip.shape[-2:], mode="bilinear", align_corners=False)
        return raised


class CrossAttention(nn.Module):
    """Queries [N, C, D_text] attend to the places [N, h*w, D_text] of their slice."""

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


class DetailBlock(GradientCheckpointingLayer):
    """A map at full resolution: the slices as they are join what the U-Net knows of the place. Not in the paper.

    [N, C_slices, H, W] and [N, C_stem, H / 2, W / 2] -> [N, C_detail, H, W].
    """

    def __init__(self, slice_channels: int, stem_channels: int, out: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(stem_channels, out, 2, stride=2, bias=False)
        self.first = ConvNorm(nn.Conv2d(slice_channels, out, 3, padding=1, bias=False), "leaky_relu")
        self.second = ConvNorm(nn.Conv2d(2 * out, out, 1, bias=False), "leaky_relu")

    def forward(self, slices: torch.Tensor, half: torch.Tensor) -> torch.Tensor:
        joined = torch.cat([self.up(half), self.first(fastest_layout(slices))], dim=1)
        return self.second(fastest_layout(joined))


class CTInstructSegmentationDecoder(SavesItsCode, PreTrainedModel):
    """Masks of one image from the tower's maps and tokens, one per query."""

    config_class = CTInstructSegmentationConfig
    config: CTInstructSegmentationConfig
    base_model_prefix = "segmentation_decoder"
    main_input_name = "queries"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _no_split_modules = ["UpBlock", "TokenUpBlock", "DecoderLayer"]

    def __init__(self, config: CTInstructSegmentationConfig) -> None:
        super().__init__(config)
        channels = list(config.feature_channels)
        slice_channels = channels.pop(0) if config.detail_channels else 0
        width = config.hidden_size
        self.token_block = TokenUpBlock(channels[-1], channels[-1], config.last_map_size)
        self.blocks = nn.ModuleList(
            [UpBlock(deep, skip, 2) for deep, skip in zip(channels[:0:-1], channels[-2::-1], strict=True)]
        )
        self.last_up = nn.ConvTranspose2d(channels[0], channels[0], 2, stride=2, bias=False)
        self.detail = (
            DetailBlock(slice_channels, channels[0], config.detail_channels) if config.detail_channels else None
        )
        if config.detail_channels:  # a name that no module has would stop FSDP
            self._no_split_modules = [*self._no_split_modules, "DetailBlock"]
        self.fuse = nn.Sequential(nn.Linear(sum(channels), width), nn.GELU(), nn.Linear(width, width), nn.GELU())
        self.layers = nn.ModuleList([DecoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(width)
        self.mask_embedding = nn.Sequential(
            nn.Linear(width, config.mask_hidden_size),
            nn.GELU(),
            nn.Linear(config.mask_hidden_size, channels[0] + config.detail_channels),
            nn.GELU() if config.mask_activation else nn.Identity(),
        )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        init_weights(module, self.config.initializer_range)

    def unet_maps(self, feature_maps: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Without the slices, if they come before them."""
        return feature_maps[1:] if self.detail is not None else feature_maps

    def coarse(self, feature_maps: tuple[torch.Tensor, ...], tokens: torch.Tensor) -> torch.Tensor:
        """The first two steps of the U-Net, small in pixels and large in weights: [N, C, H / 16, W / 16]."""
        hidden = self.token_block(tokens[:, :, None, None], feature_maps[-1])
        return self.blocks[0](hidden, feature_maps[-2])

    def fine(self, feature_maps: tuple[torch.Tensor, ...], hidden: torch.Tensor) -> torch.Tensor:
        """The rest of the U-Net up to half resolution, large in pixels: [N, C_stem, H / 2, W / 2]."""
        for block, skip in zip(self.blocks[1:], self.unet_maps(feature_maps)[-3::-1], strict=True):
            hidden = block(hidden, skip)
        return hidden

    def memory(self, feature_maps: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values Z_f of equation 3, [N, h*w, D_text], the same for all queries."""
        size = feature_maps[-1].shape[-2:]
        pooled = [F.avg_pool2d(part, part.shape[-1] // size[-1]) for part in self.unet_maps(feature_maps)]
        values = self.fuse(torch.cat(pooled, dim=1).flatten(2).transpose(1, 2))
        return values + sinusoid_2d(size, values.shape[-1], values.device, values.dtype), values

    def mask_embeddings(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """[C, D_text] queries -> [N, C, C_stem + C_detail], since every slice answers for itself."""
        states = queries.to(values.dtype)[None].expand(values.shape[0], -1, -1)
        for layer in self.layers:
            states = layer(states, keys, values)
        return self.mask_embedding(self.norm(states))

    def paint(self, embeddings: torch.Tensor, half: torch.Tensor, detail: torch.Tensor | None = None) -> torch.Tensor:
        """Dot product of mask embeddings [N, C, C_stem + C_detail] with the maps at full resolution: [N, C, H, W]."""
        if detail is None:
            return self.paint_half(embeddings, half)
        stem, fine = embeddings.split([half.shape[1], detail.shape[1]], dim=2)
        return self.paint_half(stem, half) + torch.einsum("ncd,ndhw->nchw", fine, detail)

    def paint_half(self, embeddings: torch.Tensor, half: torch.Tensor) -> torch.Tensor:
        """Dot product of [N, C, C_stem] with the U-Net's map, brought to full resolution: [N, C, H, W].

        The last upsampling is linear, so the embeddings go through its kernel instead of the map: equal, and cheaper
        while there are fewer queries than channels.
        """
        count, queries, _ = embeddings.shape
        if queries >= half.shape[1] or self.last_up.weight.is_meta:
            return torch.einsum("ncd,ndhw->nchw", embeddings, self.last_up(half))
        kernel = torch.einsum("ncd,edij->ncije", embeddings, self.last_up.weight)  # [N, C, 2, 2, C_stem]
        height, width = half.shape[-2:]
        painted = torch.einsum("nke,nehw->nkhw", kernel.flatten(1, 3), half)
        return F.pixel_shuffle(painted.reshape(count, queries * 4, height, width), 2)

    def forward(
        self,
        queries: torch.Tensor | Sequence[torch.Tensor],
        feature_maps: tuple[torch.Tensor, ...],
        tokens: torch.Tensor,
        grid: tuple[int, int, int, int] | Sequence[tuple[int, int, int, int]],
        rows: slice | None = None,
    ) -> torch.Tensor | list[torch.Tensor]:
        """Mask logits on the canvas of one image, or of each of several.

        Args:
            queries: T_seg [C, D_text]; a list of them for several images, where an image may have none.
            feature_maps: the tower's maps [N, ...].
            tokens: the tower's tokens [N, D].
            grid: patches along depth, height and width, slices per patch; a list of them for several images.
            rows: the slices of a single image among the N (all by default). Several images have theirs one after the
                other. While training, their statistics in batch norm are joint.

        Returns:
            [C, Z*S, Y*patch_height, X*patch_width], or a list of such.
        """
        several = not isinstance(queries, torch.Tensor)
        if several:
            each: list[torch.Tensor] = list(queries)
            grids: list[Any] = list(grid)
            sizes = [math.prod(one) for one in grids]
            spans = [slice(end - size, end) for end, size in zip(accumulate(sizes), sizes, strict=True)]
        else:
            each, grids = [cast(torch.Tensor, queries)], [grid]
            spans = [rows if rows is not None else slice(0, tokens.shape[0])]
        asked = [index for index, one in enumerate(each) if len(one)]
        if needs_plain_forward(self):
            painted = self.paint_together(each, feature_maps, tokens, grids, spans, asked)
        else:
            painted = {
                index: self.paint_in_chunks(each[index], feature_maps, tokens, grids[index], spans[index])
                for index in asked
            }
        if not several:
            return painted[0]
        return [painted[index] if index in painted else tokens.new_zeros(0, 0, 0, 0) for index in range(len(each))]

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
        painted = self([queries[own] for own in rows], feature_maps, tokens, grids)
        masks = {
            row: mask for own, parts in zip(rows, painted, strict=True) for row, mask in zip(own, parts, strict=True)
        }
        return [masks[row] for row in range(len(queries))]

    def paint_together(
        self,
        queries: Sequence[torch.Tensor],
        feature_maps: tuple[torch.Tensor, ...],
        tokens: torch.Tensor,
        grids: Sequence[tuple[int, int, int, int]],
        spans: Sequence[slice],
        asked: Sequence[int],
    ) -> dict[int, torch.Tensor]:
        """The U-Net runs once over the slices of all images that are asked about, then each image is painted."""
        maps, seen = feature_maps, tokens
        if len(asked) == 1:
            maps, seen = tuple(part[spans[asked[0]]] for part in feature_maps), tokens[spans[asked[0]]]
        elif len(asked) < len(queries):
            kept = torch.cat([torch.arange(spans[one].start, spans[one].stop, device=tokens.device) for one in asked])
            maps, seen = tuple(part[kept] for part in feature_maps), tokens[kept]
        keys, values = self.memory(maps)
        half = self.fine(maps, self.coarse(maps, seen))
        detail = None if self.detail is None else self.detail(maps[0], half)
        sizes = [spans[one].stop - spans[one].start for one in asked]
        painted = {}
        details = [None] * len(sizes) if detail is None else detail.split(sizes)
        for one, key, value, part, own in zip(
            asked, keys.split(sizes), values.split(sizes), half.split(sizes), details, strict=True
        ):
            embeddings = self.mask_embeddings(queries[one], key, value)
            painted[one] = assemble(self.paint(embeddings, part, own), grids[one])
        return painted

    def paint_in_chunks(
        self,
        queries: torch.Tensor,
        feature_maps: tuple[torch.Tensor, ...],
        tokens: torch.Tensor,
        grid: tuple[int, int, int, int],
        rows: slice,
    ) -> torch.Tensor:
        """The same masks with bounded memory: more slices at once where maps are small, fewer where they are large."""
        z, y, x, s = grid
        step = self.config.slice_chunk_size
        canvas: torch.Tensor | None = None
        for start in range(rows.start, rows.stop, 4 * step):
            wide = slice(start, min(start + 4 * step, rows.stop))
            maps = tuple(part[wide] for part in feature_maps)
            embeddings = self.mask_embeddings(queries, *self.memory(maps))
            hidden = self.coarse(maps, tokens[wide])
            for first in range(0, wide.stop - wide.start, step):
                narrow = slice(first, first + step)
                few = tuple(part[narrow] for part in maps)
                half = self.fine(few, hidden[narrow])
                detail = None if self.detail is None else self.detail(few[0], half)
                painted = self.paint(embeddings[narrow], half, detail)
                if canvas is None:
                    height, width = painted.shape[-2:]
                    canvas = painted.new_empty((painted.shape[1], z, s, y, height, x, width))
                for offset, part in enumerate(painted):
                    patch, place = divmod(start - rows.start + first + offset, s)
                    plane, row, column = patch // (y * x), patch // x % y, patch % x
                    canvas[:, plane, place, row, :, column, :] = part
        assert canvas is not None
        return canvas.flatten(5, 6).flatten(3, 4).flatten(1, 2)


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
