"""BLEU-1, ROUGE-1 and METEOR, means over samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ctinstruct_hf.data.tasks import scored_as
from ctinstruct_hf.evaluation.metric import Metric, module_of
from ctinstruct_hf.evaluation.predictions import Record
from ctinstruct_hf.evaluation.scores import Settings, TaskScores
from ctinstruct_hf.evaluation.text import TEXT_METRICS, score_texts
from ctinstruct_hf.evaluation.tokens import needs_unicode

TEXT = (("ROUGE-1", "rouge1"), ("BLEU-1", "bleu1"), ("METEOR", "meteor"))


def score(scores: TaskScores, records: Sequence[Record], settings: Settings) -> None:
    """Of each text; of questions also whether the answer equals the reference word by word."""
    predictions, references = [record.prediction for record in records], [record.reference for record in records]
    texts = score_texts(predictions, references, TEXT_METRICS, settings.workers, settings.tokenizer)
    scores.details["tokenizer"] = texts.tokenizer
    beyond = needs_unicode([*predictions, *references])
    if beyond and texts.tokenizer == "unicode":
        scores.notes.append(f"tokenizer: unicode, since {beyond} texts have letters beyond a–z: words of any script count in ROUGE-1, and single characters where a script has no blanks")  # fmt: skip
    elif beyond:
        scores.notes.append(
            f"tokenizer: ascii, by choice: ROUGE-1 leaves out letters beyond a–z, which {beyond} texts have"
        )
    names = [record.id for record in records]
    for metric in TEXT_METRICS:
        scores.per_sample[metric] = dict(zip(names, texts[metric], strict=True))
    if scored_as(scores.task) == "question":
        exact = [float(_plain(a) == _plain(b)) for a, b in zip(predictions, references, strict=True)]
        scores.per_sample["exact"] = dict(zip(names, exact, strict=True))


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")


def compute(predictions: list[str], references: list[str], metrics: Any = TEXT_METRICS) -> dict[str, Any]:
    """Means over all pairs."""
    return score_texts(predictions, references, metrics).mean()


METRIC = Metric({"report": TEXT, "caption": TEXT, "question": (("Exact", "exact"), *TEXT)}, score, rank=0)
MODULE = module_of(
    __doc__,
    lambda datasets: {"predictions": datasets.Value("string"), "references": datasets.Value("string")},
    compute,
)
