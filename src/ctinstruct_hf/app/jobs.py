"""What is asked about a study, from its place in the line to its result."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import StoppingCriteria

KINDS = ("ask", "report", "segment", "diagnose")


@dataclass
class Job:
    """A question, or another request, about a study.

    Attributes:
        status: queued, running, done, failed or cancelled.
        step: what it does at the moment.
        result: what the page shows, once done.
        error: one sentence, where it failed.
    """

    kind: str
    study: str
    words: dict[str, Any]
    id: str = field(default_factory=lambda: secrets.token_urlsafe(12))
    status: str = "queued"
    step: str = "waiting"
    result: dict[str, Any] | None = None
    error: str | None = None
    seen: float = field(default_factory=time.monotonic)
    ended: float | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)
    finished: threading.Event = field(default_factory=threading.Event)

    def state(self, ahead: int = 0) -> dict[str, Any]:
        """As JSON; `ahead` jobs come before it."""
        return {"job": self.id, "kind": self.kind, "status": self.status, "step": self.step, "ahead": ahead, "result": self.result, "error": self.error}  # fmt: skip

    def end(self, status: str, result: dict[str, Any] | None = None, error: str | None = None) -> None:
        self.status, self.result, self.error, self.step = status, result, error, status
        self.ended = time.monotonic()
        self.finished.set()


class Cancelled(Exception):
    """Nobody wants the answer any more."""


class Watch(StoppingCriteria):
    """Ends the rows of cancelled jobs and notes how far the others are."""

    def __init__(self, jobs: Sequence[Job], most: int) -> None:
        self.jobs, self.most, self.tokens = jobs, most, 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        self.tokens += 1
        for job in self.jobs:
            job.step = f"writing, token {self.tokens} of at most {self.most}"
        ended = [job.cancelled.is_set() for job in self.jobs]
        return torch.tensor(ended, device=input_ids.device)  # type: ignore[return-value]


__all__ = ["KINDS", "Cancelled", "Job", "Watch"]
