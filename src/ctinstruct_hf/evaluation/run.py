"""Run a model over prepared data and keep its answers: `predictions.jsonl` and masks, resumable, on several processes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..data.samples import from_row
from ..errors import CTInstructError
from ..files import write_whole
from ..inference.fingerprint import fingerprint
from ..inference.folders import require
from ..inference.models import resolve_model
from .choices import options_of
from .jobs import Job
from .predictions import SCORED_TASKS, Predictions, Record, parse_record, to_json, write_predictions
from .rows import load_data, split_of_data, splits_of
from .stage_one import StageOne
from .stage_two import StageTwo


@dataclass
class RunOptions:
    """How a model is run over data.

    Attributes:
        tasks: of `predictions.SCORED_TASKS`; all that the data has by default.
        split: of the data; "" is test, or validation of data without a test split.
        limit: samples of each task.
        batch_size: questions about the same scan answered at once.
        max_new_tokens: of an answer.
        validation: also diagnose the validation split, from which thresholds are chosen.
        num_beams: of an answer.
        quantize: see `inference.precision.choose_precision`.
    """

    tasks: tuple[str, ...] = ()
    split: str = ""
    limit: int | None = None
    batch_size: int = 4
    max_new_tokens: int = 512
    validation: bool = True
    num_beams: int = 1
    quantize: str | None = None


def run_model(
    model: str,
    data: str,
    output: Path,
    options: RunOptions,
    *,
    device: str | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> Path:
    """Answer every sample of the data; a run that was interrupted goes on with what is missing.

    Started by `accelerate launch` or `torchrun`, each process takes its share of the scans.

    Args:
        model: a folder or name on the Hub, of either stage; of stage one: retrieval, diagnosis and segmentation.
        data: see `rows.load_data`.
        output: folder for `predictions.jsonl` and `masks/`.
        options: what to run.
        device, dtype, revision: see `inference.models.load_model`.
        progress: called with a sentence.

    Returns:
        The file of predictions.

    Raises:
        CTInstructError: for a bad model, data or task, or an output folder of another run.
    """
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
    if device is None and state.num_processes > 1 and state.device.type == "cuda":
        device = str(state.device)
    folder = resolve_model(model, revision, progress=progress).folder
    stage = _load(model, folder, device, dtype, revision, options)
    options = replace(options, split=options.split or split_of_data(data, stage.rows))
    settings = _settings(model, folder, data, options)
    jobs = _jobs(stage, data, options)
    if not jobs:
        raise CTInstructError(f"{data} has nothing to ask about in split {options.split}.")
    _same_run(output, settings, state.is_main_process)
    final, parts = output / "predictions.jsonl", output / "parts"
    if final.exists():
        return final
    if state.is_main_process:
        parts.mkdir(parents=True, exist_ok=True)
    state.wait_for_everyone()
    done = _read_parts(parts)
    state.wait_for_everyone()
    left = [job for job in jobs if (job.task, job.id) not in done]
    mine = _by_scan(left)[state.process_index :: state.num_processes]
    with _append(parts / f"{state.process_index}-of-{state.num_processes}.jsonl") as file:
        for records in _answers(stage, mine, output, options.batch_size, progress):
            file.writelines(to_json(record) + "\n" for record in records)
            file.flush()
    state.wait_for_everyone()
    if state.is_main_process:
        made = _read_parts(parts)
        header = {**settings, "format": 1, "splits": splits_of(data, stage.rows), "notes": _notes(jobs)}
        records = [made[job.task, job.id] for job in jobs]
        write_predictions(Predictions(str(settings["model"]), records, output, header), final)
        shutil.rmtree(parts, ignore_errors=True)
    state.wait_for_everyone()
    return final


def _load(
    model: str, folder: Path, device: str | None, dtype: str | None, revision: str | None, options: RunOptions
) -> Any:
    """A `StageOne` or a `StageTwo`."""
    stage: StageOne | StageTwo
    if require(folder, "stage one", "stage two") == "stage one":
        if dtype not in (None, "float32"):
            raise CTInstructError(f"--dtype {dtype} is for models that speak: stage one is evaluated in float32.")
        if options.quantize is not None:
            raise CTInstructError(
                f"--quantize {options.quantize} is for models that speak: stage one has no language model."
            )
        stage = StageOne(folder, device)
    else:
        stage = StageTwo(model, device, dtype, revision, options.max_new_tokens, options.num_beams, options.quantize)
    unknown = sorted(set(options.tasks) - set(stage.tasks))
    if unknown:
        raise CTInstructError(f"--tasks has {', '.join(unknown)}: this model can be asked {', '.join(stage.tasks)}.")
    return stage


def _settings(model: str, folder: Path, data: str, options: RunOptions) -> dict[str, Any]:
    """The settings that change predictions; the batch size does not."""
    return {
        "model": Path(model).name if Path(model).exists() else model,
        "weights": fingerprint(folder),
        "data": data,
        "tasks": list(options.tasks),
        "split": options.split,
        "limit": options.limit,
        "max_new_tokens": options.max_new_tokens,
        "validation": options.validation,
        **({"num_beams": options.num_beams} if options.num_beams > 1 else {}),
        **({"quantize": options.quantize} if options.quantize else {}),
    }


def _jobs(stage: Any, data: str, options: RunOptions) -> list[Job]:
    """Everything that is to be answered, in the order of the data."""
    wanted = options.tasks or stage.tasks
    splits = [options.split]
    if options.validation and "diagnosis" in wanted and options.split != "validation":
        splits.append("validation")
    jobs: list[Job] = []
    for split in splits:
        try:
            rows = load_data(data, stage.rows, split)
        except CTInstructError:
            if split == options.split:
                raise
            continue  # without validation rows thresholds are 0.5, which the notes of the scores state
        counts: dict[str, int] = {}
        for row in rows:
            for job in stage.jobs_of(from_row(row, stage.rows)):
                if job.task not in wanted or (split != options.split and job.task != "diagnosis"):
                    continue
                counts[job.task] = counts.get(job.task, 0) + 1
                if options.limit is None or counts[job.task] <= options.limit:
                    jobs.append(job)
    return jobs


def _by_scan(jobs: Sequence[Job]) -> list[list[Job]]:
    """Jobs about the same images together; masks and probabilities before texts."""
    scans: dict[str, list[Job]] = {}
    for job in jobs:
        scans.setdefault(repr(job.images), []).append(job)
    return [sorted(group, key=lambda job: job.task not in ("segmentation", "diagnosis")) for group in scans.values()]


def _answers(
    stage: Any, scans: Sequence[Sequence[Job]], output: Path, batch_size: int, progress: Callable[[str], None]
) -> Iterator[list[Record]]:
    """Records batch by batch."""
    answered, count = 0, sum(len(jobs) for jobs in scans)
    for jobs in scans:
        for first in range(0, len(jobs), batch_size):
            batch = jobs[first : first + batch_size]
            yield _answer(stage, batch, output)
            answered += len(batch)
            progress(f"{answered}/{count} questions")


def _answer(stage: Any, jobs: Sequence[Job], output: Path) -> list[Record]:
    """Records of a batch; what cannot be answered fails alone."""
    try:
        return stage.answer(jobs, output)
    except CTInstructError as error:
        if len(jobs) == 1:
            return [jobs[0].record(error=str(error))]
        return [record for job in jobs for record in _answer(stage, [job], output)]


def _notes(jobs: Sequence[Job]) -> dict[str, list[str]]:
    """{task: notes on names that the model may not know}."""
    notes = {
        task: list(dict.fromkeys(note for job in jobs if job.task == task for note in job.notes))
        for task in SCORED_TASKS
    }
    return {task: listed for task, listed in notes.items() if listed}


def _append(path: Path) -> Any:
    """The file of a process, opened to append after the last whole line."""
    if path.exists():
        text = path.read_bytes()
        if not text.endswith(b"\n"):
            path.write_bytes(text[: text.rfind(b"\n") + 1])
    try:
        return path.open("a", encoding="utf-8")
    except OSError as error:
        raise CTInstructError(f"{path} cannot be written: {error.strerror or error}.") from error


def _read_parts(parts: Path) -> dict[tuple[str, str], Record]:
    found: dict[tuple[str, str], Record] = {}
    for path in sorted(parts.glob("*.jsonl")) if parts.is_dir() else []:
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = parse_record(json.loads(line))
            except (ValueError, CTInstructError):  # the last line of a killed process
                continue
            found[record.task, record.id] = record
    return found


def _same_run(output: Path, settings: dict[str, Any], writes: bool) -> None:
    kept = output / "run.json"
    if kept.exists():
        before = json.loads(kept.read_text(encoding="utf-8"))
        changed = sorted(name for name in {*settings, *before} if before.get(name) != settings.get(name))
        if changed:
            raise CTInstructError(f"{output} holds a run with another {', '.join(changed)}: choose another folder.")
    elif writes:
        try:
            output.mkdir(parents=True, exist_ok=True)
            write_whole(kept, json.dumps(settings, indent=1))
        except OSError as error:
            raise CTInstructError(f"{output} cannot be written: {error.strerror or error}.") from error


__all__ = ["RunOptions", "load_data", "options_of", "run_model"]
