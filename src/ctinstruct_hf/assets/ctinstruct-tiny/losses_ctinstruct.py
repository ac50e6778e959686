"""The losses of both stages. Each takes raw logits and the labels of DESIGN's batch; each is a mean over its items."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .configuration_ctinstruct import CTInstructError


def mask_loss(logits: torch.Tensor, labels: torch.Tensor, smooth: float = 1e-7) -> torch.Tensor:
    """Binary cross entropy plus Dice of one mask (L_seg), padding left out.

    Args:
        logits: [D, H, W] on the canvas.
        labels: the same shape; 1 inside, 0 outside, −1 padding.
        smooth: added above and below in Dice, as released; its denominator has squared terms.
    """
    if logits.shape != labels.shape:
        raise CTInstructError(f"mask_labels has shape {tuple(labels.shape)}, the canvas is {tuple(logits.shape)}.")
    labels = labels.to(logits.device)
    kept = (labels >= 0).float()
    count = kept.sum()
    truth = labels.clamp(min=0).float()
    scores = logits.float()
    entropy = F.binary_cross_entropy_with_logits(scores, truth, weight=kept, reduction="sum") / count.clamp(min=1)
    probability = scores.sigmoid() * kept
    overlap = 2 * (probability * truth).sum() + smooth
    dice = overlap / ((probability**2).sum() + truth.sum() + smooth)
    return torch.where(count > 0, entropy + 1 - dice, logits.sum() * 0.0)


def masks_loss(logits: Sequence[torch.Tensor], labels: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean of `mask_loss` over the masks of a batch."""
    if len(logits) != len(labels):
        raise CTInstructError(f"mask_labels has {len(labels)} masks for {len(logits)} mask logits.")
    return torch.stack([mask_loss(one, truth) for one, truth in zip(logits, labels, strict=True)]).mean()


def label_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    positive_weight: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Binary cross entropy over known labels (L_cls); −1 marks an unknown one.

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
