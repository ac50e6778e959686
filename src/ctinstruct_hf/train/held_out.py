"""What a stage-two model makes of held-out batches while it trains: losses, Dice of masks, AUC and F1 of diseases."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ..data.mixture import Item, Mixture, MixtureBatches, MixtureEntry
from ..evaluation.segmentation import volume_dice
from .trainer import LOSSES

HeldOut = list[tuple[str, list[list[Item]]]]  # (name of a part, its batches)
Found = list[tuple[str, str, Any]]  # (name of a part, of a metric, a value of it)


def held_out_batches(entries: Sequence[MixtureEntry], counts: Sequence[int], size: int) -> HeldOut:
    """The same batches of each part at every evaluation.

    Args:
        entries: the parts.
        counts: of batches of each.
        size: samples of a batch.
    """
    batches = []
    for entry, count in zip(entries, counts, strict=True):
        mixture = Mixture([entry])
        rows = len(entry.rows) if hasattr(entry.rows, "__len__") else count * size
        places = MixtureBatches(mixture, size, min(count, math.ceil(rows / size)), seed=0)
        batches.append((entry.name, [[mixture[place] for place in batch] for batch in places]))
    return batches


def measure(part: str, outputs: Any, batch: dict[str, Any]) -> Found:
    """What one batch of a part says: each loss; the Dice of each mask that is there, on the canvas without its padding; the
    (row of the head, probability, label) of each disease that is known."""
    found: Found = [(part, name, float(outputs[name])) for name in ("loss", *LOSSES) if outputs.get(name) is not None]
    for logits, truth in zip(outputs.mask_logits or (), batch.get("mask_labels") or (), strict=False):
        kept = truth >= 0
        there = truth.bool() & kept
        if bool(there.any()):
            found.append((part, "dice", float(volume_dice((logits > 0).to(kept.device) & kept, there))))  # type: ignore[arg-type]
    labels = batch.get("disease_labels")
    if labels is not None and outputs.disease_logits is not None:
        rows = batch["disease_ids"].tolist()
        chances = outputs.disease_logits.float().sigmoid().tolist()
        triples = zip(rows, chances, labels.tolist(), strict=True)
        found += [(part, "disease", triple) for triple in triples if triple[2] >= 0]
    return found


def metrics_of(found: Iterable[tuple[str, str, Any]], prefix: str = "eval") -> dict[str, float]:
    """Each metric as the mean over the parts that have it, `eval_dice`; of several parts also each part's, `eval_mine_dice`."""
    by_part: dict[str, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    for part, name, value in found:
        by_part[part][name].append(value)
    scores = {part: _means(values) for part, values in by_part.items()}
    names = dict.fromkeys(name for each in scores.values() for name in each)
    means = {name: [each[name] for each in scores.values() if name in each] for name in names}
    metrics = {f"{prefix}_{name}": sum(values) / len(values) for name, values in means.items()}
    if len(scores) > 1:
        metrics |= {f"{prefix}_{part}_{name}": value for part, each in scores.items() for name, value in each.items()}
    return metrics


def _means(values: dict[str, list[Any]]) -> dict[str, float]:
    means = {name: sum(each) / len(each) for name, each in values.items() if name != "disease"}
    return means | _disease_scores(values.get("disease", []))


def _disease_scores(triples: Sequence[tuple[int, float, float]]) -> dict[str, float]:
    """Macro AUC over the diseases that are there in some samples and not in others, and macro F1 at 0.5 over those that are there."""
    from sklearn.metrics import f1_score, roc_auc_score

    areas, scores = [], []
    for disease in sorted({row for row, _, _ in triples}):
        chances, labels = np.array([(chance, label) for row, chance, label in triples if row == disease]).T
        if labels.any():
            scores.append(float(f1_score(labels, chances > 0.5, zero_division=0.0)))
        if 0 < labels.mean() < 1:
            areas.append(float(roc_auc_score(labels, chances)))
    return {name: sum(each) / len(each) for name, each in (("auc", areas), ("f1", scores)) if each}


__all__ = ["HeldOut", "held_out_batches", "measure", "metrics_of"]
