"""IR@k and TR@k over a pool; predictions are image features, references text features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ctinstruct_hf.evaluation.metric import Metric, module_of
from ctinstruct_hf.evaluation.predictions import Record
from ctinstruct_hf.evaluation.retrieval import recall_at_k
from ctinstruct_hf.evaluation.scores import Settings, TaskScores


def score(scores: TaskScores, records: Sequence[Record], settings: Settings) -> None:
    """Over pools of `settings.pool`."""
    images, texts = [record.image_features for record in records], [record.text_features for record in records]
    for metric, value in recall_at_k(images, texts, pool=settings.pool).items():
        scores.point(metric, value)
    scores.notes.append(f"pool of {min(settings.pool or len(records), len(records))}")


def compute(predictions: Any, references: Any, k: Any = (5, 10), pool: int | None = 200) -> dict[str, Any]:
    """See `recall_at_k`."""
    return recall_at_k(predictions, references, k, pool)


METRIC = Metric(
    {"retrieval": (("IR@5", "ir@5"), ("IR@10", "ir@10"), ("TR@5", "tr@5"), ("TR@10", "tr@10"))}, score, rank=0
)
MODULE = module_of(
    __doc__,
    lambda datasets: {name: datasets.Sequence(datasets.Value("float64")) for name in ("predictions", "references")},
    compute,
)
