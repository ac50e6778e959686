"""What stage two reads once and keeps for a small model: the frozen tower's tokens, and stage one's prompts of the decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ...data.mixture import MixtureEntry
from ...data.samples import ImageRef
from ...data.store import PatchStore
from .settings import SmallInstruction
from .stage_one import Texts, load_stage_one, start_bridger
from .token_store import TokenStore


def read_once(
    settings: SmallInstruction,
    vision: str | None,
    model: Any,
    store: PatchStore,
    entries: Sequence[MixtureEntry],
    held_out: Sequence[MixtureEntry],
    args: Any,
    fresh: bool,
    progress: Callable[[str], None],
) -> tuple[TokenStore | None, Texts | None]:
    """(tokens, prompts) for `InstructionCollator`; None each where the block does not ask for them.

    Args:
        settings: the block.
        vision: folder of the stage-one model.
        model: without adapters around it; its bridger is started where the block asks for it.
        store: of the patches.
        entries, held_out: whose images are read.
        args: TrainingArguments.
        fresh: the training begins anew; else the bridger stays as the checkpoint has it.
        progress: called with a sentence.
    """
    tokens = None
    if settings.keep_tokens:
        tokens = TokenStore(store, model.model.vision_tower.to(args.device))
        with args.main_process_first(desc="tokens"):
            tokens.fill(_images([*entries, *held_out], settings.align_prompts), progress)
    starts = settings.start_bridger and fresh
    if not (settings.align_prompts or starts):
        return tokens, None
    stage_one, embed = load_stage_one(str(vision))
    if starts:
        assert tokens is not None
        start_bridger(model.model.bridger, stage_one, embed, tokens, entries)
    return tokens, embed if settings.align_prompts else None


def _images(entries: Sequence[MixtureEntry], with_masks: bool) -> list[ImageRef]:
    """The images whose tokens are wanted: of rows without masks, or of all."""
    rows = (row for entry in entries for row in entry.rows if with_masks or not row["masks"])
    return [ImageRef(**image) for row in rows for image in row["images"]]
