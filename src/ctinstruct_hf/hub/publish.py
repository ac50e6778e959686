"""A model's folder to the Hub in one commit: weights, processor, tokenizer, code files and card; nothing else that lies there."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CTInstructError

# what from_pretrained and trust_remote_code need
_GOES = (".json", ".safetensors", ".py", ".jinja", ".txt", ".model")
_NEEDED = ("config.json", "processor_config.json", "tokenizer_config.json")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Plan:
    """What would go, and what stays.

    Attributes:
        files: (name, bytes) of each file, the card included.
        left: names of what lies in the folder and does not go.
        card: text of the card.
    """

    files: list[tuple[str, int]]
    left: list[str]
    card: str

    @property
    def size(self) -> int:
        return sum(size for _, size in self.files)


def make_plan(folder: Path, card: str) -> Plan:
    """Look at the folder, send nothing.

    Raises:
        CTInstructError: where the folder is no whole model that loads with `trust_remote_code`.
    """
    if not folder.is_dir():
        raise CTInstructError(f"{folder} does not exist.")
    missing = [name for name in _NEEDED if not (folder / name).exists()]
    if not list(folder.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        raise CTInstructError(f"{folder} is no whole model: it lacks {', '.join(missing)}.")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise CTInstructError(f"{folder / 'config.json'} is no JSON.") from error
    for target in set((config.get("auto_map") or {}).values()):
        file = f"{str(target).rpartition('.')[0].rpartition('--')[2]}.py"
        if not (folder / file).exists():
            raise CTInstructError(
                f"{folder} lacks {file}, which config.json names: save the model with save_pretrained."
            )
    for code in sorted(folder.glob("*.py")):
        for sibling in re.findall(r"^\s*from \.(\w+) import", code.read_text(encoding="utf-8"), re.M):
            if not (folder / f"{sibling}.py").exists():
                raise CTInstructError(f"{folder}: {code.name} needs {sibling}.py, which is not there.")
    if not config.get("auto_map"):
        raise CTInstructError(f"{folder} has no code files (auto_map): save the model with save_pretrained.")
    goes = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in _GOES)
    left = sorted(path.name for path in folder.iterdir() if path not in goes and path.name != "README.md")
    files = [(path.name, path.stat().st_size) for path in goes]
    return Plan([*files, ("README.md", len(card.encode()))], left, card)


def publish(
    folder: Path,
    repository: str,
    plan: Plan,
    *,
    private: bool = True,
    message: str = "Upload a CTInstruct model",
    tell: Callable[[str], None] = lambda step: None,
) -> str:
    """Create the repository where it is not there, and send the plan's files in one commit.

    Args:
        folder: the model.
        repository: "user/name".
        plan: from `make_plan`.
        private: who may see a new repository; one that is there stays as it is.
        message: of the commit.
        tell: called with the name of each step.

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
        tell("creating the repository")
        api.create_repo(repository, private=private, exist_ok=True)
        tell("sending")
        return str(api.create_commit(repository, operations, commit_message=message).commit_url)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise refusal(repository, error) from error


def refusal(repository: str, error: Exception) -> CTInstructError:
    """What the Hub said against a repository, in one sentence."""
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return CTInstructError(f"The Hub does not take {repository}: {first} (log in with `hf auth login`).")


def check_repository(repository: str) -> None:
    """Raises CTInstructError for a name that is not "user/name"."""
    if not _REPOSITORY.fullmatch(repository):
        raise CTInstructError(f"'{repository}' is no name on the Hub: write user/name.")


__all__ = ["Plan", "check_repository", "make_plan", "publish"]
