"""The `tiny` preset as a loadable folder: model, processor and tokenizer that fit each other."""

from __future__ import annotations

from pathlib import Path

import torch

from ..data.store import TINY_PATCH
from ..modeling.configuration_ctinstruct import CT_RATE_DISEASES, RAD_CHESTCT_DISEASES, CTInstructConfig
from ..modeling.modeling_ctinstruct import CTInstructForConditionalGeneration
from ..processing.image_processing_ctinstruct import CTInstructImageProcessor
from ..processing.processing_ctinstruct import CTInstructProcessor
from .structures import FINDINGS, ORGANS, UNIONS
from .vocabulary import train_tokenizer


def tiny_processor() -> CTInstructProcessor:
    """The processor of the `tiny` preset: patches of 128 x 128 x 32, and the tokenizer of `train_tokenizer`."""
    image_processor = CTInstructImageProcessor(patch_size=TINY_PATCH, max_patches=4)
    config = tiny_config()
    return CTInstructProcessor(image_processor, train_tokenizer(), disease_lists=config.disease_lists)


def tiny_config() -> CTInstructConfig:
    """The `tiny` preset, with the phantoms' findings as a third list of diseases."""
    lists = {"ct_rate": CT_RATE_DISEASES, "phantom": FINDINGS, "rad_chestct": RAD_CHESTCT_DISEASES}
    return CTInstructConfig.preset(
        "tiny",
        disease_lists={name: list(diseases) for name, diseases in lists.items()},
        structures=[*ORGANS, *UNIONS, *FINDINGS],
    )


def build_tiny(folder: Path, seed: int = 0) -> None:
    """Write the untrained checkpoint."""
    torch.manual_seed(seed)
    processor = tiny_processor()
    config = tiny_config()
    config.text_config.vocab_size = len(processor.tokenizer)
    config.trained = False
    model = CTInstructForConditionalGeneration(config)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.bfloat16().save_pretrained(folder)
    processor.save_pretrained(folder)
