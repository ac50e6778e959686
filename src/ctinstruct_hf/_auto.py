"""Registration with the Auto classes, at the moment somebody looks something up in them.

Importing this package must import neither torch nor Transformers, and Transformers loads its Auto modules while it is
itself half loaded. So each of its registries gets a dictionary that fills in our classes when it is first read.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

_AUTO = "transformers.models.auto."
# while one of these is being executed, nothing of ours can be imported
_CORE = (
    "transformers.modeling_utils",
    "transformers.processing_utils",
    "transformers.image_processing_utils",
    "transformers.generation.utils",
    _AUTO + "configuration_auto",
    _AUTO + "modeling_auto",
    _AUTO + "image_processing_auto",
    _AUTO + "processing_auto",
)


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
    from transformers import (
        AutoModel,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
        AutoModelForPreTraining,
    )

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
    AutoModelForMultimodalLM.register(CTInstructConfig, CTInstructForConditionalGeneration, exist_ok=True)
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


# module -> (its registries, what fills them)
_REGISTRIES: dict[str, tuple[tuple[str, ...], Callable[[], None]]] = {
    _AUTO + "configuration_auto": (("CONFIG_MAPPING",), _configs),
    _AUTO + "modeling_auto": (
        (
            *("MODEL_MAPPING", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING", "MODEL_FOR_MULTIMODAL_LM_MAPPING"),
            "MODEL_FOR_PRETRAINING_MAPPING",
        ),
        _models,
    ),
    _AUTO + "image_processing_auto": (("IMAGE_PROCESSOR_MAPPING",), _image_processor),
    _AUTO + "processing_auto": (("PROCESSOR_MAPPING",), _processor),
}
_filled: set[Callable[[], None]] = set()


def _half_loaded() -> bool:
    ours = (name for name in list(sys.modules) if name.startswith(__package__ + "."))
    return any(
        getattr(getattr(sys.modules.get(name), "__spec__", None), "_initializing", False) for name in (*_CORE, *ours)
    )


class _LazyEntries(dict[Any, Any]):
    """The `_extra_content` of one registry: fills in our classes when it is read."""

    fill: Callable[[], None]

    def _ready(self) -> None:
        if self.fill not in _filled and not _half_loaded():
            _filled.add(self.fill)
            self.fill()

    def __contains__(self, key: object) -> bool:
        self._ready()
        return super().__contains__(key)

    def __getitem__(self, key: Any) -> Any:
        self._ready()
        return super().__getitem__(key)

    def __iter__(self) -> Iterator[Any]:
        self._ready()
        return super().__iter__()

    def get(self, key: Any, default: Any = None) -> Any:
        self._ready()
        return super().get(key, default)

    def keys(self) -> Any:
        self._ready()
        return super().keys()

    def values(self) -> Any:
        self._ready()
        return super().values()

    def items(self) -> Any:
        self._ready()
        return super().items()


def _prepare(module: ModuleType) -> None:
    """Give the registries of a loaded Auto module their lazy dictionary."""
    for table in ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES"):
        if hasattr(module, table):  # where `transformers serve` looks up what a model is
            getattr(module, table)["ctinstruct"] = "CTInstructForConditionalGeneration"
    names, fill = _REGISTRIES[module.__name__]
    for name in names:
        registry = getattr(module, name)
        entries = _LazyEntries(registry._extra_content)
        entries.fill = fill
        registry._extra_content = entries


class _Loader(importlib.abc.Loader):
    """The module's own loader, and `_prepare` after it."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _prepare(module)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the Auto modules once each, to run `_Loader` on them."""

    def __init__(self, waiting: set[str]) -> None:
        self.waiting = waiting

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in self.waiting:
            return None
        self.waiting.discard(name)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def register() -> None:
    """Prepare what is loaded now, and the rest as soon as it is."""
    waiting = {name for name in _REGISTRIES if name not in sys.modules}
    for name in _REGISTRIES.keys() - waiting:
        _prepare(sys.modules[name])
    if waiting:
        sys.meta_path.insert(0, _Finder(waiting))
