"""Checkpoints that are whole or not there: a training that was killed goes on from the last whole one."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

from ..errors import CTInstructError
from ..files import whole_folder, write_whole

logger = logging.getLogger(__name__)
MARK = "complete.json"
NEEDED = ("trainer_state.json", "optimizer.pt", "scheduler.pt")


def mark_complete(checkpoint: Path) -> None:
    """Write down, last of all, which files a checkpoint has and how long they are."""
    files = {
        str(path.relative_to(checkpoint)): path.stat().st_size
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name != MARK
    }
    write_whole(checkpoint / MARK, json.dumps(files, indent=1))


def missing_in(checkpoint: Path) -> list[str]:
    """What a checkpoint lacks to resume exactly; empty where it is whole."""
    try:
        files = json.loads((checkpoint / MARK).read_text())
    except (OSError, ValueError):
        return [MARK]
    lost = [name for name, size in files.items() if not _has_size(checkpoint / name, size)]
    # FSDP writes optimizer.bin or a folder, DeepSpeed a folder
    sharded = "optimizer.bin" in files or any("optimizer" in name and "/" in name for name in files)
    needed = NEEDED[:1] if sharded else NEEDED
    lost += [name for name in needed if name not in files]
    if not any(name.startswith("rng_state") for name in files):
        lost.append("rng_state.pth")
    return lost


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def newest_complete(folder: Path) -> Path | None:
    """The last whole checkpoint of a run; incomplete ones, left by a killed process, are passed over."""
    found = {int(match[1]): path for path in folder.glob("checkpoint-*") if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))}  # fmt: skip
    for step in sorted(found, reverse=True):
        lost = missing_in(found[step])
        if not lost:
            return found[step]
        logger.warning("%s is incomplete (%s) and is passed over.", found[step].name, ", ".join(lost))
    return None


def require_complete(checkpoint: Path) -> Path:
    """Raises CTInstructError where a checkpoint that was asked for by name cannot be resumed exactly."""
    lost = missing_in(checkpoint)
    if lost:
        raise CTInstructError(f"{checkpoint} cannot be resumed: {', '.join(lost)} is missing or cut short.")
    return checkpoint


def place_to_start(folder: Path, recipe: dict[str, Any], resume: str | None, restart: bool, writes: bool) -> str | None:
    """The checkpoint to go on from; the recipe is kept beside it, and another one is refused."""
    kept = folder / "recipe.json"
    text = json.dumps(recipe, indent=1, sort_keys=True, default=str)
    if restart and writes and kept.exists():
        shutil.rmtree(folder)
    if resume is not None:
        return str(require_complete(Path(resume)))
    found = newest_complete(folder) if folder.is_dir() else None
    if kept.exists() and found is not None and not restart:  # else nothing was trained yet
        before = json.loads(kept.read_text())
        now = json.loads(text)
        changed = sorted(
            name for name in {*before, *now} if before.get(name) != now.get(name) and name not in FREE_KEYS
        )
        if changed:
            raise CTInstructError(
                f"{folder} holds a run of another recipe (different: {', '.join(changed)}): "
                "choose another output_dir, or --restart."
            )
        return str(found)
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(kept, text)
    return None


# settings that change where and how often a run looks, not what it computes
FREE_KEYS = ("output_dir", "cache", "logging_steps", "save_steps", "eval_steps", "save_total_limit", "report_to",
             "dataloader_num_workers", "disable_tqdm", "log_level", "eval_strategy", "save_strategy")  # fmt: skip


def save_trained(folder: Path, model: Any, *parts: Any) -> None:
    """A trained model, or adapters with the config of their model, and what belongs to it (tokenizer, processor) in one folder, which appears when it is whole."""
    if folder.exists():
        shutil.rmtree(folder)
    with whole_folder(folder) as temporary:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        base.config.trained = True
        if base is not model:  # adapters alone
            base.config.save_pretrained(temporary)
            base.generation_config.save_pretrained(temporary)
        for part in (model, *parts):
            backend = getattr(getattr(part, "tokenizer", part), "backend_tokenizer", None)
            if backend is not None:  # it remembers how the last batch was padded: no business of whoever loads it
                backend.no_padding()
                backend.no_truncation()
            part.save_pretrained(
                temporary, **({"save_embedding_layers": False} if part is not base and part is model else {})
            )
