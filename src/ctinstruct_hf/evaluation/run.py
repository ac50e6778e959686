"""Run a model over prepared data and keep what it says: `predictions.jsonl` and masks, resumable, on several processes.

Text is generated greedily, question by question, earlier turns as in the data. Masks and probabilities are read from the
special tokens of the answer as the data writes it ("Sure, it is <SEG>."), in one pass: its words hold nothing but the names
that were asked for.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device

from ..data.descriptions import tokenize
from ..data.names import disease_names, structure_names
from ..data.reading import open_volume
from ..data.samples import AlignmentSample, ImageRef, InstructionSample, Label, MaskRef, from_row, text_of
from ..data.templates import DISEASE_TOKEN
from ..errors import CTInstructError
from ..files import whole_folder, write_whole
from ..inference.chat_templates import render_chat
from ..inference.fingerprint import fingerprint
from ..inference.folders import require
from ..inference.models import load_model, load_stage_one, resolve_model
from .alignment import questions_of
from .choices import options_of
from .predictions import TASKS, TEXT_TASKS, Predictions, Record, parse_record, to_json, write_predictions
from .rows import load_data, split_of_data
from .turns import turns_of

STAGE_ONE_TASKS = ("retrieval", "diagnosis", "segmentation")


@dataclass
class RunOptions:
    """How to run a model over data.

    Attributes:
        tasks: of `predictions.TASKS`; all that the data has by default.
        split: of the data; "" is test, or validation of data without a test split.
        limit: samples of each task.
        batch_size: questions answered at once.
        max_new_tokens: of an answer.
        validation: also diagnosis on the validation split, which thresholds are taken from.
    """

    tasks: tuple[str, ...] = ()
    split: str = ""
    limit: int | None = None
    batch_size: int = 4
    max_new_tokens: int = 512
    validation: bool = True


@dataclass
class _Job:
    """One record to be made: what is asked, and the masks or labels that are right."""

    id: str
    sample: Any
    task: str
    turn: int = 0
    row: int = 0
    messages: list[dict[str, Any]] = field(default_factory=list)
    masks: list[MaskRef] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    known: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    options: list[str] = field(default_factory=list)


def run_model(
    model: str,
    data: str,
    output: Path,
    options: RunOptions,
    *,
    device: str | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    tell: Callable[[str], None] = lambda step: None,
) -> Path:
    """Answer every sample of the data; a run that was interrupted goes on with what is missing.

    Started by `accelerate launch` or `torchrun`, each process takes its share.

    Args:
        model: a folder or name on the Hub, of either stage; of stage one: retrieval, diagnosis and segmentation.
        data: see `rows.load_data`.
        output: folder for `predictions.jsonl` and `masks/`.
        options: what to run.
        device, dtype, revision: see `inference.models.load_model`.
        tell: called with a sentence on progress.

    Returns:
        The file of predictions.

    Raises:
        CTInstructError: for a bad model, data or task, or an output folder of another run.
    """
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
    if device is None and state.num_processes > 1 and state.device.type == "cuda":
        device = str(state.device)
    resolved = resolve_model(model, revision, progress=tell)
    speaker: Any = _load(model, resolved.folder, device, dtype, revision)
    unknown = sorted(set(options.tasks) - set(speaker.tasks))
    if unknown:
        raise CTInstructError(f"--tasks has {', '.join(unknown)}: this model can be asked {', '.join(speaker.tasks)}.")
    options = replace(options, split=options.split or split_of_data(data, speaker.kind))
    settings = {
        "model": Path(model).name if Path(model).exists() else model,
        "weights": fingerprint(resolved.folder),
        "data": data,
        "tasks": list(options.tasks),
        "split": options.split,
        "limit": options.limit,
        "max_new_tokens": options.max_new_tokens,
        "validation": options.validation,
    }
    final = output / "predictions.jsonl"
    parts = output / "parts"
    jobs = _jobs(speaker, data, options)
    if not jobs:
        raise CTInstructError(f"{data} has nothing to ask about in split {options.split}.")
    _same_run(output, settings, state.is_main_process)
    if final.exists():
        return final
    if state.is_main_process:
        parts.mkdir(parents=True, exist_ok=True)
    state.wait_for_everyone()
    done = _read_parts(parts)
    state.wait_for_everyone()
    mine = [job for job in jobs if (job.task, job.id) not in done][state.process_index :: state.num_processes]
    mine.sort(key=lambda job: (job.task in TEXT_TASKS or job.task == "multiple_choice", job.row, job.turn))
    name = f"{state.process_index}-of-{state.num_processes}.jsonl"
    with _append(parts / name) as file:
        answered = 0
        for records in speaker.answer(mine, output, options):
            for record in records:
                file.write(to_json(record) + "\n")
            file.flush()
            answered += len(records)
            tell(f"{answered}/{len(mine)} questions")
    state.wait_for_everyone()
    if state.is_main_process:
        made = _read_parts(parts)
        records = [made[job.task, job.id] for job in jobs]
        notes = {
            task: list(dict.fromkeys(note for job in jobs if job.task == task for note in job.notes)) for task in TASKS
        }
        header = {**settings, "format": 1, "notes": {task: told for task, told in notes.items() if told}}
        write_predictions(Predictions(str(settings["model"]), records, output, header), final)
        shutil.rmtree(parts, ignore_errors=True)
    state.wait_for_everyone()
    return final


def _append(path: Path) -> Any:
    """The file of a process, after the last whole line."""
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
        changed = sorted(name for name in settings if before.get(name) != settings[name])
        if changed:
            raise CTInstructError(f"{output} holds a run with another {', '.join(changed)}: choose another folder.")
    elif writes:
        try:
            output.mkdir(parents=True, exist_ok=True)
            write_whole(kept, json.dumps(settings, indent=1))
        except OSError as error:
            raise CTInstructError(f"{output} cannot be written: {error.strerror or error}.") from error


def _jobs(speaker: Any, data: str, options: RunOptions) -> list[_Job]:
    """Everything that is to be answered, in the order of the data."""
    wanted = options.tasks or speaker.tasks
    splits = [options.split]
    if options.validation and "diagnosis" in wanted and options.split != "validation":
        splits.append("validation")
    jobs: list[_Job] = []
    for split in splits:
        try:
            rows = load_data(data, speaker.kind, split)
        except CTInstructError:
            if split == options.split:
                raise
            continue  # no validation rows: thresholds are then 0.5, and said to be
        counts: dict[str, int] = {}
        for number, row in enumerate(rows):
            for job in speaker.jobs_of(from_row(row, speaker.kind)):
                if job.task not in wanted or (split != options.split and job.task != "diagnosis"):
                    continue
                counts[job.task] = counts.get(job.task, 0) + 1
                if options.limit is None or counts[job.task] <= options.limit:
                    job.row = number
                    jobs.append(job)
    return jobs


def _load(model: str, folder: Path, device: str | None, dtype: str | None, revision: str | None) -> Any:
    if require(folder, "stage one", "stage two") == "stage one":
        if dtype not in (None, "float32"):
            raise CTInstructError(f"--dtype {dtype} is for models that speak: stage one is evaluated in float32.")
        return StageOne(folder, device)
    return StageTwo(model, device, dtype, revision)


def _masks_of(job: _Job, logits: Sequence[torch.Tensor], image_processor: Any, volume: Any, output: Path) -> list[Any]:
    """A record's masks: each is written on the scan's own grid and named relative to the output."""
    from ..output.nifti import save_mask

    name = hashlib.sha256(f"{job.task}/{job.id}".encode()).hexdigest()[:16]
    masks = []
    with whole_folder(output / "masks") as draft:
        for place, (mask, canvas) in enumerate(zip(job.masks, logits, strict=True)):
            file = f"{name}-{place}.nii.gz"
            asked = job.known.get(mask.name, mask.name)
            save_mask(volume, image_processor.mask_from_canvas(canvas, volume, name=asked), draft / file)
            reference = {"path": mask.path, "values": list(mask.values)}
            masks.append({"name": mask.name, "prediction": f"masks/{file}", "reference": reference})
    return masks


def _base(job: _Job, **values: Any) -> Record:
    sample = job.sample
    return Record(job.id, job.task, sample.source, sample.split, meta=dict(sample.meta), **values)


class StageTwo:
    """A model that speaks."""

    kind = "instructions"
    tasks = tuple(task for task in TASKS if task != "retrieval")

    def __init__(self, model: str, device: str | None, dtype: str | None, revision: str | None) -> None:
        self.model, self.processor = load_model(model, device, dtype, revision)
        self.structures, self.diseases = structure_names(self.model, self.processor), disease_names(self.model)
        self._features: dict[str, tuple[Any, Any]] = {}

    def jobs_of(self, sample: InstructionSample) -> Iterator[_Job]:
        """One per answer of a conversation."""
        for turn in turns_of(sample, self.structures, self.diseases, self.model.config.names_masks):
            name = sample.id if not turn.number else f"{sample.id}/turn-{turn.number}"
            yield _Job(
                name, sample, turn.task, turn.index, 0, turn.messages, turn.masks, turn.labels, turn.known, turn.notes
            )

    def answer(self, jobs: Sequence[_Job], output: Path, options: RunOptions) -> Iterator[list[Record]]:
        """Records batch by batch; a sample that cannot be read fails alone."""
        for first in range(0, len(jobs), options.batch_size):
            batch = jobs[first : first + options.batch_size]
            records: list[Record] = []
            spoken: list[_Job] = []
            for job in batch:
                try:
                    self._look(job.sample.images)
                    if job.task == "multiple_choice":
                        job.options = options_of(text_of(job.messages[job.turn - 1]))
                    if job.task in ("segmentation", "diagnosis"):
                        records.append(self._heads(job, output))
                    else:
                        spoken.append(job)
                except CTInstructError as error:
                    records.append(_base(job, error=str(error)))
            if spoken:
                records += self._speak(spoken, options)
            yield records

    def _look(self, images: Sequence[ImageRef]) -> tuple[Any, Any]:
        """The tower's features and the volumes of a sample's images; the last few are kept."""
        key = repr([image.path for image in images])
        if key not in self._features:
            volumes = [open_volume(image) for image in images]
            batch = self.processor.image_processor(volumes, return_tensors="pt").to(self.model.device)
            with torch.inference_mode():
                features = self.model.get_image_features(**batch, return_dict=True)
            while len(self._features) >= 4:
                self._features.pop(next(iter(self._features)))
            self._features[key] = (features, volumes)
        return self._features[key]

    def _ids(self, messages: Sequence[dict[str, Any]], features: Any, ask: bool) -> torch.Tensor:
        text = render_chat(self.processor, messages, add_generation_prompt=ask)
        tokens = [int(torch.tensor(row).prod()) for row in features.patch_grid.tolist()]
        text = self.processor.expand([text], tokens)[0]
        ids = self.processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        return ids.to(self.model.device)

    @torch.inference_mode()
    def _heads(self, job: _Job, output: Path) -> Record:
        """Masks or probabilities from one pass over the conversation up to the answer, whose tokens come last."""
        features, volumes = self._look(job.sample.images)
        messages = job.messages[: job.turn + 1]
        ids = self._ids(messages, features, ask=False)
        question = text_of(job.sample.messages[job.turn - 1])
        named = self._named_diseases(messages)
        outputs = self.model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            vision_features=features,
            disease_ids=None if named is None else torch.tensor(named),
            logits_to_keep=1,
            return_dict=True,
        )
        if job.task == "diagnosis":
            scores = outputs.disease_logits.float().sigmoid().tolist()[-len(job.labels) :]
            probabilities = {label.name: value for label, value in zip(job.labels, scores, strict=True)}
            labels = {label.name: label.value for label in job.labels}
            return _base(job, question=question, probabilities=probabilities, labels=labels)
        logits = outputs.mask_logits[-len(job.masks) :]
        masks = _masks_of(job, logits, self.processor.image_processor, volumes[-1], output)
        return _base(job, question=question, masks=masks)

    def _named_diseases(self, messages: Sequence[dict[str, Any]]) -> list[int] | None:
        """Ids of the diseases of all answers of a conversation; None where there are none, or one question names others."""
        ids: list[int] = []
        for place in range(1, len(messages)):
            count = text_of(messages[place]).count(DISEASE_TOKEN) if messages[place]["role"] == "assistant" else 0
            named = self.processor.named_diseases(text_of(messages[place - 1])) if count else []
            if named is None or len(named) != count:
                return None
            ids += named
        return ids or None

    @torch.inference_mode()
    def _speak(self, jobs: Sequence[_Job], options: RunOptions) -> list[Record]:
        """Generated answers of a batch, padded on the left."""
        from ..modeling.vision_ctinstruct import CTInstructVisionOutput

        looked = [self._look(job.sample.images)[0] for job in jobs]
        rows = [self._ids(job.messages[: job.turn], seen, True)[0] for job, seen in zip(jobs, looked, strict=True)]
        pad = self.processor.tokenizer.pad_token_id
        longest = max(len(row) for row in rows)
        ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0), value=pad) for row in rows])
        kept = torch.stack([torch.nn.functional.pad(torch.ones_like(row), (longest - len(row), 0)) for row in rows])
        features = looked[0] if len(looked) == 1 else CTInstructVisionOutput(
            last_hidden_state=torch.cat([one.last_hidden_state for one in looked]),
            pooler_output=[part for one in looked for part in one.pooler_output],
            patch_grid=torch.cat([one.patch_grid for one in looked]),
        )  # fmt: skip
        made = self.model.generate(
            input_ids=ids,
            attention_mask=kept,
            vision_features=features,
            do_sample=False,
            max_new_tokens=options.max_new_tokens,
        )
        records = []
        for job, row in zip(jobs, made, strict=True):
            said = self.processor.write_out(self.processor.tokenizer.decode(row[longest:]))
            question = text_of(job.sample.messages[job.turn - 1])
            right = text_of(job.sample.messages[job.turn])
            records.append(_base(job, question=question, prediction=said, reference=right, options=job.options))
        return records


class StageOne:
    """A model that aligns: retrieval, categories and masks by name, from the rows of stage one."""

    kind = "alignment"
    tasks = STAGE_ONE_TASKS

    def __init__(self, folder: Path, device: str | None) -> None:
        from ..data.store import PatchStore

        self.model: Any
        self.model, self.processor, tokenizer = load_stage_one(folder, device)
        self.store = PatchStore(self.processor, None)
        tokenizer.padding_side = "right"  # as it was trained: encoders count positions from the left
        self.words = functools.partial(tokenize, tokenizer)

    def jobs_of(self, sample: AlignmentSample) -> Iterator[_Job]:
        if sample.texts:
            yield _Job(sample.id, sample, "retrieval")
        if any(label.value >= 0 for label in sample.labels):
            yield _Job(sample.id, sample, "diagnosis")
        if sample.masks:
            yield _Job(sample.id, sample, "segmentation", masks=sample.masks)

    def answer(self, jobs: Sequence[_Job], output: Path, options: RunOptions) -> Iterator[list[Record]]:
        by_sample: dict[str, list[_Job]] = {}
        for job in jobs:
            by_sample.setdefault(job.id, []).append(job)
        for group in by_sample.values():
            try:
                yield self._one(group, output)
            except CTInstructError as error:
                yield [_base(job, error=str(error)) for job in group]

    @torch.inference_mode()
    def _one(self, jobs: Sequence[_Job], output: Path) -> list[Record]:
        sample: AlignmentSample = jobs[0].sample
        tasks = [job.task for job in jobs]
        batch = questions_of(
            self.store.image(sample.image),
            self.words,
            sample.texts[:1] if "retrieval" in tasks else [],
            sample.labels if "diagnosis" in tasks else [],
            sample.masks if "segmentation" in tasks else [],
        )
        outputs = self.model(**send_to_device(batch, self.model.device))
        records = []
        for job in jobs:
            if job.task == "retrieval":
                values: dict[str, Any] = {
                    "image_features": _rounded(outputs.image_features[0]),
                    "text_features": _rounded(outputs.text_features[0]),
                }
            elif job.task == "diagnosis":
                scores = outputs.category_logits[0].float().sigmoid().tolist()
                values = {
                    "probabilities": {one.name: score for one, score in zip(sample.labels, scores, strict=True)},
                    "labels": {one.name: one.value for one in sample.labels},
                }
            else:
                volume = open_volume(sample.image)
                values = {"masks": _masks_of(job, outputs.mask_logits, self.processor, volume, output)}
            records.append(_base(job, **values))
        return records


def _rounded(features: torch.Tensor) -> list[float]:
    return [round(value, 6) for value in features.float().tolist()]


__all__ = ["RunOptions", "load_data", "options_of", "run_model"]
