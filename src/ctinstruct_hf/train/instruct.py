"""Stage two from a recipe (section 3.3): TRL's SFTTrainer, or Transformers' Trainer, over a mixture of instructions."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..data.mixture import MixtureEntry, skips_allowed
from ..data.names import Names, structure_names
from ..data.parts import load_part
from ..data.samples import text_of
from ..data.store import PatchStore
from ..errors import CTInstructError
from ..files import write_whole
from .augmentation import Augmentation
from .building import build_model, in_full
from .checkpoints import place_to_start, save_trained
from .collator import InstructionCollator
from .held_out import held_out_batches
from .instruct_settings import PARTS, InstructSettings
from .instruction_trainer import InstructionTrainer, placeholder, sft_trainer
from .outlook import Curves, Outlook
from .recipe import parse_recipe
from .sharded import built_whole, whole_model
from .small_models.first_reading import FirstReading, learn_to_read
from .small_models.schedules import LossSchedule
from .small_models.stage_two import read_once
from .trainer import base_of, check_rates, data_seed, make_mixture


def instruct(
    recipe: dict[str, Any],
    resume: str | None = None,
    restart: bool = False,
    tell: Callable[[str], None] = lambda step: None,
) -> dict[str, float]:
    """Tune on instructions; a run that was interrupted goes on from its last whole checkpoint.

    Args:
        recipe: from `read_recipe`.
        resume: a checkpoint to go on from, instead of the last whole one in `output_dir`.
        restart: begin anew; what is in `output_dir` of an earlier run is removed.
        tell: called with a sentence on progress, in the main process.

    Returns:
        The losses and scores on the held-out batches; empty without an evaluation. The model, adapters merged or, with `save:
        adapter`, alone, and its processor are in `output_dir/model`, which every command takes as `--model`.

    Raises:
        CTInstructError: for a bad recipe, before anything is trained.
    """
    kind = recipe.get("trainer", "trl")
    arguments = None
    if kind == "trl":
        from trl import SFTConfig

        arguments = SFTConfig
    settings, args = parse_recipe(recipe, InstructSettings, arguments, **defaults_here(recipe))
    if args.process_index:
        tell = lambda step: None  # noqa: E731
    small = settings.small_model
    folder = Path(args.output_dir)
    start = place_to_start(folder, recipe, resume, restart, args.should_save)
    from transformers import EarlyStoppingCallback, set_seed

    if small.read_first and start is None:  # the checkpoint that training resumes from can read
        with args.main_process_first(desc="learning to read"):
            learn_to_read(folder / "language_model", FirstReading.of(small.read_first), args, tell)
        settings = replace(
            settings, language_model=str(folder / "language_model"), small_model=replace(small, read_first={})
        )
    set_seed(args.seed)
    with built_whole(args):
        model, processor = build_model(settings, args.bf16)
    known = structure_names(base_of(model), processor)
    goes_on = settings.model is not None or base_of(model).config.structures is not None
    store = PatchStore(processor.image_processor, settings.cache, settings.cache_limit)
    with args.main_process_first(desc="data"):
        entries = [load_part(part, "instructions") for part in settings.mixture]
        held_out = [load_part(part, "instructions") for part in settings.evaluation_parts]
    for entry in [*entries, *held_out]:
        check_rows(entry)
    for entry in entries:
        put_like_rows_together(entry, settings.group_by_length)
    tokens, prompts = read_once(
        small, settings.vision, base_of(model), store, entries, held_out, args, start is None, tell
    )
    collator = InstructionCollator(
        store, processor, settings.max_tokens, settings.padding_side, data_seed(args),
        skips_allowed(settings.max_skipped, entries), tokens, prompts, base_of(model).config.names_masks,
    )  # fmt: skip
    exact = copy.copy(collator)  # held-out scans stay as they are
    if settings.augmentation:
        collator.augmentation = Augmentation.of(settings.augmentation)
    mixture = make_mixture(entries, args, start)
    looked_at = placeholder(entries) if held_out else None  # `evaluate` reads the held-out batches
    if settings.trainer == "trl":
        trainer: Any = sft_trainer(model, args, mixture, collator, entries, eval_dataset=looked_at)
    else:
        trainer = InstructionTrainer(model, args, mixture, collator, eval_dataset=looked_at)
    trainer.learning_rates = check_rates(settings.learning_rates, base_of(model))
    trainer.add_callback(LossSchedule(small.positive_voxels, {}))
    trainer.add_callback(Outlook(tell))
    trainer.add_callback(Curves())
    counts = [int(part.get("batches", 8)) for part in settings.evaluations]
    trainer.held_out = held_out_batches(held_out, counts, args.per_device_eval_batch_size)
    trainer.held_out_collator = exact
    if settings.early_stopping_patience is not None:
        trainer.add_callback(EarlyStoppingCallback(settings.early_stopping_patience))
    tell("training" if start is None else f"going on from {Path(start).name}")
    trainer.train(resume_from_checkpoint=start)
    metrics = trainer.evaluate() if trainer.held_out else {}
    if settings.lora is not None:
        trainer.make_anew = lambda: build_model(settings, args.bf16)[0]
    trained = whole_model(trainer)
    if trainer.is_world_process_zero():
        base_of(trained).config.structures = taught_structures(entries, known if goes_on else None)
        if settings.load_in_4bit and settings.save == "merged":
            trained = in_full(trained)
        if hasattr(trained, "merge_and_unload") and settings.save == "merged":  # adapters go into the weights
            trained = trained.merge_and_unload()
        save_trained(folder / "model", trained, processor)
        write_whole(folder / "scores.json", json.dumps(metrics, indent=1))
    trainer.accelerator.wait_for_everyone()
    return metrics


def defaults_here(recipe: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the trainer where a recipe says nothing, as they fit this machine: a volume at a time and eight a step on a GPU,
    two a step on a CPU, of which each takes seconds."""
    gpu = torch.cuda.is_available() and not recipe.get("use_cpu")
    sizes = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 8 if gpu else 2,
        "per_device_eval_batch_size": 1,
    }
    return {
        **({} if "per_device_train_batch_size" in recipe else sizes),
        "bf16": gpu and torch.cuda.is_bf16_supported(), "gradient_checkpointing": False,  # TRL's own are a GPU's
        "report_to": "tensorboard", "logging_steps": 10, "save_total_limit": 2,
    }  # fmt: skip


def taught_structures(entries: Sequence[MixtureEntry], before: Names | None = None) -> list[str] | None:
    """The structures that a model was taught to mark, by name; None where that is not known: of streamed parts, and of a model
    without a list that training went on from (`before`)."""
    if (before is not None and not before.listed) or not all(hasattr(entry.rows, "__len__") for entry in entries):
        return None
    names = set(before.known) if before is not None else set()
    for rows in (entry.rows for entry in entries if entry.weight > 0):
        light = rows.select_columns(["masks"]) if hasattr(rows, "select_columns") else rows
        names |= {mask["name"] for row in light for mask in row["masks"]}
    return sorted(names)


def check_rows(entry: MixtureEntry) -> None:
    """Raises CTInstructError where a part has no rows, or its first one shows no image."""
    row = next(iter(entry.rows), None)
    if row is None:
        raise CTInstructError(f"'{entry.name}' has no rows of the tasks {', '.join(entry.tasks) or 'asked for'}.")
    if not row["images"]:
        raise CTInstructError(f"'{entry.name}': sample '{row['id']}' has no image; every instruction is about a scan.")


def put_like_rows_together(entry: MixtureEntry, by_length: bool) -> None:
    """Rows with masks come in batches of their own, since one of them has the voxels of the whole batch read; with `by_length` also
    rows of like length, which saves padding."""
    if not hasattr(entry.rows, "__len__"):
        return
    entry.groups = [int(bool(row["masks"])) for row in entry.rows]
    if by_length:
        entry.lengths = [sum(len(text_of(turn)) for turn in row["messages"]) for row in entry.rows]


__all__ = ["PARTS", "InstructSettings", "InstructionTrainer", "build_model", "instruct", "sft_trainer"]
