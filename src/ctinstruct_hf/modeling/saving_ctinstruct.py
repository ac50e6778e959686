"""What lets a saved folder load anywhere with `trust_remote_code=True`: the code files and the map to their classes."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files

MODEL_AUTO_MAP = {
    "ctinstruct": {
        "AutoConfig": "configuration_ctinstruct.CTInstructConfig",
        "AutoModel": "modeling_ctinstruct.CTInstructModel",
        "AutoModelForImageTextToText": "modeling_ctinstruct.CTInstructForConditionalGeneration",
        "AutoModelForPreTraining": "pretraining_ctinstruct.CTInstructForPretraining",
    },
    "ctinstruct_vision": {
        "AutoConfig": "configuration_ctinstruct.CTInstructVisionConfig",
        "AutoModel": "vision_ctinstruct.CTInstructVisionModel",
    },
    "ctinstruct_segmentation": {
        "AutoConfig": "configuration_ctinstruct.CTInstructSegmentationConfig",
        "AutoModel": "segmentation_ctinstruct.CTInstructSegmentationDecoder",
    },
}
# modules that the map names but that a model's own file may not import
_ENTRY_MODULES = ("modeling_ctinstruct.py", "pretraining_ctinstruct.py")


class SavesItsCode:
    """Mixin for models: `save_pretrained` also writes the code files and `auto_map`."""

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in Transformers; the folder then loads with `trust_remote_code=True` without this package."""
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if not kwargs.get("is_main_process", True):
            return
        folder = Path(save_directory)
        add_auto_map(folder / "config.json", MODEL_AUTO_MAP[self.config.model_type])  # type: ignore[attr-defined]
        here = Path(inspect.getfile(type(self))).parent
        entries = [Path(inspect.getfile(type(self))), *(here / name for name in _ENTRY_MODULES if (here / name).exists())]
        copy_code(entries, folder)


def add_auto_map(config_file: Path, auto_map: dict[str, str]) -> None:
    """Put `auto_map` into a saved config."""
    config = json.loads(config_file.read_text())
    config["auto_map"] = auto_map
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def copy_code(entries: list[Path], folder: Path) -> None:
    """The given modules and the siblings that they import, flat into the folder."""
    files = {Path(file) for entry in entries for file in (entry, *get_relative_import_files(str(entry)))}
    for file in sorted(files):
        if file.parent.resolve() != folder.resolve():
            shutil.copyfile(file, folder / file.name)
