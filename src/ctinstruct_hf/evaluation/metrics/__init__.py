"""The metrics as modules of `evaluate`: `evaluate.load(metric_path("report_text"))`."""

from __future__ import annotations

from pathlib import Path

from ...errors import CTInstructError

METRICS = (
    "report_text",
    "clinical_efficacy",
    "choice_accuracy",
    "multilabel_diagnosis",
    "volume_dice",
    "image_text_retrieval",
)


def metric_path(name: str) -> str:
    """The folder of a metric, for `evaluate.load`.

    Raises:
        CTInstructError: for a name that is not in `METRICS`.
    """
    if name not in METRICS:
        raise CTInstructError(f"metric '{name}' is not known: use {', '.join(METRICS)}.")
    return str(Path(__file__).parent / name)


__all__ = ["METRICS", "metric_path"]
