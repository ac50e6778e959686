"""The vision tower (section 3.2): a ResNet2D reads every slice, attention relates patches, then slices.

Names of dimensions, the same everywhere: N slices of all images, D width of a token, Z x Y x X the patches of one image
along depth, height and width, S slices in a patch, h x w the last feature map, B images of one grid.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import ModelOutput

from .configuration_ctinstruct import CTInstructError, CTInstructVisionConfig
from .saving_ctinstruct import SavesItsCode
from .vision_ablations_ctinstruct import ResNet3D, ViT3D
from .vision_blocks_ctinstruct import (
    Bottleneck,
    ConvNorm,
    channels_last,
    eager_attention,
    init_weights,
    is_plain,
    needs_plain_forward,
)

PatchGrid = torch.Tensor | Sequence[Sequence[int]]
CELLS_PER_SLICE = 128  # attention takes this many cells at once in inference for each slice that the encoder takes


@dataclass
class CTInstructVisionOutput(ModelOutput):
    """What the tower makes of a batch of slices, and what `get_image_features` returns.

    Attributes:
        last_hidden_state: [N, D] one token per slice of each patch, in the order of `pixel_values` (Z of equation 2).
        pooler_output: list with one [tokens, D_text] per image, what the language model sees; only from
            `get_image_features`.
        feature_maps: five maps [N, C, H, W] from half resolution to a thirty-second, for the segmentation decoder; before
            them, with `keeps_slices`, the slices.
        patch_grid: int64 [num_images, 4].
        hidden_states: [N, h*w, D] before each attention layer and after the last, if asked for; images of one grid
            come together, in the order of the grids.
        attentions: weights [groups, heads, cells, cells] of each layer, if asked for and computed eagerly; a tuple of
            them, one per grid, where images have several.
    """

    last_hidden_state: torch.Tensor | None = None
    pooler_output: list[torch.Tensor] | None = None
    feature_maps: tuple[torch.Tensor, ...] | None = None
    patch_grid: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


def grid_rows(patch_grid: PatchGrid) -> list[tuple[int, int, int, int]]:
    """`patch_grid` as Python numbers. A list of tuples passes through, which keeps `torch.compile` in one graph."""
    rows = patch_grid.tolist() if isinstance(patch_grid, torch.Tensor) else patch_grid
    return [(int(z), int(y), int(x), int(s)) for z, y, x, s in rows]


class SliceEncoder(nn.Module):
    """ResNet2D. Grey slices [N, H, W] in, five maps [N, C, H / 2^k, W / 2^k] out; with `keeps_slices`, after the slices.

    The first map is the stem convolution's output before its norm, as released.
    """

    def __init__(self, config: CTInstructVisionConfig) -> None:
        super().__init__()
        self.slice_chunk_size = config.slice_chunk_size
        self.keeps_slices = config.keeps_slices
        self.windows = [(float(low), float(high)) for low, high in config.stem_windows]
        if not all(low < high for low, high in self.windows):
            raise CTInstructError(f"stem_windows is {self.windows}: give [low, high] of each window.")
        seen = max(len(self.windows), 1)
        self.stem = ConvNorm(nn.Conv2d(seen, config.stem_channels, 7, stride=2, padding=3, bias=False))
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        channels = config.stem_channels
        stages = []
        for index, (planes, depth) in enumerate(zip(config.bottleneck_planes, config.stage_depths, strict=True)):
            blocks = []
            for block in range(depth):
                stride = 2 if index > 0 and block == 0 else 1
                blocks.append(Bottleneck(channels, planes, planes * config.bottleneck_expansion, stride))
                channels = planes * config.bottleneck_expansion
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)

    def windowed(self, slices: torch.Tensor) -> torch.Tensor:
        """[n, H, W] -> [n, windows, H, W], each window stretched to −1…1; [n, 1, H, W] without windows."""
        if not self.windows:
            return slices[:, None]
        seen = [(slices.clamp(low, high) - low) * (2 / (high - low)) - 1 for low, high in self.windows]
        return torch.stack(seen, dim=1)

    def encode(self, slices: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """One pass over [n, H, W] slices."""
        seen = channels_last(self.windowed(slices))
        stem = self.stem.conv(seen)
        maps = [seen, stem] if self.keeps_slices else [stem]
        hidden = self.pool(F.relu(self.stem.norm(stem)))
        for stage in self.stages:
            hidden = stage(hidden)
            maps.append(hidden)
        return tuple(maps)

    def forward(self, pixel_values: torch.Tensor, slice_mask: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        if needs_plain_forward(self):
            return self.encode(pixel_values)
        return self.encode_in_chunks(pixel_values, slice_mask)

    def encode_in_chunks(self, pixel_values: torch.Tensor, slice_mask: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """The same maps with bounded memory; padding slices, all alike, are computed once."""
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
        for chunk in rows.split(self.slice_chunk_size):
            encoded = self.encode(pixel_values[chunk])
            if not maps:
                maps = [channels_last(part.new_empty((count, *part.shape[1:]))) for part in encoded]
            for whole, part in zip(maps, encoded, strict=True):
                whole[chunk] = part
        for whole in maps:
            if len(padding) > 1:
                whole[padding[1:]] = whole[padding[0]].clone()
        return tuple(maps)


class PositionConv(nn.Module):
    """Depthwise 3 x 3 x 3 convolution as position encoding; in depth it looks back only. [B, Z, Y, X, D] both ways."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(width, width, 3, groups=width)

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        return self.conv(self.padded(volume)).movedim(1, -1)

    def add_to(self, volume: torch.Tensor, budget: int) -> None:
        """Add the encoding to `volume` in place, as many channels at once as `budget` numbers hold."""
        if not is_plain(self.conv):
            volume += self(volume)
            return
        width = volume.shape[-1]
        step = max(budget // (volume.numel() // width) // 16, 1) * 16
        for first in range(0, width, step):
            own = slice(first, min(first + step, width))
            weight, bias = self.conv.weight[own], self.conv.bias[own]
            encoding = F.conv3d(self.padded(volume[..., own]), weight, bias, groups=own.stop - first)
            volume[..., own] += encoding.movedim(1, -1)

    @staticmethod
    def padded(volume: torch.Tensor) -> torch.Tensor:
        """[B, Z, Y, X, C] -> [B, C, Z + 2, Y + 2, X + 2]."""
        return F.pad(volume.movedim(-1, 1), (1, 1, 1, 1, 2, 0))


class RelativePositionBias(nn.Module):
    """Continuous relative position bias: log-spaced offsets -> MLP -> one number per attention head."""

    def __init__(self, width: int, heads: int, axes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(axes, width), nn.Linear(width, width)])
        self.out = nn.Linear(width, heads)

    def forward(self, *sizes: int) -> torch.Tensor:
        """Bias [heads, L, L] over a grid of `sizes`, L its cells. Each different offset is computed once."""
        device, dtype = self.out.weight.device, self.out.weight.dtype
        offsets = torch.stack(
            torch.meshgrid(*[torch.arange(1 - size, size, device=device) for size in sizes], indexing="ij"), dim=-1
        ).flatten(0, -2)
        hidden = torch.sign(offsets) * torch.log(offsets.abs() + 1.0)
        hidden = hidden.to(dtype)
        for layer in self.layers:
            hidden = F.leaky_relu(layer(hidden), 0.1)
        table = self.out(hidden)  # [offsets, heads]
        cells = torch.meshgrid(*[torch.arange(size, device=device) for size in sizes], indexing="ij")
        place = torch.zeros_like(cells[0])  # of a cell in the table, had its axes the lengths of the table's
        middle = 0
        for cell, size in zip(cells, sizes, strict=True):
            place = place * (2 * size - 1) + cell
            middle = middle * (2 * size - 1) + size - 1
        place = place.flatten()
        return table.t()[:, place[:, None] - place[None] + middle]


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
    """GEGLU behind its own LayerNorm."""

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
    """Position convolution, attention within groups of cells, feed-forward; each added to what came in."""

    def __init__(self, config: CTInstructVisionConfig, width: int) -> None:
        super().__init__()
        self.chunk_cells = CELLS_PER_SLICE * config.slice_chunk_size
        self.position = PositionConv(width)
        self.attention = CosineAttention(config, width)
        self.feed_forward = GatedFeedForward(width, config.feed_forward_multiple)

    def forward(
        self,
        volume: torch.Tensor,
        grouping: Grouping,
        bias: torch.Tensor | None,
        kept: torch.Tensor | None = None,
        in_place: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The volume [B, Z*S, Y*h, X*w, D] after this layer, and the attention weights where they are to be had.

        Args:
            bias: [1 or groups, heads or 1, 1 or cells, cells].
            kept: bool [groups, cells] of keys that are no padding; only with `in_place`.
            in_place: change `volume` itself, chunk by chunk, with bounded memory.
        """
        if in_place:
            volume = volume.contiguous()
            self.update(volume, grouping, bias, kept)
            return volume, None
        volume = volume + self.position(volume)
        tokens = grouping.split(volume)
        mixed, weights = self.attention(tokens, bias)
        tokens = tokens + mixed
        tokens = tokens + self.feed_forward(tokens)
        return grouping.join(tokens), weights

    def update(
        self, volume: torch.Tensor, grouping: Grouping, bias: torch.Tensor | None, kept: torch.Tensor | None
    ) -> None:
        """`forward` in place, of a contiguous volume."""
        self.position.add_to(volume, self.chunk_cells * volume.shape[-1])
        groups, leading = grouping.view(volume)
        counts = groups.shape[:leading]
        size = math.prod(groups.shape[leading:-1])
        for chunk in torch.arange(math.prod(counts), device=volume.device).split(max(self.chunk_cells // size, 1)):
            places = torch.unravel_index(chunk, counts)
            cells = groups[places]
            tokens = cells.flatten(1, -2)
            own = bias
            if kept is not None:
                padding = padding_bias(kept[chunk], volume.dtype)
                own = padding if bias is None else bias + padding
            mixed, _ = self.attention(tokens, own)
            groups[places] = (tokens + mixed).view_as(cells)
        for tokens in volume.flatten(0, -2).split(self.chunk_cells):
            tokens += self.feed_forward(tokens)


@dataclass(frozen=True)
class Grouping:
    """Which cells of a volume [B, Z*S, Y*h, X*w, D] attend to each other.

    Attributes:
        grid: patches Z, Y, X and slices S.
        map_size: h, w of the map within a patch (1, 1 once pooled).
        over: `patches`: the same slice of all patches; `slices`: all slices of one patch at one place;
            `column`: all slices of the whole grid at one place.
    """

    grid: tuple[int, int, int, int]
    map_size: tuple[int, int]
    over: str

    def view(self, volume: torch.Tensor) -> tuple[torch.Tensor, int]:
        """[B, Z*S, Y*h, X*w, D] as a view [*groups, *cells, D], and how many axes count groups."""
        (z, y, x, s), (h, w) = self.grid, self.map_size
        cells = volume.view(-1, z, s, y * h, x * w, volume.shape[-1])
        if self.over == "patches":
            return cells.transpose(1, 2), 2
        if self.over == "slices":
            return cells.permute(0, 1, 3, 4, 2, 5), 4
        return cells.permute(0, 3, 4, 1, 2, 5), 3

    def split(self, volume: torch.Tensor) -> torch.Tensor:
        """[B, Z*S, Y*h, X*w, D] -> [groups, cells, D]."""
        groups, leading = self.view(volume.contiguous())
        return groups.reshape(math.prod(groups.shape[:leading]), -1, volume.shape[-1])

    def join(self, tokens: torch.Tensor) -> torch.Tensor:
        """The inverse of `split`."""
        (z, y, x, s), (h, w) = self.grid, self.map_size
        width = tokens.shape[-1]
        if self.over == "patches":
            cells = tokens.reshape(-1, s, z, y * h, x * w, width).transpose(1, 2)
        elif self.over == "slices":
            cells = tokens.reshape(-1, z, y * h, x * w, s, width).permute(0, 1, 4, 2, 3, 5)
        else:
            cells = tokens.reshape(-1, y * h, x * w, z, s, width).permute(0, 3, 4, 1, 2, 5)
        return cells.reshape(-1, z * s, y * h, x * w, width)


@dataclass(frozen=True)
class ReleasedGrouping(Grouping):
    """The released code's groups. Patch-wise: the in-plane patches of one slice. Slice-wise: a column of slices, whose
    tokens the position convolution reads as if they were ordered slice by slice, which they are not; the released
    weights were trained with it."""

    def view(self, volume: torch.Tensor) -> tuple[torch.Tensor, int]:
        z, y, x, s = self.grid
        return volume.view(-1, y * x if self.over == "patches" else z * s, volume.shape[-1]), 1

    def join(self, tokens: torch.Tensor) -> torch.Tensor:
        z, y, x, s = self.grid
        return tokens.reshape(-1, z * s, y, x, tokens.shape[-1])


def padding_bias(keys_kept: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Additive mask [groups, 1, 1, cells] from bool [groups, cells]."""
    bias = torch.zeros(keys_kept.shape, dtype=dtype, device=keys_kept.device)
    return bias.masked_fill(~keys_kept, torch.finfo(dtype).min)[:, None, None, :]


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
    """Hidden states [N, h*w, D] before each layer and after the last, and attention weights, for those who ask."""

    def __init__(self) -> None:
        self.states: list[torch.Tensor] = []
        self.attentions: list[torch.Tensor | None] = []

    def state(self, volume: torch.Tensor, layout: VolumeLayout) -> torch.Tensor:
        """Takes the state down and gives it back, so that its gradient can be kept."""
        self.states.append(layout.rows(volume))
        return layout.volume(self.states[-1])


class SliceAttention(nn.Module):
    """Patch-wise, then slice-wise attention over the last map of the slice encoder.

    `attention_layout="paper"` (section 3.2) attends on the h x w grid and pools afterwards; `"released"` pools first.
    """

    def __init__(self, config: CTInstructVisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.released = config.attention_layout == "released"
        self.chunk_cells = CELLS_PER_SLICE * config.slice_chunk_size
        self.patch_layers = nn.ModuleList(
            [AttentionLayer(config, width) for _ in range(config.num_patch_attention_layers)]
        )
        self.patch_norm = nn.LayerNorm(width, bias=False)
        self.position_bias = RelativePositionBias(width, config.num_attention_heads, axes=2 if self.released else 3)
        self.slice_layers = nn.ModuleList(
            [AttentionLayer(config, width) for _ in range(config.num_slice_attention_layers)]
        )
        self.slice_norm = nn.LayerNorm(width, bias=False)

    def forward(
        self, last_map: torch.Tensor, grid: tuple[int, int, int, int], kept: torch.Tensor, trace: Trace | None = None
    ) -> torch.Tensor:
        """Tokens of B images that share one grid.

        Args:
            last_map: [B*Z*Y*X*S, D, h, w].
            grid: Z, Y, X, S.
            kept: bool [B, Z*Y*X*S], False for padding slices.
            trace: takes down what is between the layers.

        Returns:
            [B*Z*Y*X*S, D].
        """
        z, y, x, _s = grid
        if self.released:
            last_map = last_map.mean(dim=(2, 3), keepdim=True)
        h, w = last_map.shape[2:]
        layout = VolumeLayout(grid, (h, w))
        volume = layout.volume(last_map.flatten(2).transpose(1, 2))  # [B, Z*S, Y*h, X*w, D]
        in_place = not (needs_plain_forward(self) or trace)
        if in_place and volume.untyped_storage().data_ptr() == last_map.untyped_storage().data_ptr():
            volume = volume.clone()  # the map itself is given back
        kept_volume = layout.volume(kept.reshape(-1, 1, 1).expand(-1, h * w, 1))
        no_padding = in_place and bool(kept.all())
        make = ReleasedGrouping if self.released else Grouping
        patches, slices = make(grid, (h, w), "patches"), make(grid, (h, w), "column" if self.released else "slices")
        column = Grouping(grid, (h, w), "column")

        def run(
            layer: AttentionLayer,
            volume: torch.Tensor,
            groups: Grouping,
            bias: torch.Tensor | None,
            keys: torch.Tensor | None,
        ) -> torch.Tensor:
            if in_place:
                return layer(volume, groups, bias, None if no_padding else keys, in_place=True)[0]
            volume, weights = layer(volume, groups, bias)
            if trace:
                trace.attentions.append(weights)
            return volume

        if self.released:
            bias, keys = self.position_bias(y, x)[None], None
        else:
            bias, keys = self.position_bias(z, y * h, x * w)[None], patches.split(kept_volume)[..., 0]
            if not in_place:  # once for all layers
                bias = bias + padding_bias(keys, bias.dtype)
        for layer in self.patch_layers:
            volume = trace.state(volume, layout) if trace else volume
            volume = run(layer, volume, patches, bias, keys)
        volume = self.normed(self.patch_norm, volume, in_place)

        keys = (column if self.released else slices).split(kept_volume)[..., 0]
        bias = None if in_place else padding_bias(keys, volume.dtype)
        for layer in self.slice_layers:
            volume = trace.state(volume, layout) if trace else volume
            if self.released:  # the layers read a column's tokens in the released, mixed order
                volume = slices.join(column.split(volume))
            volume = run(layer, volume, slices, bias, keys)
            if self.released:
                volume = column.join(slices.split(volume))
        volume = self.normed(self.slice_norm, volume, in_place)
        volume = trace.state(volume, layout) if trace else volume
        return layout.means(volume)  # equation 2

    def normed(self, norm: nn.LayerNorm, volume: torch.Tensor, in_place: bool) -> torch.Tensor:
        """The volume after a norm."""
        if not in_place:
            return norm(volume)
        volume = volume.contiguous()
        for tokens in volume.flatten(0, -2).split(self.chunk_cells):
            tokens.copy_(norm(tokens))
        return volume


class CTInstructVisionModel(SavesItsCode, PreTrainedModel):
    """The vision tower. `vision_config.architecture` chooses the paper's (`hybrid`) or one of its ablations."""

    config_class = CTInstructVisionConfig
    config: CTInstructVisionConfig
    base_model_prefix = "vision_tower"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _no_split_modules = ["Bottleneck", "AttentionLayer"]

    def __init__(self, config: CTInstructVisionConfig) -> None:
        super().__init__(config)
        if config.architecture == "hybrid":
            self.encoder = SliceEncoder(config)
            self.attention = SliceAttention(config)
        elif config.architecture == "resnet3d":
            self.encoder = ResNet3D(config)
        else:
            self.encoder = ViT3D(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The layer that reads the pixels."""
        return self.encoder.stem.conv if hasattr(self.encoder.stem, "conv") else self.encoder.stem

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        init_weights(module, self.config.initializer_range)
        if isinstance(module, CosineAttention):
            module.reset_scales()

    def forward(
        self,
        pixel_values: torch.Tensor,
        patch_grid: PatchGrid | None = None,
        slice_mask: torch.Tensor | None = None,
        output_hidden_states: bool | Sequence[int] | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: object,
    ) -> CTInstructVisionOutput | tuple:
        """Read every slice once.

        Args:
            pixel_values: [N, patch_height, patch_width], prepared intensities; heights and widths divide by 32.
            patch_grid: int64 [num_images, 4] (or the same as tuples of ints, which keeps `torch.compile` in one
                graph): patches along depth, height, width and slices per patch. Without it the slices are one stack.
            slice_mask: bool [N], False where a slice is only padding. Without it all slices count.

        Raises:
            ValueError: where `patch_grid` and `pixel_values` disagree.
        """
        count = pixel_values.shape[0]
        grids = [(1, 1, 1, count)] if patch_grid is None else grid_rows(patch_grid)
        sizes = [z * y * x * s for z, y, x, s in grids]
        if sum(sizes) != count:
            raise CTInstructError(f"patch_grid counts {sum(sizes)} slices, but pixel_values has {count}.")
        kept = torch.ones(count, dtype=torch.bool, device=pixel_values.device) if slice_mask is None else slice_mask
        pixel_values = pixel_values.to(self.dtype)
        if self.config.architecture == "hybrid":
            maps = self.encoder(pixel_values, slice_mask)
        else:
            maps = self.encoder(pixel_values, grids)

        by_grid: dict[tuple[int, int, int, int], list[int]] = defaultdict(list)
        for index, grid in enumerate(grids):
            by_grid[grid].append(index)
        starts = [sum(sizes[:index]) for index in range(len(sizes))]
        wants_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        wants_weights = self.config.output_attentions if output_attentions is None else output_attentions
        tokens: list[torch.Tensor] = [maps[-1]] * len(grids)
        traces = [Trace() if wants_states or wants_weights else None for _ in by_grid]
        for (grid, images), trace in zip(by_grid.items(), traces, strict=True):
            spans = [slice(starts[image], starts[image] + sizes[image]) for image in images]
            last_map = maps[-1] if len(by_grid) == 1 else torch.cat([maps[-1][span] for span in spans])
            if self.config.architecture == "hybrid":
                kept_rows = torch.stack([kept[span].bool() for span in spans])
                mixed = self.attention(last_map, grid, kept_rows, trace)
            else:
                mixed = last_map.mean(dim=(2, 3))
            for index, part in zip(images, mixed.chunk(len(images)), strict=True):
                tokens[index] = part
        output = CTInstructVisionOutput(
            last_hidden_state=torch.cat(tokens),
            feature_maps=tuple(maps),
            patch_grid=torch.tensor(grids, device=pixel_values.device),
        )
        if wants_states:
            states = [
                parts[0] if len(parts) == 1 else torch.cat(parts)
                for parts in zip(*(trace.states for trace in traces if trace), strict=True)
            ]
            if not isinstance(wants_states, bool):  # Transformers also lets one name the layers
                named = {index % len(states) for index in wants_states}
                states = [state if index in named else None for index, state in enumerate(states)]
            output.hidden_states = tuple(states)
        if wants_weights and all(weights is not None for trace in traces if trace for weights in trace.attentions):
            per_layer = zip(*(trace.attentions for trace in traces if trace), strict=True)
            output.attentions = tuple(parts[0] if len(parts) == 1 else parts for parts in per_layer)
        use_dict = return_dict if return_dict is not None else self.config.return_dict
        return output if use_dict else output.to_tuple()


__all__ = ["CTInstructVisionModel", "CTInstructVisionOutput"]
