"""What is asked about a study, from its place in the line to its result."""

from __future__ import annotations

import re
import secrets
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import StoppingCriteria

# a step without the name of a structure and without counts
_STEP = re.compile(r"marking|writing|[a-z ]+")
KINDS = ("ask", "report", "segment", "diagnose", "findings")


@dataclass
class Job:
    """A question, or another request, about a study.

    Attributes:
        status: queued, running, done, failed or cancelled.
        most: tokens to write at most; None for the server's limit.
        tokens: written so far.
        cut: whether the answer ended for its length.
        prompt_tokens: of the question and the scan.
        seconds: of each step that it has done, by the step's name without its details.
        observers: called with the job once it ends.
        result: what the page shows, once done.
        error: one sentence, where it failed.
    """

    kind: str
    study: str
    words: dict[str, Any]
    id: str = field(default_factory=lambda: secrets.token_urlsafe(12))
    most: int | None = None
    tokens: list[int] = field(default_factory=list)
    cut: bool = False
    prompt_tokens: int = 0
    status: str = "queued"
    result: dict[str, Any] | None = None
    error: str | None = None
    seen: float = field(default_factory=time.monotonic)
    ended: float | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)
    finished: threading.Event = field(default_factory=threading.Event)
    seconds: dict[str, float] = field(default_factory=dict)
    observers: Sequence[Callable[[Job], None]] = ()
    _step: str = "waiting"
    _since: float = field(default_factory=time.monotonic)

    @property
    def step(self) -> str:
        """What it does at the moment."""
        return self._step

    @step.setter
    def step(self, name: str) -> None:
        now = time.monotonic()
        before = _STEP.match(self._step)
        if before is not None:
            self.seconds[before[0]] = self.seconds.get(before[0], 0.0) + now - self._since
        self._step, self._since = name, now

    def state(self, ahead: int = 0) -> dict[str, Any]:
        """As JSON; `ahead` jobs come before it."""
        return {"job": self.id, "kind": self.kind, "status": self.status, "step": self.step, "ahead": ahead, "result": self.result, "error": self.error}  # fmt: skip

    def end(self, status: str, result: dict[str, Any] | None = None, error: str | None = None) -> None:
        self.status, self.result, self.error, self.step = status, result, error, status
        self.ended = time.monotonic()
        for observe in self.observers:
            observe(self)
        self.finished.set()


class Cancelled(Exception):
    """Nobody wants the answer any more."""


class Watch(StoppingCriteria):
    """Ends the rows of jobs that are cancelled or long enough, and keeps what the others have written.

    Args:
        jobs: one a row.
        most: tokens of a row.
        closing: ids that end an answer; what follows them in a row is filling.
    """

    def __init__(self, jobs: Sequence[Job], most: int, closing: Collection[int] = ()) -> None:
        self.jobs, self.most, self.closing, self.tokens = jobs, most, closing, 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        self.tokens += 1
        for job, token in zip(self.jobs, input_ids[:, -1].tolist(), strict=True):
            job.step = f"writing, token {self.tokens} of at most {self.most}"
            if len(job.tokens) < (job.most or self.most) and (not job.tokens or job.tokens[-1] not in self.closing):
                job.tokens.append(token)
                job.cut = len(job.tokens) == (job.most or self.most) and token not in self.closing
        ended = [job.cancelled.is_set() or self.tokens >= (job.most or self.most) for job in self.jobs]
        return torch.tensor(ended, device=input_ids.device)  # type: ignore[return-value]


__all__ = ["KINDS", "Cancelled", "Job", "Watch"]
