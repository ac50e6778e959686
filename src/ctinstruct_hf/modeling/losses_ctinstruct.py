"""The losses of both stages, each a mean, from logits and labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from .configuration_ctinstruct import CTInstructError


class _MaskLoss(torch.autograd.Function):
    """Cross entropy plus Dice, some slices at a time: of the canvas' size, only the logits and the labels are kept for the
    gradient."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, smooth: float, positive_weight: float
    ) -> torch.Tensor:
        sums = torch.zeros(5, device=logits.device)  # entropy, p t, p squared, t, count
        for scores, truth, kept in _chunks(logits, labels):
            entropy = F.softplus(scores)
            if positive_weight != 1:
                entropy *= truth * (positive_weight - 1) + 1
            entropy.addcmul_(scores, truth, value=-positive_weight)
            probability = scores.sigmoid_()
            if kept is not None:
                entropy *= kept
                probability *= kept
            flat, right = probability.flatten(), truth.flatten()
            number = kept.sum() if kept is not None else flat.new_tensor(flat.numel())
            sums += torch.stack([entropy.sum(), flat @ right, flat @ flat, right.sum(), number])
        entropy, overlap, squares, size, count = sums
        count_of = count.clamp(min=1)
        upper, lower = 2 * overlap + smooth, squares + size + smooth
        ctx.save_for_backward(logits, labels, count_of, upper, lower)
        ctx.positive_weight = positive_weight
        return torch.where(count > 0, entropy / count_of + 1 - upper / lower, torch.zeros_like(entropy))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        logits, labels, count, upper, lower = ctx.saved_tensors
        slope = torch.empty_like(logits)
        # of entropy: (p - t) / count, weighted where t is 1; of Dice: p (1 - p) 2 (upper p / lower - t) / lower
        a, b, c = gradient / count, gradient * 2 * upper / lower.square(), gradient * 2 / lower
        for index, (scores, truth, kept) in enumerate(_chunks(logits, labels)):
            p = scores.sigmoid_()
            part = (p * b).sub_(truth * c).mul_(p).mul_(1 - p)
            p.sub_(truth)
            if ctx.positive_weight != 1:
                p *= truth * (ctx.positive_weight - 1) + 1
            part.add_(p.mul_(a))
            if kept is not None:
                part *= kept
            step = _chunk_size(logits)
            slope[index * step : (index + 1) * step] = part
        return slope, None, None, None


def _chunk_size(logits: torch.Tensor) -> int:
    """Slices at a time: what stays in a CPU's cache; all of them on a GPU."""
    if logits.device.type != "cpu":
        return max(len(logits), 1)
    return max(1, 2**17 // max(logits[0].numel(), 1)) if len(logits) else 1


def _chunks(
    logits: torch.Tensor, labels: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """(scores, truth, kept) of some slices at a time, float32 [n, H, W], scores a copy; kept is None without padding."""
    for scores, part in zip(logits.split(_chunk_size(logits)), labels.split(_chunk_size(logits)), strict=True):
        padded = logits.device.type != "cpu" or bool(part.amin() < 0)
        copy = scores.to(torch.float32, copy=True)
        yield copy, (part > 0).float(), (part >= 0).float() if padded else None


def mask_loss(
    logits: torch.Tensor, labels: torch.Tensor, smooth: float = 1e-7, positive_weight: float = 1.0
) -> torch.Tensor:
    """Binary cross entropy plus Dice of a mask (L_seg), padding left out.

    Args:
        logits: [D, H, W] on the canvas.
        labels: the same shape; 1 inside, 0 outside, −1 padding.
        smooth: added above and below in Dice, as released; its denominator has squared terms.
        positive_weight: of voxels inside in the cross entropy; 1 is the paper's.
    """
    if logits.shape != labels.shape:
        raise CTInstructError(f"mask_labels has shape {tuple(labels.shape)}, the canvas is {tuple(logits.shape)}.")
    return _MaskLoss.apply(logits, labels.to(logits.device), smooth, positive_weight)


def masks_loss(
    logits: Sequence[torch.Tensor],
    labels: Sequence[torch.Tensor],
    positive_weight: float = 1.0,
    weights: torch.Tensor | None = None,
    positive_power: float | None = None,
    groups: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean of `mask_loss` over the masks of a batch, or their mean by `weights` [masks].

    Args:
        logits, labels: of each mask, see `mask_loss`.
        positive_weight: of voxels inside; with `positive_power` their largest weight.
        positive_power: voxels inside weigh (voxels outside / voxels inside) to this power: the voxels of a small nodule
            weigh much, those of a liver little.
        groups: [masks] numbers; small masks of the same number are scored as a single mask over their images, as over the
            slices of a volume, so that marks on slices without the structure lower its Dice.
    """
    if len(logits) != len(labels):
        raise CTInstructError(f"mask_labels has {len(labels)} masks for {len(logits)} mask logits.")
    if positive_power is None or positive_weight == 1:
        inside = [positive_weight] * len(labels)
    else:
        inside = [_voxel_weight(mask, positive_weight, positive_power) for mask in labels]
    if len({mask.shape for mask in logits}) == 1 and len(logits) > 1 and logits[0].numel() <= 2**16:
        losses, weights = _small_masks_loss(logits, labels, inside, weights, groups)
    else:
        triples = zip(logits, labels, inside, strict=True)
        losses = torch.stack([mask_loss(mask, truth, positive_weight=weight) for mask, truth, weight in triples])
    return weighted_mean(losses, weights)


def weighted_mean(losses: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Weighted mean of `losses` [n]; plain mean if `weights` is None."""
    if weights is None:
        return losses.mean()
    weights = weights.to(losses.device, losses.dtype)
    return (losses * weights).sum() / weights.sum()


def _voxel_weight(labels: torch.Tensor, most: float, power: float) -> float:
    inside, kept = int((labels > 0).sum()), int((labels >= 0).sum())
    return min(most, max(1.0, ((kept - inside) / max(inside, 1)) ** power))


def _small_masks_loss(
    logits: Sequence[torch.Tensor],
    labels: Sequence[torch.Tensor],
    positive_weights: Sequence[float],
    weights: torch.Tensor | None = None,
    groups: torch.Tensor | None = None,
    smooth: float = 1e-7,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`mask_loss` of many masks of the same small shape at once, as of slices, or of each group: [masks or groups], and
    their weights (of a group, the sum over its masks)."""
    for mask, truth in zip(logits, labels, strict=True):
        if mask.shape != truth.shape:
            raise CTInstructError(f"mask_labels has shape {tuple(truth.shape)}, the canvas is {tuple(mask.shape)}.")
    scores = torch.stack(list(logits)).flatten(1).float()
    truth = torch.stack(list(labels)).flatten(1).to(scores.device)
    kept, inside = (truth >= 0).float(), (truth > 0).float()
    more = torch.tensor(positive_weights, device=scores.device)[:, None] - 1
    voxels = kept * (inside * more + 1)
    entropy = F.binary_cross_entropy_with_logits(scores, inside, voxels, reduction="none").sum(1)
    probability = scores.sigmoid() * kept
    overlap, squares = (probability * inside).sum(1), probability.square().sum(1)
    sums = torch.stack([entropy, kept.sum(1), overlap, squares + inside.sum(1)])
    if groups is not None:
        _, index = groups.to(scores.device).unique(return_inverse=True)
        count = int(index.max()) + 1
        sums = sums.new_zeros(len(sums), count).index_add(1, index, sums)
        if weights is not None:
            weights = weights.to(sums)
            weights = weights.new_zeros(count).index_add(0, index, weights)
    entropy, number, overlap, size = sums
    loss = entropy / number.clamp(min=1) + 1 - (2 * overlap + smooth) / (size + smooth)
    return torch.where(number > 0, loss, torch.zeros_like(loss)), weights


def label_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    positive_weight: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Binary cross entropy over known labels (L_cls); −1 is unknown.

    Args:
        logits, labels: the same shape.
        positive_weight: factor on the positive term of each, broadcast to the labels.
        dtype: precision of the computation.
    """
    if logits.shape != labels.shape:
        raise CTInstructError(f"labels have shape {tuple(labels.shape)}, logits {tuple(logits.shape)}.")
    labels = labels.to(logits.device).float()
    kept = labels >= 0
    if not bool(kept.any()):
        return logits.sum() * 0.0
    if positive_weight is not None:
        positive_weight = positive_weight.expand_as(labels)[kept].to(dtype)
    loss = F.binary_cross_entropy_with_logits(
        logits[kept].to(dtype), labels[kept].to(dtype), pos_weight=positive_weight
    )
    return loss.float()
