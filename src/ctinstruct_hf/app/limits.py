"""What the server takes on, and the error for more."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import CTInstructError


@dataclass
class Limits:
    """What the server takes on before it refuses.

    Attributes:
        upload_bytes: of the files of one study.
        upload_files: of one study.
        uploads: going on at once; the slowest makes room.
        volume_bytes: what a scan may unpack to; a small file may unpack to less.
        studies: open at once; the one idle longest makes room.
        structures: masks of one study, all requests together.
        mask_bytes: of the packed masks of one study.
        waiting: jobs in the line; more are refused with 503.
        together: questions about one study that are answered in one batch.
        idle_study: seconds after which a study that nobody touches is closed.
        idle_upload: seconds after which an upload that receives nothing is removed.
        idle_job: seconds after which a job that nobody asks about is dropped. Browsers stop the timers of hidden tabs
            for minutes. A study stays when its page is closed or loaded again, until `idle_study`.
        new_tokens: of an answer.
    """

    upload_bytes: int = 2 * 2**30
    upload_files: int = 5000
    uploads: int = 32
    volume_bytes: int = 4 * 2**30
    studies: int = 4
    structures: int = 300
    mask_bytes: int = 256 * 2**20
    waiting: int = 16
    together: int = 8
    idle_study: float = 1800.0
    idle_upload: float = 120.0
    idle_job: float = 1800.0
    new_tokens: int = 512


class Busy(CTInstructError):
    """Too much is going on: try again later."""


__all__ = ["Busy", "Limits"]
