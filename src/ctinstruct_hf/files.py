"""Files and folders that are whole or not there.

What is being written has another name, which says by which process of which machine; it gets its own name when it is whole.
What a killed process left behind is removed by the next one that writes to the same place.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import CTInstructError

NO_PLACE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}

_STARTED = time.time()


def why_unwritable(error: BaseException | None) -> str | None:
    """A sentence where an error, or one that it came from, is a full or a locked place; None for any other.

    Libraries hide it differently: safetensors and torch raise errors of their own.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in NO_PLACE:
            place = error.filename if error.filename is not None else "The output"
            return f"{place} cannot be written: {error.strerror}."
        if "No space left on device" in str(error) or "file write failed" in str(error):
            return "The output cannot be written: No space left on device."
        error = error.__cause__ or error.__context__
    return None


def read_yaml(path: Path) -> Any:
    """What a YAML file holds; {} for an empty one.

    Raises:
        CTInstructError: naming the file, where it cannot be read or is no YAML.
    """
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise CTInstructError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise CTInstructError(f"{path.name} is no readable YAML: {' '.join(str(error).split())[:200]}") from error


def temporary_folder(purpose: str) -> Path:
    """A new folder for temporary files, readable by this user only. `remove_left_over` removes it after a kill."""
    return Path(tempfile.mkdtemp(prefix=f"ctinstruct-{purpose}-{os.getpid()}-"))


def remove_left_over() -> None:
    """Remove temporary folders (`ctinstruct-<purpose>-<process>-…`) of processes that were killed."""
    for folder in Path(tempfile.gettempdir()).glob("ctinstruct-*"):
        found = re.fullmatch(r"ctinstruct-[a-z]+-(\d+)-.*", folder.name)
        try:
            status = folder.lstat()
            mine = stat.S_ISDIR(status.st_mode) and hasattr(os, "getuid") and status.st_uid == os.getuid()
            if not mine or found is None:
                continue
            process = int(found[1])
            # in a container the process has the same number each time
            before = process == os.getpid() and status.st_mtime < _STARTED
            if before or not _is_running(process):
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            continue


def _writer(process: int | None = None) -> str:
    host = re.sub(r"[^A-Za-z0-9]", "", socket.gethostname()) or "here"
    return f"{host}-{os.getpid() if process is None else process}"


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is somebody else's
        pass
    return True


def _remove_leftovers(place: Path) -> None:
    """Drafts of `place` whose process, on this machine, is gone."""
    try:
        beside = [one for one in place.parent.iterdir() if one.name.startswith(f".{place.name}.")]
    except OSError:
        return
    for path in beside:
        writer = path.name.removeprefix(f".{place.name}.").split(".")[0]
        process = writer.rpartition("-")[2]
        if process.isdigit() and writer == _writer(int(process)) and not _is_running(int(process)):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def cache_folder() -> Path:
    """Where this package keeps what it unpacks and converts: `CTINSTRUCT_CACHE`, or `~/.cache/ctinstruct_hf`."""
    return Path(os.environ.get("CTINSTRUCT_CACHE") or Path.home() / ".cache" / "ctinstruct_hf")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name to write to beside `path`, whose file takes that name only if everything went well."""
    temporary = path.with_name(f".{path.name}.{_writer()}.part")
    _remove_leftovers(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """A text file that is whole or not there; in UTF-8."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into that takes its final name only if everything went well.

    Into an existing folder the files are moved one by one, each whole.

    Raises:
        CTInstructError: where it cannot be written; nothing of it is left.
    """
    parent = folder.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(parent / folder.name)
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.{_writer()}.", dir=parent))
    except OSError as error:
        raise CTInstructError(f"{folder} cannot be written: {error.strerror or error}.") from error
    try:
        yield draft
        draft.chmod(0o755)
        if folder.exists():
            for file in sorted(path for path in draft.rglob("*") if path.is_file()):
                target = folder / file.relative_to(draft)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, target)
        else:
            os.replace(draft, folder)
    except OSError as error:
        raise CTInstructError(f"{folder} cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
