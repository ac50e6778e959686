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


@contextmanager
def unpacked(path: Path, limit: Limits) -> Iterator[list[Path]]:
    """The files of a zip, in a folder that goes with the context; no name of the zip can lead out of it."""
    folder = Path(tempfile.mkdtemp(prefix=f"ctinstruct-zip-{os.getpid()}-"))
    try:
        yield _unpack(path, folder, limit)
    except CTInstructError as error:
        raise CTInstructError(str(error).replace(folder.name, path.name)) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _unpack(path: Path, folder: Path, limit: Limits) -> list[Path]:
    files = []
    try:
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
            if sum(member.file_size for member in members) > limit.bytes:
                raise CTInstructError(
                    f"{path.name} would unpack to more than the {limit.bytes / 2**30:.3g} GiB allowed."
                )
            budget = limit.bytes
            for index, member in enumerate(members):
                name = re.sub(r"[^\w.-]", "_", member.filename.rpartition("/")[2])[-80:]
                files.append(folder / f"{index:06d}_{name}")
                with archive.open(member) as packed, open(files[-1], "wb") as file:
                    while block := packed.read(min(2**20, budget + 1)):
                        budget -= len(block)
                        if budget < 0:
                            raise CTInstructError(f"{path.name} unpacks to more than it says: refused.")
                        file.write(block)
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError, OSError, ValueError) as error:
        if isinstance(error, CTInstructError):
            raise
        raise CTInstructError(f"{path.name} is no readable zip: {last_line(error)}") from error
    if not files:
        raise CTInstructError(f"{path.name} is an empty zip.")
    return files
