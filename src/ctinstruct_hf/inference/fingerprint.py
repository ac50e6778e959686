"""A short name for the contents of a model's files: equal for a copy, different for another model in a folder of that name."""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import os
from pathlib import Path
from typing import Any

from ..errors import CTInstructError
from .models import resolve_model

# what decides about a model's answers; notes, logs and states of training beside it do not count
PATTERNS = (
    "config.json",
    "generation_config.json",
    "*processor_config.json",
    "adapter_config.json",
    "tokenizer*.json",
    "tokenizer.model",
    "vocab.*",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.*",
    "calibration.json",
    "*.safetensors",
    "*.safetensors.index.json",
)
# weights of more bytes are sampled: the first MiB, which has the table of tensors, then 4 KiB of every MiB
WHOLE_BYTES = 2**28
_STRIDE, _SAMPLE = 2**20, 2**12


def fingerprint(model: str | Path) -> str:
    """SHA-256 (64 hexadecimal digits) over the names, sizes and contents of a model's files.

    Times and the folder's name and place do not count. Files above 256 MiB are sampled, so that 16 GB take a second.
    The result is kept as long as no file changes its size or time.

    Args:
        model: a folder, or a name on the Hub, whose files are downloaded where they are not in the cache.

    Raises:
        CTInstructError: where there is no such model.
    """
    folder = resolve_model(model).folder
    try:
        files = sorted(
            (path.name, path.stat().st_size, last_change(path.stat()))
            for path in folder.iterdir()
            if path.is_file() and any(fnmatch.fnmatchcase(path.name, pattern) for pattern in PATTERNS)
        )
        if not files:
            raise CTInstructError(f"{folder} holds no file of a model: expected config.json and safetensors.")
        return hash_files(folder.resolve(), tuple(files))
    except OSError as error:
        raise CTInstructError(f"{folder} cannot be read: {error.strerror or error}.") from error


def last_change(state: os.stat_result) -> int:
    """When a file was last written, in ns; a time that a copy was given (`cp -p`) does not hide that it was."""
    return max(state.st_mtime_ns, state.st_ctime_ns)


@functools.lru_cache(maxsize=32)
def hash_files(folder: Path, files: tuple[tuple[str, int, int], ...]) -> str:
    """SHA-256 over files of a folder: (name, size, time of the last change), which tells the cache when to read again."""
    total = hashlib.sha256()
    for name, size, _ in files:
        total.update(f"{name}\0{size}\0".encode())
        with open(folder / name, "rb", buffering=0) as stream:
            if size <= WHOLE_BYTES:
                total.update(hashlib.file_digest(stream, "sha256").digest())
                continue
            for start in range(0, size, _STRIDE):
                stream.seek(start)
                total.update(stream.read(_SAMPLE if start else _STRIDE))
            stream.seek(size - _SAMPLE)
            total.update(stream.read(_SAMPLE))
    return total.hexdigest()


def model_fingerprint(config: Any) -> str | None:
    """`fingerprint` of the folder that a model was read from; None for any other model."""
    folder = Path(str(config.name_or_path or ""))
    try:
        return fingerprint(folder) if config.name_or_path and folder.is_dir() else None
    except CTInstructError:
        return None


__all__ = ["PATTERNS", "fingerprint", "hash_files", "last_change", "model_fingerprint"]
