"""Files of a repository on the Hub: disk space is checked before, progress shown during the download."""

from __future__ import annotations

import io
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ...errors import CTInstructError, cannot_load, first_line

_MARGIN = 2**28
_SECONDS = 8  # that the Hub has to answer


def check_space(needed: Mapping[Path, int], purpose: str) -> None:
    """Check that the disks have room.

    Args:
        needed: bytes for each folder; folders of the same disk are added up.
        purpose: the beginning of the message.

    Raises:
        CTInstructError: with the numbers.
    """
    disks: dict[int, tuple[Path, Path, int]] = {}
    for folder, size in needed.items():
        if not size:
            continue
        home = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        device = home.stat().st_dev
        disks[device] = (folder, home, size + (disks[device][2] if device in disks else 0))
    for folder, home, size in disks.values():
        free = shutil.disk_usage(home).free
        if free < size + _MARGIN and os.access(home, os.W_OK):  # a locked folder is reported when it is written
            raise CTInstructError(
                f"{purpose} needs {gigabytes(size + _MARGIN)} on the disk of {folder}, which has {gigabytes(free)} free, and cannot be "
                "written (No space left): make room, "
                "or set HF_HUB_CACHE (downloads) and CTINSTRUCT_CACHE (converted models) to folders of another disk."
            )


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def _bar(progress: Callable[[str], None]) -> type[tqdm]:
    class Bar(tqdm):
        """Bytes as a line for `progress`."""

        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, **{**options, "file": io.StringIO(), "disable": False, "mininterval": 0.5})

        def display(self, *arguments: object, **options: object) -> bool:
            if self.unit == "B" and self.total and self.n:
                progress(f"downloading, {gigabytes(self.n)} of {gigabytes(self.total)}")
            return True

    return Bar


def missing_bytes(name: str, revision: str | None, patterns: Sequence[str]) -> tuple[int, int]:
    """Bytes of a repository's files: of those that are not in the cache, and of all."""
    from huggingface_hub import snapshot_download

    plan = snapshot_download(name, revision=revision, allow_patterns=list(patterns), dry_run=True)
    sizes = [(file.file_size or 0, file.will_download) for file in plan]
    return sum(size for size, missing in sizes if missing), sum(size for size, _ in sizes)


def download(
    name: str,
    revision: str | None,
    patterns: Sequence[str],
    progress: Callable[[str], None],
    *,
    argument: str = "model",
    beside: Callable[[int], Mapping[Path, int]] = lambda size: {},
) -> Path:
    """Files of a repository on the Hub or in the cache; an interrupted download is resumed.

    Args:
        name, revision: on the Hub.
        patterns: of the files.
        progress: called with a line on each step.
        argument: the argument that gave the name, for messages.
        beside: from the bytes of all files, what else will be written: {folder: bytes}.

    Returns:
        The folder of the snapshot.

    Raises:
        CTInstructError: for a wrong name or revision, a gated repository, no network, a full disk, and a download that stopped.
    """
    from huggingface_hub import HfApi, constants, snapshot_download

    options: dict[str, Any] = {"revision": revision, "allow_patterns": list(patterns)}
    unfinished = False
    try:  # a commit never changes
        if re.fullmatch(r"[0-9a-f]{40}", revision or ""):
            return Path(snapshot_download(name, local_files_only=True, **options))
    except OSError as error:
        unfinished = type(error).__name__ == "IncompleteSnapshotError"
    try:
        HfApi().model_info(name, revision=revision, timeout=_SECONDS)  # fails at once with the reason
        missing, size = missing_bytes(name, revision, patterns)
    except Exception as error:  # of the client, of its HTTP library, of the network
        hint = "" if hasattr(error, "response") else " It is no folder here, and not or not whole in the cache."
        if unfinished:
            hint += " Its download is not finished and goes on where it stopped."
        raise cannot_load(argument, name, error, hint) from error
    cache = Path(constants.HF_HUB_CACHE)
    needed: dict[Path, int] = {cache: missing}
    for folder, more in beside(size).items():
        needed[folder] = needed.get(folder, 0) + more
    check_space(needed, f"'{name}' ({gigabytes(missing)} to download)")
    try:
        return Path(snapshot_download(name, tqdm_class=_bar(progress), **options))
    except Exception as error:
        raise CTInstructError(
            f"{argument} '{name}': the download stopped ({first_line(error)}): start it again, it goes on where it stopped."
        ) from error
