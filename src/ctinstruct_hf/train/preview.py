"""What a stage-two recipe shows the model: some samples as the template writes them, with the tokens that count for the loss
marked, and their masks as pictures. No weights are loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.mixture import Mixture, MixtureBatches
from ..data.parts import load_part
from ..data.store import PatchStore
from ..files import whole_file
from .augmentation import Augmentation, to_canvas
from .building import build_processor
from .collator import InstructionCollator
from .instruct_settings import InstructSettings
from .pictures import tile_masks
from .recipe import parse_recipe
from .trainer import data_seed

MARKS = ("⟦", "⟧")  # around what counts for the loss


def preview(recipe: dict[str, Any], count: int, show: Callable[[str], None]) -> list[Path]:
    """The first samples of a run, as the trainer will read them.

    Args:
        recipe: from `read_recipe`.
        count: of samples.
        show: called with each sample's text: between `MARKS` is what counts for the loss, and image tokens are counted.

    Returns:
        Pictures in `output_dir/preview`, one for each sample with masks: each mask in green on the slice where it is largest.

    Raises:
        CTInstructError: for a bad recipe, and a sample that cannot be read.
    """
    settings, args = parse_recipe({**recipe, "trainer": "transformers"}, InstructSettings)
    processor, names_masks = build_processor(settings)
    store = PatchStore(processor.image_processor, settings.cache, settings.cache_limit)
    mixture = Mixture([load_part(part, "instructions") for part in settings.mixture])
    augmentation = Augmentation.of(settings.augmentation) if settings.augmentation else None
    collator = InstructionCollator(
        store, processor, settings.max_tokens, settings.padding_side, data_seed(args), 0, names_masks=names_masks,
        augmentation=augmentation,
    )  # fmt: skip
    pictures: list[Path] = []
    places = [place for batch in MixtureBatches(mixture, 1, count, data_seed(args)) for place in batch]
    for number, place in enumerate(places[:count], start=1):
        item = mixture[place]
        batch = collator([item])
        show(f"{number}. {mixture.entries[place[0]].name}, {item.row['task']}\n{marked_text(processor, batch)}")
        if "mask_labels" in batch:
            path = Path(args.output_dir) / "preview" / f"{number}.png"
            _draw(batch, [mask["name"] for mask in item.row["masks"]], path)
            pictures.append(path)
    return pictures


def marked_text(processor: Any, batch: dict[str, Any], row: int = 0) -> str:
    """A sample's text: tokens with a label between `MARKS`, a run of image tokens as their number, no padding."""
    kept = batch["attention_mask"][row].bool()
    ids, labels = batch["input_ids"][row][kept].tolist(), batch["labels"][row][kept].tolist()
    runs: list[tuple[str, list[int]]] = []  # tokens that are alike in what they are
    for token, label in zip(ids, labels, strict=True):
        role = "image" if token == processor.image_token_id else "learned" if label >= 0 else "read"
        if not runs or runs[-1][0] != role:
            runs.append((role, []))
        runs[-1][1].append(token)
    written = []
    for role, tokens in runs:
        if role == "image":
            written.append(f"{processor.image_token} × {len(tokens)}")
        else:
            text = processor.tokenizer.decode(tokens)
            written.append(f"{MARKS[0]}{text}{MARKS[1]}" if role == "learned" else text)
    return "".join(written)


def _draw(batch: dict[str, Any], names: list[str], path: Path) -> None:
    """The masks of one sample on the image that has their shape."""
    from PIL import Image

    sizes = [int(np.prod(grid)) for grid in batch["patch_grid"].tolist()]
    parts = zip(batch["pixel_values"].split(sizes), batch["patch_grid"].tolist(), strict=True)
    canvases = [to_canvas(rows, grid) for rows, grid in parts]
    masks: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    canvas = next(one for one in canvases if one.shape == batch["mask_labels"][0].shape)
    for name, mask in zip(names, batch["mask_labels"], strict=False):
        if mask.shape == canvas.shape:
            masks[name] = ((mask > 0).numpy(), torch.zeros_like(mask, dtype=torch.bool).numpy())
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        Image.fromarray(tile_masks(canvas.numpy(), masks)).save(temporary, format="png")


__all__ = ["MARKS", "marked_text", "preview"]
