"""Options and losses for tiny models, in neither the paper nor the release; off by default."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_ctinstruct import CTInstructError
from .losses_ctinstruct import weighted_mean
from .vision_blocks_ctinstruct import ConvNorm, PatchGrid, grid_rows


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


SHARPNESS = 4.0  # of `smooth_max` over projected tokens, whose channels have a spread below one


def smooth_max(scores: torch.Tensor, patch_grid: PatchGrid, slice_mask: torch.Tensor | None) -> torch.Tensor:
    """Log-mean-exp over the slices of each image: [N, C] -> [images, C] float32; padding slices do not count."""
    scores = scores.float()
    sizes = [z * y * x * s for z, y, x, s in grid_rows(patch_grid)]
    counts: list[int] = sizes
    if slice_mask is not None:
        kept = slice_mask.to(scores.device).bool()
        scores = scores.masked_fill(~kept[:, None], torch.finfo(scores.dtype).min)
        counts = [max(int(part.sum()), 1) for part in kept.split(sizes)]
    pooled = [part.logsumexp(0) - math.log(count) for part, count in zip(scores.split(sizes), counts, strict=True)]
    return torch.stack(pooled)


def hard_weights(losses: torch.Tensor, power: float, weights: torch.Tensor | None = None) -> torch.Tensor | None:
    """Weights [n] that are larger for names with a larger loss: `weights` times losses [n] to a power.

    A focal loss by name: once most names of a category grain are learned, a plain mean hardly moves the others.
    """
    if not power:
        return weights
    hard = losses.detach().clamp(min=1e-6) ** power
    return hard if weights is None else hard * weights.to(hard)


def label_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Binary cross entropy [names] of logits [images, names] over known labels; names without any are left out."""
    labels = labels.to(logits.device).float()
    kept = labels >= 0
    entropy = F.binary_cross_entropy_with_logits(logits.float(), labels, reduction="none") * kept
    counts = kept.sum(0)
    return (entropy.sum(0) / counts.clamp(min=1))[counts > 0]


def hard_label_loss(logits: torch.Tensor, labels: torch.Tensor, power: float) -> torch.Tensor:
    """L_cls of [images, categories], where categories count by how hard they are, see `hard_weights`."""
    losses = label_losses(logits, labels)
    return weighted_mean(losses, hard_weights(losses, power)) if len(losses) else logits.sum() * 0.0


def prompt_loss(queries: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Squared distance of prompts of the mask decoder [n, D] from those of its training, relative to their spread: 0 where
    they are equal, 1 for their mean."""
    wanted = wanted.to(queries.device, queries.dtype)
    spread = (wanted - wanted.mean(0)).square().mean().clamp(min=1e-3) if len(wanted) > 1 else wanted.square().mean()
    return (queries - wanted).square().mean() / spread


def cell_loss(
    features: Any,
    projection: nn.Module,
    score: Callable[[torch.Tensor], torch.Tensor],
    names: torch.Tensor,
    labels: Sequence[torch.Tensor],
    owners: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    hard_names: float = 0.0,
) -> torch.Tensor:
    """Category alignment of each cell of the tower's last map with the structures in it.

    A slice's label does not locate a finding, and the decoder marks it from earlier maps: neither teaches the cells, whose
    mean is the slice's token, to represent something small. Cells inside weigh sqrt(outside / inside), at most 10, since a
    lesion fills one or two cells of a slice.

    Args:
        features: with `hidden_states`, the cells [N, h*w, D] that the tokens are means of.
        projection, score: of the category grain: from cells to D_text, and from cosines to logits.
        names: [masks, D_text], the text embeddings that the decoder gets.
        labels: int8 [D, H, W] on the canvas per mask; a cell has a structure if one of its voxels has.
        owners: [masks], the image of each; 0 by default.
        weights: [masks], equal by default.
        hard_names: see `hard_weights`.
    """
    grids = grid_rows(features.patch_grid)
    by_grid = [image for grid in dict.fromkeys(grids) for image, other in enumerate(grids) if other == grid]
    cells = F.normalize(projection(features.hidden_states[-1]), dim=-1)
    # hidden states come in the order of the grids
    parts = cells.split([math.prod(grids[image]) for image in by_grid])
    cells_of = dict(zip(by_grid, parts, strict=True))
    texts = F.normalize(names, dim=-1)
    rows, columns = features.feature_maps[-1].shape[-2:]
    masks_of: dict[int, list[int]] = {}
    for mask, owner in enumerate([0] * len(names) if owners is None else owners.tolist()):
        masks_of.setdefault(owner, []).append(mask)
    losses: list[torch.Tensor] = [texts.sum() * 0.0] * len(names)
    for owner, masks in masks_of.items():
        z, y, x, s = grids[owner]
        voxels = torch.stack([labels[mask] for mask in masks]).to(cells.device)
        there = voxels.unflatten(3, (x, columns, -1)).unflatten(2, (y, rows, -1)).amax(dim=(4, 7))
        # cells in the order of pixel_values
        there = there.unflatten(1, (z, s)).permute(0, 1, 3, 5, 2, 4, 6).flatten(1).float()
        scores = score(cells_of[owner].flatten(0, 1) @ texts[masks].T)
        known = (there >= 0).float()
        inside = (there > 0).float().sum(1, keepdim=True)
        rarity = ((known.sum(1, keepdim=True) - inside) / inside.clamp(min=1)).sqrt().clamp(1, 10)
        entropy = F.binary_cross_entropy_with_logits(
            scores.T.float(), there.clamp(min=0), known, reduction="none", pos_weight=rarity
        )
        means = entropy.sum(1) / known.sum(1).clamp(min=1)
        for mask, loss in zip(masks, means, strict=True):
            losses[mask] = loss
    by_mask = torch.stack(losses)
    return weighted_mean(by_mask, hard_weights(by_mask, hard_names, weights))
