"""Submissions: the report-generation task of the VLM3D challenge over CT-RATE's validation split.

The format is assumed (docs/evaluation.md): a JSON with a name, a type and one output, `generated_reports`, a list of
{"input_image_name", "report"} per volume. Only `submission` knows it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import CTInstructError
from ..files import write_whole
from .predictions import Predictions, Record


def volume_name(record: Record) -> str:
    """CT-RATE's name of a volume without endings: "valid_1_a_1"; in ids of samples "/task-…" follows it."""
    return record.id.split("/")[0].removesuffix(".gz").removesuffix(".nii")


def submission(reports: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """The file's content from (volume name, report) pairs."""
    return {
        "name": "Generated reports",
        "type": "Report generation",
        "outputs": [
            {
                "type": "generated_reports",
                "value": [{"input_image_name": name, "report": text} for name, text in reports],
            }
        ],
    }


def write_submission(predictions: Predictions, path: Path) -> int:
    """Write the reports of a file of predictions; how many.

    Raises:
        CTInstructError: where there is no report, a report failed, or a volume has two.
    """
    records = [record for record in predictions.records if record.task == "report"]
    if not records:
        raise CTInstructError(f"{predictions.system} has no reports to submit.")
    failed = [record.id for record in records if record.error]
    if failed:
        raise CTInstructError(f"{len(failed)} reports failed and would be missing: {', '.join(failed[:5])}.")
    names = [volume_name(record) for record in records]
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise CTInstructError(f"volumes have more than one report: {', '.join(twice[:5])}.")
    content = submission([(name, record.prediction) for name, record in zip(names, records, strict=True)])
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False))
    return len(records)


__all__ = ["submission", "write_submission"]
