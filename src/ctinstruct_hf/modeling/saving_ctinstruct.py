"""Code files and `auto_map` of a saved folder, which then loads with `trust_remote_code=True` without this package."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files

from .configuration_ctinstruct import CTInstructError

_TWO_STAGES = {
    "AutoConfig": "configuration_ctinstruct.CTInstructConfig",
    "AutoModel": "modeling_ctinstruct.CTInstructModel",
    "AutoModelForImageTextToText": "modeling_ctinstruct.CTInstructForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_ctinstruct.CTInstructForConditionalGeneration",
}
MODEL_AUTO_MAP = {
    "CTInstructModel": _TWO_STAGES,
    "CTInstructForConditionalGeneration": _TWO_STAGES,
    "CTInstructForPretraining": {
        **_TWO_STAGES,
        "AutoModelForPreTraining": "pretraining_ctinstruct.CTInstructForPretraining",
    },
    "CTInstructVisionModel": {
        "AutoConfig": "configuration_ctinstruct.CTInstructVisionConfig",
        "AutoModel": "vision_ctinstruct.CTInstructVisionModel",
    },
    "CTInstructSegmentationDecoder": {
        "AutoConfig": "configuration_ctinstruct.CTInstructSegmentationConfig",
        "AutoModel": "segmentation_ctinstruct.CTInstructSegmentationDecoder",
    },
}


class SavesItsCode:
    """Mixin for models: `save_pretrained` also writes the code files and `auto_map`."""

    optimized_for_inference = False

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in Transformers; the folder then loads with `trust_remote_code=True` without this package."""
        if self.optimized_for_inference:
            raise CTInstructError("The model is optimised for inference and cannot be saved: load it again.")
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if kwargs.get("is_main_process", True):
            self._add_code(Path(save_directory))

    def _upload_modified_files(self, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        """The last step of `save_pretrained(push_to_hub=True)` and of `push_to_hub`: the code is sent with the rest."""
        self._add_code(Path(working_dir))
        return super()._upload_modified_files(working_dir, *args, **kwargs)  # type: ignore[misc]

    def _add_code(self, folder: Path) -> None:
        home = next((cls for cls in type(self).__mro__ if cls.__name__ in MODEL_AUTO_MAP), None)
        if home is None:  # a class outside this package
            return
        if getattr(self, "_hf_peft_config_loaded", False):  # only an adapter was saved, which names its base model
            return
        add_auto_map(folder / "config.json", MODEL_AUTO_MAP[home.__name__], str(self.dtype).removeprefix("torch."))  # type: ignore[attr-defined]
        copy_code(Path(inspect.getfile(home)), folder)


def add_auto_map(config_file: Path, auto_map: dict[str, str], dtype: str | None = None) -> None:
    """Put `auto_map` into a saved config, and the dtype into its parts, where a loaded model has it too."""
    config = json.loads(config_file.read_text())
    config["auto_map"] = auto_map
    if dtype is not None:
        for part in (
            config,
            *(value for value in config.values() if isinstance(value, dict) and "model_type" in value),
        ):
            part["dtype"] = dtype
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def copy_code(module: Path, folder: Path) -> None:
    """A module and the siblings that it imports, flat into the folder."""
    files = {module, *(Path(file) for file in get_relative_import_files(str(module)))}
    for file in sorted(files):
        if file.parent.resolve() != folder.resolve():
            shutil.copyfile(file, folder / file.name)
