"""The authors' stage one (`vision_encoder.pth`) -> a stage-one folder."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import CTInstructError
from ...files import whole_folder
from ...modeling.configuration_ctinstruct import CTInstructConfig
from ...modeling.pretraining_ctinstruct import CTInstructForPretraining
from .checkpoint import STAGE_ONE_FILE, Entry, find_checkpoint, read_entries
from .rules import convert_tensor
from .settings import image_processor_of_release, vision_of

# the parts that stage two takes; their names are those of the release without `visual.`
_PARTS = re.compile(r"(visual_encoder|transformer_decoder|decoder|projection_layer|mask_embed_proj)\.(.+)")


def is_stage_one(source: Path) -> bool:
    """Whether `source` is a stage-one file, by its name."""
    if not source.exists():
        return False
    return find_checkpoint(source).suffix == ".pth"


def stage_one_beside(source: Path) -> Path | None:
    """The stage-one file in the folder of a whole model."""
    return source / STAGE_ONE_FILE if (source / STAGE_ONE_FILE).is_file() else None


def convert_stage_one(
    source: Path,
    output: Path,
    load_text_encoder: Callable[[], tuple[Any, Any]],
    progress: Callable[[str], None] = lambda step: None,
) -> Path:
    """Tower and segmentation decoder of the authors' stage one with a text encoder: a stage-one folder.

    Other tensors of the file, which stage two does not use, are left out; the projections of images and of categories are
    untrained, so the folder is for training, not for retrieval.

    Args:
        source: the file, or a folder with `vision_encoder.pth`.
        output: the folder to write.
        load_text_encoder: gives the text encoder and its tokenizer; called once the file is known to be sound.
        progress: called with the name of each step.

    Raises:
        CTInstructError: where the file cannot be read or is something else; nothing is written then.
    """
    file = find_checkpoint(source)
    entries: dict[str, Entry] = {}
    for name, entry in read_entries(file).items():
        found = _PARTS.fullmatch(name)
        if found is not None:
            part = "encoder" if found[1] == "visual_encoder" else found[1]
            entries[f"visual.{part}.{found[2]}"] = entry
    if not any(name.startswith("visual.encoder.") for name in entries):
        raise CTInstructError(f"{file} holds no visual_encoder: it is not the stage one of the release.")
    progress("text encoder")
    encoder, tokenizer = load_text_encoder()
    vision, decoder = vision_of(entries)
    width = decoder["hidden_size"]
    config = CTInstructConfig(
        vision_config=vision,
        segmentation_config=decoder,
        text_encoder_config=encoder.config,
        note="Stage one of the authors' release; its projections of images and categories are untrained.",
    )
    model: Any = CTInstructForPretraining(config)
    model.text_encoder.load_state_dict(encoder.state_dict())
    if encoder.config.hidden_size == width:  # the release queries its decoder with the text's embedding
        nn.init.eye_(model.text_projection.weight)
        nn.init.zeros_(model.text_projection.bias)
    progress("weights")
    found_weights = {
        target.removeprefix("model."): tensor
        for name, entry in entries.items()
        for target, tensor in convert_tensor(name, entry.read())
    }
    parts = ("vision_tower.", "segmentation_decoder.")
    expected = {name for name in model.state_dict() if name.startswith(parts)}
    missing = sorted(expected - set(found_weights))
    if missing:
        raise CTInstructError(
            f"{file} lacks {len(missing)} tensors of the tower and the decoder: {', '.join(missing[:20])}."
        )
    model.load_state_dict(found_weights, strict=False)
    with whole_folder(output) as draft:
        progress("writing")
        model.to(torch.float32).save_pretrained(draft)
        image_processor_of_release().save_pretrained(draft)
        tokenizer.save_pretrained(draft)
    return output
