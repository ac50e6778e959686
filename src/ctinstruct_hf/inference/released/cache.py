"""A repository with the authors' files: fetched and converted once, into this package's cache."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

from ...errors import CTInstructError
from ...files import cache_folder
from ..folders import INDEX, is_released_names, read_object
from .checkpoint import BIN_INDEX
from .convert import LANGUAGE_MODEL, RELEASE_FILES, convert_released, has_tokenizer
from .download import download, gigabytes

logger = logging.getLogger(__name__)
# the first of these files that a repository has decides its layout
LAYOUT_FILES = tuple(prefix + name for prefix in ("", "ctinstruct/") for name in (INDEX, BIN_INDEX))


def layout_file(files: Iterable[str]) -> str | None:
    """The index of the weights among the files of a repository."""
    there = set(files)
    return next((name for name in LAYOUT_FILES if name in there), None)


def is_released(snapshot: Path) -> bool:
    """Whether the index of a snapshot's weights has the authors' names."""
    name = layout_file(name for name in LAYOUT_FILES if (snapshot / name).is_file())
    try:
        return name is not None and is_released_names(read_object(snapshot / name).get("weight_map") or ())
    except CTInstructError:
        return False


def converted_folder(name: str, commit: str) -> Path:
    """The folder of a repository's converted commit, laid out as the cache of the Hub's client."""
    return cache_folder() / f"models--{name.replace('/', '--')}" / "snapshots" / commit


def is_converted(name: str, commit: str) -> bool:
    return (converted_folder(name, commit) / "config.json").exists()


def converted(name: str, commit: str, progress: Callable[[str], None] | None = None) -> Path:
    """The folder of a released repository in this package's format, fetched and converted on first use.

    Args:
        name, commit: on the Hub.
        progress: called with a line on each step.

    Raises:
        CTInstructError: where it cannot be fetched, converted or written.
    """
    target = converted_folder(name, commit)
    if is_converted(name, commit):
        return target
    progress = progress or (lambda step: None)
    logger.warning("%s is the authors' checkpoint: its files are downloaded and converted once, into %s.", name, target)
    folder = download(name, commit, RELEASE_FILES, progress, beside=lambda size: {target: size})
    tokenizer = next((path for path in (folder, folder / "ctinstruct") if has_tokenizer(path)), LANGUAGE_MODEL)
    convert_released(folder, target, tokenizer, progress, origin=f"{name}@{commit}")
    written = sum(path.stat().st_size for path in target.iterdir())
    logger.warning("%s is converted: %s in %s.", name, gigabytes(written), target)
    return target
