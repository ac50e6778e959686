"""Registration with the Auto classes, each at the moment its module is there.

Importing this package must not import torch and Transformers. So where a module of the Auto classes is not loaded yet, a
finder waits for it and registers right after.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

_AUTO = "transformers.models.auto."


def _configs() -> None:
    from transformers import AutoConfig

    from .modeling.configuration_ctinstruct import (
        CTInstructConfig,
        CTInstructSegmentationConfig,
        CTInstructVisionConfig,
    )

    for config in (CTInstructConfig, CTInstructVisionConfig, CTInstructSegmentationConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)


def _models() -> None:
    from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForPreTraining

    from .modeling.configuration_ctinstruct import (
        CTInstructConfig,
        CTInstructSegmentationConfig,
        CTInstructVisionConfig,
    )
    from .modeling.modeling_ctinstruct import CTInstructForConditionalGeneration, CTInstructModel
    from .modeling.pretraining_ctinstruct import CTInstructForPretraining
    from .modeling.segmentation_ctinstruct import CTInstructSegmentationDecoder
    from .modeling.vision_ctinstruct import CTInstructVisionModel

    AutoModel.register(CTInstructConfig, CTInstructModel, exist_ok=True)
    AutoModel.register(CTInstructVisionConfig, CTInstructVisionModel, exist_ok=True)
    AutoModel.register(CTInstructSegmentationConfig, CTInstructSegmentationDecoder, exist_ok=True)
    AutoModelForImageTextToText.register(CTInstructConfig, CTInstructForConditionalGeneration, exist_ok=True)
    AutoModelForPreTraining.register(CTInstructConfig, CTInstructForPretraining, exist_ok=True)


def _image_processor() -> None:
    from transformers import AutoImageProcessor

    from .modeling.configuration_ctinstruct import CTInstructConfig
    from .processing.image_processing_ctinstruct import CTInstructImageProcessor

    AutoImageProcessor.register(CTInstructConfig, slow_image_processor_class=CTInstructImageProcessor, exist_ok=True)


def _processor() -> None:
    from transformers import AutoProcessor

    from .modeling.configuration_ctinstruct import CTInstructConfig
    from .processing.processing_ctinstruct import CTInstructProcessor

    AutoProcessor.register(CTInstructConfig, CTInstructProcessor, exist_ok=True)


_REGISTRARS: dict[str, Callable[[], None]] = {
    _AUTO + "configuration_auto": _configs,
    _AUTO + "modeling_auto": _models,
    _AUTO + "image_processing_auto": _image_processor,
    _AUTO + "processing_auto": _processor,
}


class _Loader(importlib.abc.Loader):
    """The module's own loader, and our registration after it."""

    def __init__(self, loader: Any, name: str) -> None:
        self.loader, self.name = loader, name

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _REGISTRARS[self.name]()


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of the Auto classes once, to run `_Loader` on them."""

    def __init__(self) -> None:
        self.waiting = set(_REGISTRARS)

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in self.waiting:
            return None
        self.waiting.discard(name)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, name)
        return spec


def register() -> None:
    """Register now what is loaded, and the rest as soon as it is."""
    finder = _Finder()
    for name, registrar in _REGISTRARS.items():
        if name in sys.modules:
            finder.waiting.discard(name)
            registrar()
    if finder.waiting:
        sys.meta_path.insert(0, finder)
