"""Zip files, unpacked into a private folder for as long as they are read."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .volume import CTInstructError, Limits, last_line

MOST_FILES = 20_000  # in a zip; a study with all its series has a few thousand


@contextmanager
def unpacked(path: Path, limit: Limits) -> Iterator[Path]:
    """A temporary folder with the members of a zip, deleted with the context; no name of the zip can lead out of it."""
    folder = Path(tempfile.mkdtemp(prefix=f"ctinstruct-zip-{os.getpid()}-"))
    try:
        _unpack(path, folder, limit)
        yield folder
    except CTInstructError as error:
        raise CTInstructError(str(error).replace(folder.name, path.name)) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _unpack(path: Path, folder: Path, limit: Limits) -> None:
    """Write the members, those of each folder of the zip beside each other."""
    folders: dict[str, str] = {}
    taken: set[str] = set()
    try:
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if not _is_no_scan(member)]
            if not members:
                raise CTInstructError(f"{path.name} is an empty zip.")
            if len(members) > MOST_FILES:
                raise CTInstructError(
                    f"{path.name} holds {len(members)} files, more than {MOST_FILES}: give one study."
                )
            if sum(member.file_size for member in members) > limit.bytes:
                raise CTInstructError(
                    f"{path.name} would unpack to more than the {limit.bytes / 2**30:.3g} GiB allowed."
                )
            budget = limit.bytes
            for index, member in enumerate(members):
                base, _, last = member.filename.rpartition("/")
                subfolder = folders.setdefault(base, str(len(folders)))
                name = re.sub(r"[^\w.-]", "_", last)[-80:]
                if f"{subfolder}/{name}".casefold() in taken:
                    name = f"{index:06d}_{name}"
                taken.add(f"{subfolder}/{name}".casefold())
                (folder / subfolder).mkdir(exist_ok=True)
                with archive.open(member) as packed, open(folder / subfolder / name, "wb") as file:
                    while block := packed.read(min(2**20, budget + 1)):
                        budget -= len(block)
                        if budget < 0:
                            raise CTInstructError(f"{path.name} unpacks to more than it says: refused.")
                        file.write(block)
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError, OSError, ValueError) as error:
        if isinstance(error, CTInstructError):
            raise
        raise CTInstructError(f"{path.name} is no readable zip: {last_line(error)}") from error


def _is_no_scan(member: zipfile.ZipInfo) -> bool:
    """Folders, and what systems put beside files: hidden files, `__MACOSX`."""
    *folders, last = member.filename.split("/")
    return member.is_dir() or last.startswith(".") or "__MACOSX" in folders
