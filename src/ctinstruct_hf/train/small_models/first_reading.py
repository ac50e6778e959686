"""The fresh language model `tiny` learns to read from words alone, before it is shown a scan. Not in the paper."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ...errors import CTInstructError
from ...files import whole_folder
from ...processing.image_processing_ctinstruct import CTInstructImageProcessor
from ...processing.processing_ctinstruct import CTInstructProcessor
from ..collator import spell
from ..language_models import FRESH, load_language_model


@dataclass(frozen=True)
class FirstReading:
    """How the fresh language model learns to read, before it is shown a scan.

    Attributes:
        steps: of AdamW, with a cosine schedule.
        batch_size: conversations of a step.
        turns: questions of a conversation, at most.
        learning_rate: its highest.
    """

    steps: int
    batch_size: int = 8
    turns: int = 6
    learning_rate: float = 2.0e-3

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            whole = name != "learning_rate"
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or value <= 0:
                raise CTInstructError(f"read_first: {name} is {value!r}: give a {'whole ' * whole}number above 0.")

    @classmethod
    def of(cls, settings: dict[str, Any]) -> FirstReading:
        """From a recipe.

        Raises:
            CTInstructError: for what is no mapping, unknown keys, none for `steps`, or values that are no positive numbers.
        """
        known = [field.name for field in fields(cls)]
        if not isinstance(settings, dict):
            raise CTInstructError(f"read_first is {settings!r}: give {{steps: …}}.")
        unknown = sorted(set(settings) - set(known))
        if unknown or "steps" not in settings:
            raise CTInstructError(f"read_first has {', '.join(unknown) or 'no steps'}: known are {', '.join(known)}.")
        return cls(**settings)


def learn_to_read(folder: Path, reading: FirstReading, args: Any, progress: Callable[[str], None]) -> None:
    """Train the language model `tiny` on imagined conversations, words alone, and write it with its tokenizer into a folder
    that `load_language_model` takes. A pretrained one brings along what it learns here: grammar, that names are
    copied from a question, that a conclusion follows from what was said. Not in the paper, which starts from Qwen2.

    What was trained there by the same settings stays.

    Args:
        folder: of the language model.
        reading: how.
        args: of the training: device, bf16, seed, disable_tqdm.
        progress: called with a sentence on progress.

    Raises:
        CTInstructError: where the loss is no number.
    """
    from tqdm.auto import tqdm
    from transformers import get_cosine_schedule_with_warmup, set_seed

    settings = {**asdict(reading), "seed": args.seed, "bf16": args.bf16}
    mark = folder / "read_first.json"
    if mark.exists() and json.loads(mark.read_text()) == settings:
        return
    set_seed(args.seed)
    model, tokenizer = load_language_model(FRESH)
    model.to(args.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=reading.learning_rate, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(50, reading.steps // 4), reading.steps)
    processor = CTInstructProcessor(CTInstructImageProcessor(), tokenizer)
    loss = torch.tensor(0.0)
    for step in tqdm(range(reading.steps), desc="learning to read", disable=args.disable_tqdm):
        batch = {name: tensor.to(args.device) for name, tensor in _imagined_batch(processor, reading, step).items()}
        with torch.autocast(args.device.type, torch.bfloat16, enabled=bool(args.bf16)):
            loss = model(**batch).loss
        if not torch.isfinite(loss):
            raise CTInstructError(f"read_first: the loss of step {step + 1} is {loss.item()}: lower its learning_rate.")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 200 == 0:
            progress(f"learning to read: step {step + 1}, loss {loss.item():.3f}")
    with whole_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / mark.name).write_text(json.dumps(settings, indent=1))


def _imagined_batch(processor: Any, reading: FirstReading, step: int) -> dict[str, torch.Tensor]:
    """Conversations of one step; labels are −100 but on answers, as in stage two."""
    from ...data.sources.made import imagined_conversation

    first = step * reading.batch_size
    seeds = range(first, first + reading.batch_size)
    spelled = [spell(processor, imagined_conversation(seed, reading.turns)) for seed in seeds]
    ids, labels = ([torch.tensor(one[place]) for one in spelled] for place in range(2))
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=processor.tokenizer.pad_token_id),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
        "attention_mask": pad_sequence([torch.ones_like(one) for one in ids], batch_first=True),
    }
