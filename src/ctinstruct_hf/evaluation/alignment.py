"""Scores of stage one: retrieval, category alignment and masks on held-out rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object, send_to_device

from ..data.descriptions import describe_category
from ..data.samples import AlignmentSample, Label, MaskRef, from_row
from ..data.store import PatchStore, Prepared
from ..modeling.segmentation_ctinstruct import assemble
from .diagnosis import best_thresholds, multilabel_scores
from .retrieval import recall_at_k
from .segmentation import volume_dice


@dataclass
class AlignmentScores:
    """Metrics, and the values they are computed from.

    Attributes:
        metrics: {name: number in 0…1}.
        dice: {structure: [Dice of each scan that has it]}, on the canvas at full resolution, padding left out.
        left_empty: {structure: [1.0 where a scan lacks it and nothing was marked, else 0.0]}.
        ids, texts, similarity: of the retrieval pool; similarity [texts, images].
        example: (middle slice, {structure: (truth, prediction)}) for a picture.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    dice: dict[str, list[float]] = field(default_factory=dict)
    left_empty: dict[str, list[float]] = field(default_factory=dict)
    per_disease: dict[str, dict[str, float]] = field(default_factory=dict)
    ids: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    similarity: np.ndarray | None = None
    example: tuple[np.ndarray, dict[str, tuple[np.ndarray, np.ndarray]]] | None = None


@torch.no_grad()
def score_alignment(
    model: Any,
    store: PatchStore,
    words: Any,
    rows: Sequence[dict[str, Any]],
    masks: int | None = None,
    pool: int | None = 200,
    thresholds: Sequence[float] | None = None,
    share: tuple[int, int] = (0, 1),
    progress: Any = None,
) -> AlignmentScores:
    """Score a `CTInstructForPretraining` on rows that have texts, labels or masks.

    Args:
        model: in any mode, which is restored.
        words: texts -> (input_ids, attention_mask), as `AlignmentCollator.words`.
        rows: `AlignmentSample` rows; all must name the same labels to be scored by category.
        masks: the number of rows whose masks are scored, all by default; masks take longest.
        pool: size of the retrieval pool, at most all rows.
        thresholds: of the categories, from validation rows; by default the best on the even rows, scored on the odd.
        share: (process, number of processes): they exchange their results, so that all return the same.
        progress: called with a sentence on progress.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    found: list[dict[str, Any]] = []
    example = None
    samples: list[AlignmentSample] = [from_row(row, "alignment") for row in rows]  # type: ignore[misc]
    for index, sample in enumerate(samples):
        if index % share[1] != share[0]:
            continue
        if progress is not None:
            progress(f"scoring {index + 1}/{len(samples)}")
        with_masks = masks is None or index < masks
        result, picture = _score_sample(model, store, words, sample, with_masks, device, example is None)
        example = example or picture
        found.append({"index": index, **result})
    if was_training:
        model.train()
    if share[1] > 1:
        found = gather_object(found)
    found.sort(key=lambda result: result["index"])
    scores = AlignmentScores(example=example)
    _retrieval(scores, samples, found, pool)
    _categories(scores, samples, found, thresholds)
    _masks(scores, samples, found)
    return scores


def _score_sample(
    model: Any,
    store: PatchStore,
    words: Any,
    sample: AlignmentSample,
    with_masks: bool,
    device: Any,
    with_picture: bool,
) -> tuple[dict[str, Any], Any]:
    prepared = store.image(sample.image)
    wanted = sample.masks if with_masks else []
    batch = questions_of(prepared, words, sample.texts[:1], sample.labels, wanted)
    outputs = model(**send_to_device(batch, device))
    result: dict[str, Any] = {}
    if sample.texts:
        result["image"] = outputs.image_features[0].float().cpu().numpy()
        result["text"] = outputs.text_features[0].float().cpu().numpy()
    if sample.labels:
        result["probabilities"] = outputs.category_logits[0].float().sigmoid().cpu().numpy()
    result["dice"], result["empty"] = {}, {}
    shown: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for mask, logits in zip(wanted, outputs.mask_logits or [], strict=True):
        truth = store.mask(sample.image, mask)
        kept = truth >= 0
        marked = (logits.float().cpu() > 0) & kept
        inside = truth > 0
        if inside.any():
            result["dice"][mask.name] = volume_dice(marked.numpy(), inside.numpy())
            if with_picture:
                shown[mask.name] = (inside.numpy(), marked.numpy())
        else:
            result["empty"][mask.name] = float(not marked.any())
    picture = (_on_canvas(prepared), shown) if shown else None
    return result, picture


def questions_of(
    prepared: Prepared, words: Any, texts: Sequence[str], labels: Sequence[Label], masks: Sequence[MaskRef]
) -> dict[str, Any]:
    """The arguments of `CTInstructForPretraining.forward` for an image and its texts, labels and masks, each if any."""
    batch: dict[str, Any] = {**prepared, "pixel_values": prepared["pixel_values"].float()}
    for start, asked in (
        ("", list(texts)),
        ("class_", [describe_category(label.name) for label in labels]),
        ("mask_", [mask.name for mask in masks]),
    ):
        if asked:
            batch[f"{start}input_ids"], batch[f"{start}attention_mask"] = words(asked)
    return batch


def _on_canvas(prepared: dict[str, torch.Tensor]) -> np.ndarray:
    """The slices of patches as a volume [D, H, W]."""
    z, y, x, s = prepared["patch_grid"][0].tolist()
    return assemble(prepared["pixel_values"].float()[:, None], (z, y, x, s))[0].numpy()


def _retrieval(
    scores: AlignmentScores, samples: Sequence[Any], found: Sequence[dict[str, Any]], pool: int | None
) -> None:
    paired = [result for result in found if "image" in result]
    if len(paired) < 2:
        return
    images, texts = np.stack([result["image"] for result in paired]), np.stack([result["text"] for result in paired])
    scores.metrics |= recall_at_k(images, texts, pool=pool)
    scores.metrics["retrieval_pool"] = float(min(pool or len(paired), len(paired)))
    scores.ids = [samples[result["index"]].id for result in paired]
    scores.texts = [samples[result["index"]].texts[0] for result in paired]
    scores.similarity = texts @ images.T


def _categories(
    scores: AlignmentScores, samples: Sequence[Any], found: Sequence[dict[str, Any]], thresholds: Sequence[float] | None
) -> None:
    labelled = [result for result in found if "probabilities" in result]
    if not labelled:
        return
    names = [label.name for label in samples[labelled[0]["index"]].labels]
    labelled = [result for result in labelled if [label.name for label in samples[result["index"]].labels] == names]
    probabilities = np.stack([result["probabilities"] for result in labelled])
    truth = np.array([[label.value for label in samples[result["index"]].labels] for result in labelled])
    everything = multilabel_scores(probabilities, truth, 0.5 if thresholds is None else thresholds, names)
    if thresholds is None and len(labelled) >= 4:
        limits = best_thresholds(probabilities[::2], truth[::2])
        halved = multilabel_scores(probabilities[1::2], truth[1::2], limits, names)
    else:
        halved = everything
    scores.metrics["auc"] = everything["auc"]
    scores.metrics |= {name: halved[name] for name in ("accuracy", "f1", "precision")}
    scores.per_disease = everything["per_disease"]


def _masks(scores: AlignmentScores, samples: Sequence[Any], found: Sequence[dict[str, Any]]) -> None:
    for result in found:
        for name, value in result["dice"].items():
            scores.dice.setdefault(name, []).append(value)
        for name, value in result["empty"].items():
            scores.left_empty.setdefault(name, []).append(value)
    findings = {label.name for sample in samples for label in sample.labels}
    groups = {"structures": set(scores.dice) - findings, "findings": set(scores.dice) & findings}
    for group, names in groups.items():
        if names:
            scores.metrics[f"dice_{group}"] = float(np.mean([np.mean(scores.dice[name]) for name in names]))
    if scores.dice:
        scores.metrics["dice"] = float(np.mean([np.mean(values) for values in scores.dice.values()]))
    if scores.left_empty:
        scores.metrics["absent_left_empty"] = float(np.mean([np.mean(values) for values in scores.left_empty.values()]))
