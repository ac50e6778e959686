"""Files that a header names, and bytes that are read no further than a header promises."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from isal import isal_zlib

from .volume import CTInstructError


def inside(folder: Path, name: str, named_by: str) -> Path:
    """The file or folder `name` that something in `folder` names, which must lie in it.

    Args:
        folder: that must hold it.
        name: relative to `folder`.
        named_by: the file that names it, for the message.

    Returns:
        `folder / name`, which may not exist.

    Raises:
        CTInstructError: for an absolute path, for `..`, and where links lead out of `folder`.
    """
    parts = PurePosixPath(name.replace("\\", "/"))
    if not parts.parts or parts.is_absolute() or ".." in parts.parts or ":" in parts.parts[0] or "\0" in name:
        raise CTInstructError(f"{named_by} names '{_short(name)}', which lies outside of its folder: refused.")
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise CTInstructError(f"{named_by} names '{_short(name)}', a link that leads out of its folder: refused.")
    return path


def file_beside(header: Path, name: str) -> Path:
    """The data file that a detached header names: a plain file in the header's folder.

    Raises:
        CTInstructError: where it lies elsewhere, is missing, or is no regular file.
    """
    name = name.removeprefix("./")
    path = inside(header.parent, name, header.name)
    if "/" in name or "\\" in name:
        raise CTInstructError(f"{header.name} names '{_short(name)}': its data file must lie beside it.")
    if not path.is_file():
        raise CTInstructError(f"{header.name} names '{_short(name)}', which is not beside it: give both files.")
    return path


def _short(name: str) -> str:
    return name.encode("unicode_escape").decode("ascii")[:80]


@contextmanager
def open_inflated(path: Path) -> Iterator[io.BufferedReader]:
    """A file's bytes, inflated where its first two say that it is gzip."""
    with open(path, "rb") as stream:
        packed = stream.read(2) == b"\x1f\x8b"
        stream.seek(0)
        yield open_gzip(stream) if packed else stream


def is_packed(path: Path) -> bool:
    """Whether a file is gzip by its first two bytes."""
    with open(path, "rb") as stream:
        return stream.read(2) == b"\x1f\x8b"


def skip(stream: Any, count: int) -> None:
    """Read over `count` bytes; fewer where the stream ends."""
    while count > 0 and (block := stream.read(min(count, 2**20))):
        count -= len(block)


def read_exactly(stream: Any, size: int, name: str, head: bytes = b"") -> np.ndarray:
    """uint8 [size] from a stream, beginning with `head`, which was read before; what follows is left unread.

    Raises:
        CTInstructError: where the stream ends before.
    """
    buffer = np.empty(size, dtype=np.uint8)
    filled = min(len(head), size)
    buffer[:filled] = np.frombuffer(head[:filled], np.uint8)
    view = buffer.data
    while filled < size:
        count = stream.readinto(view[filled : filled + 2**22])
        if not count:
            raise CTInstructError(f"{name} is cut short: {filled} of {size} bytes of voxels are there.")
        filled += count
    return buffer


class Inflated(io.RawIOBase):
    """A readable stream of the unpacked bytes of a gzip, zlib or bzip2 stream, a few MB at a time.

    Bytes after a packed stream are left unread unless a further stream of the same format follows; gzip files may have
    zeros or other bytes at their end.

    Args:
        stream: the packed bytes.
        start: makes the decompressor, whose `decompress` takes (bytes, most bytes to give).
        magic: how a further packed stream begins, b"" where there is none.
    """

    def __init__(self, stream: Any, start: Callable[[], Any], magic: bytes = b"") -> None:
        self.stream, self.start, self.magic, self.unpacker = stream, start, magic, start()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if self.unpacker.eof:
                packed = self.unpacker.unused_data or self.stream.read(2**17)
                if 0 < len(packed) < len(self.magic):
                    packed += self.stream.read(len(self.magic) - len(packed))
                if not self.magic or not packed.startswith(self.magic):
                    return 0
                self.unpacker = self.start()
            else:
                packed = getattr(self.unpacker, "unconsumed_tail", b"")
                if not packed and getattr(self.unpacker, "needs_input", True):
                    packed = self.stream.read(2**17)
                    if not packed:
                        raise EOFError("the packed stream has no end")
            piece = self.unpacker.decompress(packed, len(buffer))
            if piece:
                buffer[: len(piece)] = piece
                return len(piece)


def open_gzip(stream: Any) -> io.BufferedReader:
    """The unpacked bytes of a gzip stream."""
    return io.BufferedReader(Inflated(stream, lambda: isal_zlib.decompressobj(wbits=31), b"\x1f\x8b"), 2**17)


def open_zlib(stream: Any) -> io.BufferedReader:
    """The unpacked bytes of a zlib stream."""
    return io.BufferedReader(Inflated(stream, isal_zlib.decompressobj), 2**17)


def open_bzip2(stream: Any) -> io.BufferedReader:
    """The unpacked bytes of a bzip2 stream."""
    import bz2

    return io.BufferedReader(Inflated(stream, bz2.BZ2Decompressor, b"BZh"), 2**17)
