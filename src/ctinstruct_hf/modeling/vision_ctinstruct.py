"""The vision tower (section 3.2): a ResNet2D reads every slice, attention relates patches, then slices.

Read with `vision_attention_ctinstruct.py`. Names of dimensions, the same everywhere: N slices of all images, D width of a
token, Z x Y x X the patches of an image along depth, height and width, S slices in a patch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput

from .configuration_ctinstruct import CTInstructError, CTInstructVisionConfig
from .released_ctinstruct import ReleasedSliceAttention
from .saving_ctinstruct import SavesItsCode
from .small_models_ctinstruct import StemWindows
from .training_ctinstruct import CountsBatchesOnce
from .vision_attention_ctinstruct import CosineAttention, SliceAttention, Trace
from .vision_blocks_ctinstruct import Bottleneck, ConvNorm, PatchGrid, checkpointed_blocks, grid_rows, init_weights
from .vision_towers_ctinstruct import ResNet3D, ViT3D

_ALWAYS_THERE: Any = None  # `ModelOutput` wants defaults; the tower sets these fields


@dataclass
class CTInstructVisionOutput(ModelOutput):
    """Output of the tower for a batch of slices, and of `get_image_features`.

    Attributes:
        last_hidden_state: [N, D], a token per slice of each patch, in the order of `pixel_values` (Z of equation 2).
        pooler_output: list of [tokens, D_text] per image, which the language model reads; of a stage-one model
            [images, D_text], for retrieval. Only from `get_image_features`.
        feature_maps: five maps [N, C, H, W] from half resolution to a thirty-second, for the segmentation decoder; before
            them, with `keeps_slices`, the slices.
        patch_grid: int64 [num_images, 4].
        hidden_states: [N, h*w, D] before each attention layer and after the last, if asked for; images of the same grid
            are together, in the order of the grids.
        attentions: weights [groups, heads, cells, cells] of each layer, if asked for and computed eagerly; a tuple of
            them, by grid, where images have several grids.
    """

    last_hidden_state: torch.Tensor = _ALWAYS_THERE
    pooler_output: list[torch.Tensor] | torch.Tensor | None = None
    feature_maps: tuple[torch.Tensor, ...] | None = None
    patch_grid: torch.Tensor = _ALWAYS_THERE
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor | tuple[torch.Tensor, ...], ...] | None = None


class SliceEncoder(nn.Module):
    """ResNet2D. Grey slices [N, H, W] in, five maps [N, C, H / 2^k, W / 2^k] out; with `keeps_slices`, after the slices.

    The first map is the stem convolution's output before its norm, as released.
    """

    def __init__(self, config: CTInstructVisionConfig) -> None:
        super().__init__()
        self.keeps_slices = config.keeps_slices
        self.windows = StemWindows(config.stem_windows) if config.stem_windows else None
        in_channels = max(len(config.stem_windows), 1)
        self.stem = ConvNorm(nn.Conv2d(in_channels, config.stem_channels, 7, stride=2, padding=3, bias=False))
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

    def forward(
        self,
        pixel_values: torch.Tensor,
        grids: Sequence[tuple[int, int, int, int]] | None = None,
        slice_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Read each slice by itself, so that neither the grids nor the padding matter."""
        slices = pixel_values[:, None] if self.windows is None else self.windows(pixel_values)
        slices = slices.contiguous(memory_format=torch.channels_last)  # convolutions are fastest in it
        stem = self.stem.conv(slices)
        maps = [slices, stem] if self.keeps_slices else [stem]
        hidden = self.pool(F.relu(self.stem.norm(stem)))
        for stage in self.stages:
            hidden = stage(hidden)
            maps.append(hidden)
        return tuple(maps)


# `vision_config.architecture`: the paper's tower and the two of its table 4. Each gives five maps per slice.
TOWERS: dict[str, type[SliceEncoder | ResNet3D | ViT3D]] = {
    "hybrid": SliceEncoder,
    "resnet3d": ResNet3D,
    "vit3d": ViT3D,
}
# `vision_config.attention_layout` of the hybrid tower
ATTENTION_LAYOUTS = {"paper": SliceAttention, "released": ReleasedSliceAttention}


class CTInstructVisionModel(SavesItsCode, CountsBatchesOnce, PreTrainedModel):
    """The vision tower. `vision_config.architecture` chooses the paper's (`hybrid`) or one of its ablations."""

    config_class = CTInstructVisionConfig
    config: CTInstructVisionConfig
    base_model_prefix = "vision_tower"
    main_input_name = "pixel_values"
    input_modalities = ("image",)  # type: ignore[assignment]  # a tuple in Transformers' models too
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: CTInstructVisionConfig) -> None:
        super().__init__(config)
        self.encoder = TOWERS[config.architecture](config)
        self.attention = None
        if config.architecture == "hybrid":
            self.attention = ATTENTION_LAYOUTS[config.attention_layout](config)
        self._no_split_modules = checkpointed_blocks(self)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The layer that reads the pixels."""
        stem = self.encoder.stem
        return stem.conv if isinstance(stem, ConvNorm) else stem

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
            patch_grid: int64 [num_images, 4] (or the same as tuples of ints, which keeps `torch.compile` in a single
                graph): patches along depth, height, width and slices per patch. Without it all slices are a single stack.
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
        maps = self.encoder(pixel_values.to(self.dtype), grids, slice_mask)

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
            if self.attention is not None:
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
            if not isinstance(wants_states, bool):  # numbers of layers, as Transformers allows
                named = {index % len(states) for index in wants_states}
                states = [state if index in named else None for index, state in enumerate(states)]
            output.hidden_states = tuple(states)
        if wants_weights and all(weights is not None for trace in traces if trace for weights in trace.attentions):
            per_layer = zip(*(trace.attentions for trace in traces if trace), strict=True)
            output.attentions = tuple(parts[0] if len(parts) == 1 else parts for parts in per_layer)
        use_dict = return_dict if return_dict is not None else self.config.return_dict
        return output if use_dict else output.to_tuple()


__all__ = ["CTInstructVisionModel", "CTInstructVisionOutput"]
