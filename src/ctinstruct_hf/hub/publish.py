"""A model's folder to the Hub in one commit: weights, processor, tokenizer, code files and card, and no other file."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CTInstructError, check_repository, refusal
from ..inference.folders import (
    INDEX,
    MODEL_FILES,
    adapter_base,
    file_inside,
    identify,
    read_object,
    require,
    tensor_shapes,
    weight_files,
)

_SCORES = "scores.json"  # of ctinstruct evaluate
_SETTINGS = ("config.json", "adapter_config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json",
             "tokenizer_config.json")  # fmt: skip
_NEEDED = ("config.json", "processor_config.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Plan:
    """Which files are sent.

    Attributes:
        files: (name, bytes) of each file that is sent, the card included.
        left: names of the other files of the folder.
        card: text of the card.
    """

    files: list[tuple[str, int]]
    left: list[str]
    card: str

    @property
    def size(self) -> int:
        return sum(size for _, size in self.files)


def make_plan(folder: Path, card: str) -> Plan:
    """Choose the files to send; nothing is sent here.

    These are settings, tokenizer, the safetensors files (those of the index, where there is one), the code files that the
    settings name and their imports, and `scores.json`.

    Raises:
        CTInstructError: where the folder is no whole model that loads with `trust_remote_code`, a file of it is a link, or
            settings name a path of this machine.
    """
    if not folder.is_dir():
        raise CTInstructError(f"{folder} does not exist.")
    if identify(folder)[0] != "nothing":
        require(folder, "stage two")
    missing = [name for name in _NEEDED if not (folder / name).exists()]
    if not list(folder.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        raise CTInstructError(f"{folder} is no whole model: it lacks {', '.join(missing)}.")
    settings = {name: read_object(folder / name) for name in _SETTINGS if (folder / name).exists()}
    adapters = adapter_base(folder) is not None  # the model that they belong to has the code
    if not settings["config.json"].get("auto_map") and not adapters:
        raise CTInstructError(f"{folder} has no code files (auto_map): save the model with save_pretrained.")
    for name, values in settings.items():
        _refuse_paths(values, folder / name)
    weights = {file.name for file in weight_files(folder)[0]}
    tensor_shapes(folder)
    plain = {name for name in (*MODEL_FILES, _SCORES) if "*" not in name and name != "model.safetensors"}
    if adapters:
        plain |= {"adapter_config.json"}
    if weights == {"model.safetensors"}:
        plain.discard(INDEX)
    code = _code_files(folder, settings)
    here = sorted(folder.iterdir())
    goes = [path for path in here if path.name in plain | weights | code]
    for path in goes:
        if path.is_symlink() or not path.is_file():
            raise CTInstructError(
                f"{path} is a link or a folder: publish sends files only, so put the file itself there."
            )
    left = [
        f"{path.name} (a link)" if path.is_symlink() else path.name
        for path in here
        if path not in goes and path.name != "README.md"
    ]
    files = [(path.name, path.stat().st_size) for path in goes]
    return Plan([*files, ("README.md", len(card.encode()))], left, card)


def _refuse_paths(values: Any, file: Path, key: str = "") -> None:
    """Refuse settings that name a path of this machine, from which something was loaded.

    Raises:
        CTInstructError: for an absolute path.
    """
    if isinstance(values, dict):
        for name, value in values.items():
            _refuse_paths(value, file, str(name))
    elif isinstance(values, list):
        for value in values:
            _refuse_paths(value, file, key)
    elif isinstance(values, str) and re.search(r"(path|file|dir|folder)s?$", key):
        elsewhere = os.path.isabs(values) or re.match(r"~|[A-Za-z]:[\\/]", values)
        if elsewhere:
            raise CTInstructError(f"{file}: {key} is a path of this machine: remove it before the model is published.")


def _code_files(folder: Path, settings: dict[str, dict[str, Any]]) -> set[str]:
    """The files that settings name in `auto_map`, and the siblings that these import.

    Raises:
        CTInstructError: where a file is missing, or is named outside of the folder.
    """
    found: set[str] = set()
    waiting = [(module, file) for file, values in settings.items() for module in sorted(_modules(values))]
    while waiting:
        module, source = waiting.pop(0)
        name = f"{module}.py"
        if name in found:
            continue
        if not file_inside(folder, name, source).is_file():
            if source.endswith(".py"):
                raise CTInstructError(f"{folder}: {source} needs {name}, which is not there.")
            raise CTInstructError(f"{folder} lacks {name}, which {source} names: save the model with save_pretrained.")
        found.add(name)
        code = (folder / name).read_text(encoding="utf-8")
        waiting += [(sibling, name) for sibling in re.findall(r"^\s*from \.(\w+) import", code, re.M)]
    return found


def _modules(values: dict[str, Any]) -> set[str]:
    maps = [part["auto_map"] for part in (values, *values.values()) if isinstance(part, dict) and "auto_map" in part]
    targets = [target for mapping in maps if isinstance(mapping, dict) for target in mapping.values()]
    flat = [name for target in targets for name in (target if isinstance(target, list) else [target]) if name]
    return {str(name).rpartition(".")[0].rpartition("--")[2] for name in flat}


def publish(
    folder: Path,
    repository: str,
    plan: Plan,
    *,
    private: bool = True,
    message: str = "Upload a CTInstruct model",
    progress: Callable[[str], None] = lambda step: None,
) -> str:
    """Create the repository where it does not exist, and send the plan's files in one commit.

    Args:
        folder: the model.
        repository: "user/name".
        plan: from `make_plan`.
        private: visibility of a new repository; an existing repository keeps its visibility.
        message: of the commit.
        progress: called with the name of each step.

    Returns:
        The commit's address.

    Raises:
        CTInstructError: for a bad name, and where the Hub refuses; nothing is visible there then but an empty repository.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    check_repository(repository)
    operations: list[Any] = [
        CommitOperationAdd(name, str(folder / name)) for name, _ in plan.files if name != "README.md"
    ]
    operations.append(CommitOperationAdd("README.md", plan.card.encode()))
    api = HfApi()
    try:
        progress("creating the repository")
        api.create_repo(repository, private=private, exist_ok=True)
        progress("sending")
        return str(api.create_commit(repository, operations, commit_message=message).commit_url)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise refusal(repository, error) from error


__all__ = ["Plan", "check_repository", "make_plan", "publish"]
