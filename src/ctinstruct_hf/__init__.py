"""CTInstruct for Transformers: read a CT, ask in words, get text, masks and probabilities. Research use only."""

from __future__ import annotations

import importlib
import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .errors import CTInstructError

# public name -> module; loaded on first use, since the command line needs few of them
_HOMES = {
    "CTVolume": "processing.volume",
    "read_volume": "processing.volume_reading",
    "list_series": "processing.volume_series",
    "CTInstructImageProcessor": "processing.image_processing_ctinstruct",
    "CTInstructProcessor": "processing.processing_ctinstruct",
    "CTInstructConfig": "modeling.configuration_ctinstruct",
    "CTInstructVisionConfig": "modeling.configuration_ctinstruct",
    "CTInstructSegmentationConfig": "modeling.configuration_ctinstruct",
    "CTInstructVisionModel": "modeling.vision_ctinstruct",
    "CTInstructSegmentationDecoder": "modeling.segmentation_ctinstruct",
    "CTInstructForPretraining": "modeling.pretraining_ctinstruct",
    "CTInstructModel": "modeling.modeling_ctinstruct",
    "CTInstructForConditionalGeneration": "modeling.modeling_ctinstruct",
    "Study": "inference.study",
}
__all__ = ["CTInstructError", "__version__", *_HOMES]

if TYPE_CHECKING:
    from .inference.study import Study
    from .modeling.configuration_ctinstruct import (
        CTInstructConfig,
        CTInstructSegmentationConfig,
        CTInstructVisionConfig,
    )
    from .modeling.modeling_ctinstruct import CTInstructForConditionalGeneration, CTInstructModel
    from .modeling.pretraining_ctinstruct import CTInstructForPretraining
    from .modeling.segmentation_ctinstruct import CTInstructSegmentationDecoder
    from .modeling.vision_ctinstruct import CTInstructVisionModel
    from .processing.image_processing_ctinstruct import CTInstructImageProcessor
    from .processing.processing_ctinstruct import CTInstructProcessor
    from .processing.volume import CTVolume
    from .processing.volume_reading import read_volume
    from .processing.volume_series import list_series


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ctinstruct_hf' has no attribute '{name}'")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


def _is_command_line() -> bool:
    """Whether `ctinstruct` or `python -m ctinstruct_hf.cli` is starting."""
    program = Path(*sys.argv[:1]).name.removesuffix(".exe")
    return program == "ctinstruct" or ("-m", "ctinstruct_hf.cli") in pairwise(sys.orig_argv)


if not _is_command_line():  # `--help` needs no Transformers; whatever loads models does so by inference.models
    from . import _auto
