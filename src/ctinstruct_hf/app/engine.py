"""Studies that are open, and the one worker that answers about them: jobs wait in a line, questions about one study are
answered together, and what nobody waits for any more is dropped."""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from ..errors import CTInstructError
from ..hub.models import load_model
from ..output.report import key_place
from ..study import Study

logger = logging.getLogger(__name__)
KINDS = ("ask", "report", "segment", "diagnose")
_FOLDER = "ctinstruct-app-"


@dataclass
class Limits:
    """What the server takes on before it refuses.

    Attributes:
        upload_bytes: of the files of one study.
        upload_files: of one study.
        volume_bytes: what a scan may unpack to.
        studies: open at once; the one idle longest makes room.
        waiting: jobs in the line; more are refused with 503.
        together: questions about one study that are answered in one batch.
        idle_study: seconds after which a study that nobody touches is closed.
        idle_job: seconds after which a job that nobody asks about is dropped.
        new_tokens: of an answer.
    """

    upload_bytes: int = 2 * 2**30
    upload_files: int = 5000
    volume_bytes: int = 4 * 2**30
    studies: int = 4
    waiting: int = 16
    together: int = 8
    idle_study: float = 1800.0
    idle_job: float = 30.0
    new_tokens: int = 512


class Busy(CTInstructError):
    """Too much is going on: try again later."""


@dataclass
class Job:
    """One thing asked about a study.

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
        """What is told about it; `ahead` jobs come before it."""
        return {"job": self.id, "kind": self.kind, "status": self.status, "step": self.step, "ahead": ahead, "result": self.result, "error": self.error}  # fmt: skip

    def end(self, status: str, result: dict[str, Any] | None = None, error: str | None = None) -> None:
        self.status, self.result, self.error, self.step = status, result, error, status
        self.ended = time.monotonic()
        self.finished.set()


class _Cancelled(Exception):
    pass


class _Watch(StoppingCriteria):
    """Ends the rows of cancelled jobs and tells how far the others are."""

    def __init__(self, jobs: Sequence[Job], most: int) -> None:
        self.jobs, self.most, self.words = jobs, most, 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        self.words += 1
        for job in self.jobs:
            job.step = f"writing, token {self.words} of at most {self.most}"
        ended = [job.cancelled.is_set() for job in self.jobs]
        return torch.tensor(ended, device=input_ids.device)  # type: ignore[return-value]


@dataclass
class OpenStudy:
    """A study with its files in a folder of its own."""

    study: Study
    folder: Path
    source: Path | None = None  # the slices as uploaded, which DICOM SEG refers to
    masks: dict[str, str] = field(default_factory=dict)  # structure -> file
    touched: float = field(default_factory=time.monotonic)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Engine:
    """Everything behind the page.

    Args:
        model, device, dtype, revision: see `hub.models.load_model`.
        limits: what it takes on.
    """

    def __init__(
        self,
        model: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        limits: Limits | None = None,
        revision: str | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self.model, self.processor = load_model(model, device, dtype, revision)
        remove_left_over()
        self.root = Path(tempfile.mkdtemp(prefix=f"{_FOLDER}{os.getpid()}-"))  # readable by this user only
        self.studies: dict[str, OpenStudy] = {}
        self.uploads: dict[str, tuple[Path, float]] = {}
        self.jobs: dict[str, Job] = {}
        self.line: deque[Job] = deque()
        self.current: list[Job] = []
        self.changed = threading.Condition()
        self.reading = threading.Semaphore(1)
        self.closed = False
        self.worker = threading.Thread(target=self._work, name="answers", daemon=True)
        self.worker.start()
        self.sweeper = threading.Thread(target=self._sweep, name="sweeper", daemon=True)
        self.sweeper.start()

    def close(self) -> None:
        """End the worker and remove every file."""
        with self.changed:
            self.closed = True
            for job in [*self.line, *self.current]:
                job.cancelled.set()
            self.changed.notify_all()
        self.worker.join(timeout=30)
        shutil.rmtree(self.root, ignore_errors=True)

    # files and studies

    def new_upload(self) -> str:
        """A place for the files of one study."""
        if len(self.uploads) >= self.limits.waiting:
            raise Busy("Too many uploads are going on: try again later.")
        name = secrets.token_urlsafe(16)
        folder = self.root / f"upload-{secrets.token_hex(8)}"
        folder.mkdir()
        self.uploads[name] = (folder, time.monotonic())
        return name

    def upload_folder(self, name: str) -> Path:
        """Where the files of an upload go. Raises KeyError for one that is not there."""
        folder, _ = self.uploads[name]
        self.uploads[name] = (folder, time.monotonic())
        return folder

    def drop_upload(self, name: str) -> None:
        folder, _ = self.uploads.pop(name, (None, 0.0))
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)

    def open_upload(self, name: str) -> str:
        """Read the files of an upload, one scan or the slices of one, and remove them."""
        folder = self.upload_folder(name)
        files = sorted(folder.iterdir())
        if not files:
            self.drop_upload(name)
            raise CTInstructError("No file has arrived.")
        heads = [one for one in files if one.suffix.lower() == ".mhd"]
        source = files[0] if len(files) == 1 else heads[0] if len(heads) == 1 else folder
        try:
            study = self.open_source(source)
        except BaseException:
            self.drop_upload(name)
            raise
        if self.studies[study].study.volume.source.dicom_files:
            self.studies[study].source = self.uploads.pop(name)[0]
        self.drop_upload(name)
        return study

    def open_source(self, source: Any) -> str:
        """Read a scan; returns the study's id.

        Raises:
            Busy: where another scan is being read or no study may be closed for it.
            CTInstructError: for a scan that cannot be read.
        """
        if not self.reading.acquire(timeout=60):
            raise Busy("Other scans are being read: try again later.")
        try:
            self._make_room()
            study = Study.open(source, (self.model, self.processor), max_bytes=self.limits.volume_bytes)
            folder = self.root / f"study-{secrets.token_hex(8)}"
            folder.mkdir()
            volume = study.volume
            volume.to_source(volume.hu, folder / "scan.nii")
        finally:
            self.reading.release()
        name = secrets.token_urlsafe(16)
        self.studies[name] = OpenStudy(study, folder)
        return name

    def _make_room(self) -> None:
        with self.changed:
            busy = {job.study for job in [*self.line, *self.current]}
            idle = sorted((one.touched, name) for name, one in self.studies.items() if name not in busy)
            if len(self.studies) < self.limits.studies:
                return
            if not idle:
                raise Busy("Every open study is being worked on: try again later.")
        self.close_study(idle[0][1])

    def find(self, study: str) -> OpenStudy:
        """An open study. Raises KeyError for one that is not there any more."""
        one = self.studies[study]
        one.touched = time.monotonic()
        return one

    def close_study(self, study: str) -> None:
        one = self.studies.pop(study, None)
        if one is not None:
            with self.changed:
                for job in self.jobs.values():
                    if job.study == study:
                        job.cancelled.set()
            for folder in (one.folder, one.source):
                if folder is not None:
                    shutil.rmtree(folder, ignore_errors=True)

    # jobs

    def submit(self, study: str, kind: str, words: dict[str, Any]) -> Job:
        """Put a job at the end of the line.

        Raises:
            KeyError: for a study that is not there.
            Busy: where the line is full.
            CTInstructError: for something that cannot be asked.
        """
        words = self._checked(kind, words)
        one = self.find(study)
        if isinstance(words.get("diseases"), list):
            one.study.disease_rows(words["diseases"])  # refused now, not when its turn comes
        with self.changed:
            if len(self.line) >= self.limits.waiting:
                raise Busy("Too many questions are waiting: try again later.")
            job = Job(kind, study, words)
            self.jobs[job.id] = job
            self.line.append(job)
            self.changed.notify_all()
        return job

    def _checked(self, kind: str, words: dict[str, Any]) -> dict[str, Any]:
        if kind not in KINDS:
            raise CTInstructError(f"'{str(kind)[:40]}' cannot be asked: use {', '.join(KINDS)}.")
        if kind == "ask":
            question = words.get("question")
            if not isinstance(question, str) or not 0 < len(question.strip()) <= 2000:
                raise CTInstructError("question must be a text of 1 to 2000 characters.")
            return {"question": question.strip()}
        key = {"segment": "structures", "diagnose": "diseases"}.get(kind)
        if key is None:
            return {}
        names = words.get(key)
        if kind == "diagnose" and names is None:
            return {"diseases": None}
        if kind == "diagnose" and isinstance(names, str) and names in self.model.config.disease_lists:
            return {"diseases": names}
        listed = names if isinstance(names, list) else []
        if not 0 < len(listed) <= 200 or not all(
            isinstance(one, str) and 0 < len(one.strip()) <= 100 for one in listed
        ):
            raise CTInstructError(f"{key} must be a list of 1 to 200 names.")
        names = list(dict.fromkeys(one.strip() for one in listed))
        return {key: names}

    def state(self, job: str) -> dict[str, Any]:
        """What is told about a job. Raises KeyError for one that is not there."""
        one = self.jobs[job]
        one.seen = time.monotonic()
        with self.changed:
            ahead = self.line.index(one) + bool(self.current) if one in self.line else 0
        return one.state(ahead)

    def cancel(self, job: str) -> None:
        """Drop a job: at once where it waits, at the next token where it runs."""
        one = self.jobs[job]
        with self.changed:
            one.cancelled.set()
            if one in self.line:
                self.line.remove(one)
                one.end("cancelled")

    # the worker

    def _work(self) -> None:
        while True:
            with self.changed:
                while not self.line and not self.closed:
                    self.changed.wait()
                if self.closed:
                    return
                self.current = self._next()
            try:
                self._answer(self.current)
            finally:
                with self.changed:
                    self.current = []
                    self.changed.notify_all()

    def _next(self) -> list[Job]:
        """The job that waits longest, with further questions about the same study."""
        first = self.line.popleft()
        jobs = [first]
        if first.kind == "ask":
            for job in list(self.line):
                if len(jobs) < self.limits.together and job.kind == "ask" and job.study == first.study:
                    self.line.remove(job)
                    jobs.append(job)
        for job in jobs:
            job.status, job.step = "running", "starting"
        return jobs

    def _answer(self, jobs: list[Job]) -> None:
        try:
            one = self.studies[jobs[0].study]
            with one.lock:
                results = self._results(jobs, one)
            for job, result in zip(jobs, results, strict=True):
                if job.cancelled.is_set():
                    job.end("cancelled")
                else:
                    job.end("done", result)
        except (_Cancelled, KeyError):
            for job in jobs:
                job.end("cancelled")
        except CTInstructError as error:
            for job in jobs:
                job.end("failed", error=str(error))
        except Exception as error:  # the server goes on; what was asked stays out of the log
            if all(job.cancelled.is_set() for job in jobs):  # its study was closed
                for job in jobs:
                    job.end("cancelled")
                return
            logger.exception("A job of kind %s failed.", jobs[0].kind)
            for job in jobs:
                job.end("failed", error=f"It failed by {type(error).__name__}: the server's log says more.")

    def _results(self, jobs: list[Job], one: OpenStudy) -> list[dict[str, Any]]:
        study = one.study

        def step(name: str) -> None:
            if all(job.cancelled.is_set() for job in jobs):
                raise _Cancelled
            for job in jobs:
                job.step = name

        step("encoding the scan" if "features" not in study.__dict__ else "reading the question")
        _ = study.features
        step("thinking")
        job = jobs[0]
        if job.kind in ("ask", "report"):
            generation: dict[str, Any] = {
                "max_new_tokens": self.limits.new_tokens,
                "stopping_criteria": StoppingCriteriaList([_Watch(jobs, self.limits.new_tokens)]),
            }
        if job.kind == "report":
            before = study.results.report
            text = study.report(**generation)
            if job.cancelled.is_set():  # half a report is none
                study.results.report = before
                raise _Cancelled
            return [{"report": text}]
        if job.kind == "diagnose":
            return [{"diagnosis": study.diagnose(job.words["diseases"])}]
        if job.kind == "segment":
            masks = {}
            for name in job.words["structures"]:
                step(f"marking {name}")
                masks[name] = self._keep_mask(one, name, study.segment(name))
            return [{"masks": masks}]
        kept = len(study.results.answers)
        answers = study.ask_many([job.words["question"] for job in jobs], **generation)
        pairs = study.results.answers[kept:]
        study.results.answers[kept:] = [
            pair for pair, asked in zip(pairs, jobs, strict=True) if not asked.cancelled.is_set()
        ]
        results = []
        for asked, answer in zip(jobs, answers, strict=True):
            masks = {}
            for number, mask in enumerate(answer.masks, start=1):
                name = asked.words["question"][:60] + (f" ({number})" if len(answer.masks) > 1 else "")
                study.results.masks[name] = mask
                masks[name] = self._keep_mask(one, name, mask)
            results.append({"answer": str(answer), "masks": masks, "probabilities": answer.probabilities})
        return results

    def _keep_mask(self, one: OpenStudy, name: str, mask: Any) -> dict[str, Any]:
        """Write a mask on the scan's own grid, for the viewer and to take away, and measure it."""
        from ..output.folder import file_name, measure

        file = f"{file_name(name)[:60]}.nii.gz"
        number = 1
        known = {key: value for key, value in one.masks.items() if key != name}
        while file in known.values():
            number += 1
            file = f"{file_name(name)[:60]}_{number}.nii.gz"
        (one.folder / "masks").mkdir(exist_ok=True)
        image = one.study.volume.to_source(mask, one.folder / "masks" / file)
        one.masks[name] = file
        told = measure(one.study.volume, mask)
        return {**told, "file": file, "place_mm": _largest_slice(image)}

    # what is left behind

    def _sweep(self) -> None:
        while not self.closed:
            self.sweep_once()
            with self.changed:
                self.changed.wait(timeout=1.0)

    def sweep_once(self, now: float | None = None) -> None:
        """Drop jobs that nobody asks about, forget old ones, close studies and uploads that nobody touches."""
        now = time.monotonic() if now is None else now
        for job in list(self.jobs.values()):
            if job.ended is None and now - job.seen > self.limits.idle_job:
                self.cancel(job.id)
            elif job.ended is not None and now - max(job.ended, job.seen) > self.limits.idle_job * 4:
                self.jobs.pop(job.id, None)
        busy = {job.study for job in [*self.line, *self.current]}
        for name, one in list(self.studies.items()):
            if name not in busy and now - one.touched > self.limits.idle_study:
                self.close_study(name)
        for name, (_, touched) in list(self.uploads.items()):
            if now - touched > self.limits.idle_job * 4:
                self.drop_upload(name)


def _largest_slice(image: Any) -> list[float] | None:
    """The middle of a mask (nibabel image) in the axial slice where it is largest: RAS mm, None where it is empty."""
    mask = np.asarray(image.dataobj) > 0
    if not mask.any():
        return None
    along = int(np.abs(image.affine[2, :3]).argmax())
    level, *middle = key_place(np.moveaxis(mask, along, 0))
    middle.insert(along, level)
    return [round(float(mm), 2) for mm in (image.affine @ [*middle, 1.0])[:3]]


def remove_left_over() -> None:
    """Folders of servers that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_FOLDER}*"):
        number = folder.name.removeprefix(_FOLDER).split("-")[0]
        try:
            mine = hasattr(os, "getuid") and folder.stat().st_uid == os.getuid()
            if mine and number.isdigit() and not _alive(int(number)):
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            continue


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def safe_name(name: str) -> str:
    """The last part of a file's name, of harmless characters; what a browser sends is not to be trusted."""
    last = re.split(r"[/\\]", name)[-1]
    return re.sub(r"[^A-Za-z0-9._-]+", "_", last)[-100:].lstrip(".") or "scan"


__all__ = ["Busy", "Engine", "Job", "Limits"]
