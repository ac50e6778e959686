"""Arguments of the image processor and the processor, typed as Transformers checks them.

Without `from __future__ import annotations`: Transformers reads the annotations as types.
"""

from collections.abc import Sequence
from typing import Any

from transformers.processing_utils import ImagesKwargs, ProcessingKwargs


class CTInstructImageProcessorKwargs(ImagesKwargs, total=False):
    """Settings of `CTInstructImageProcessor`, each also an argument of a call; `spacing` is only that. Those that
    every image processor of Transformers takes (`do_rescale`, …) change nothing here."""

    patch_size: dict[str, int] | None
    max_patches: int | None
    fit: str | None
    axes: str | None
    intensity: str | None
    hu_window: Sequence[float] | None
    target_spacing: Sequence[float] | None
    antialias: bool | None
    mask_floors: dict[str, Any] | None
    spacing: Any


class CTInstructProcessorKwargs(ProcessingKwargs, total=False):
    """Arguments of `CTInstructProcessor`: those of Transformers' processors, with our image processor's."""

    images_kwargs: CTInstructImageProcessorKwargs  # type: ignore[misc]
