"""Studies that are open, and the one worker that answers about them: jobs wait in a line, questions about one study are
answered together, and what nobody waits for any more is dropped."""

from __future__ import annotations

import logging
import re
import secrets
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from transformers import StoppingCriteriaList

from ..data.templates import DISEASE_TOKEN
from ..errors import CTInstructError
from ..files import remove_left_over, temporary_folder
from ..inference.consensus import DRAFTS
from ..inference.models import load_model
from ..inference.study import Study, mask_names
from .jobs import KINDS, Cancelled, Job, Watch
from .limits import Busy, Limits
from .masks import Full, PackedMasks
from .open_studies import Gone, OpenStudy, SeveralSeries, series_of
from .receiving import refuse_unknown
from .uploads import Uploads, safe_name

logger = logging.getLogger(__name__)
# results of ended jobs that are kept for their clients
_KEPT_JOBS = 500
# CT compresses to a third or a tenth; what unpacks to more of its size than this, and more than 256 MiB, is no scan
_MOST_RATIO = 100


class Engine:
    """Everything behind the page.

    Args:
        model, device, dtype, revision, quantize: see `inference.models.load_model`.
        limits: what it takes on.
        names: {name: other names} of the user, see `data.names.read_names`.
    """

    def __init__(
        self,
        model: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        limits: Limits | None = None,
        revision: str | None = None,
        names: dict[str, list[str]] | None = None,
        quantize: str | None = None,
    ) -> None:
        self.limits, self.names = limits or Limits(), names
        self.model, self.processor = load_model(model, device, dtype, revision, quantize)
        remove_left_over()
        self.root = temporary_folder("app")
        self.studies: dict[str, OpenStudy] = {}
        self.uploads = Uploads(self.root, self.limits)
        self.jobs: dict[str, Job] = {}
        self.observers: list[Callable[[Job], None]] = []
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
        for one in self.studies.values():
            one.close()
        shutil.rmtree(self.root, ignore_errors=True)

    # files and studies

    def open_upload(self, name: str, series: str | None = None) -> str:
        """Read the files of an upload, one scan or the slices of one, and remove them.

        Args:
            series: which CT series, where there are several; see `read_volume`.

        Raises:
            KeyError: for an upload that is not there.
            SeveralSeries: where one must be chosen; the upload stays.
            CTInstructError: where the scan cannot be read; the upload is removed.
        """
        with self.uploads.use(name, reading=True) as upload:
            try:
                if not upload.files:
                    raise CTInstructError("No file has arrived.")
                source = upload.source()
                allowed = min(self.limits.volume_bytes, max(2**28, _MOST_RATIO * upload.bytes))
                return self.open_source(source, name, upload.title, series=series, max_bytes=allowed)
            except Busy:
                raise  # the files can be read later
            except CTInstructError as error:
                choice, skipped = series_of(source, allowed) if upload.files else ([], [])
                if len(choice) > 1:
                    upload.idle = self.limits.idle_study  # somebody reads the list
                    raise SeveralSeries(str(error), name, choice, skipped) from error
                self.uploads.drop(name)
                raise
            except BaseException:
                self.uploads.drop(name)
                raise

    def open_source(self, source: Any, upload: str | None = None, title: str | None = None, **reading: Any) -> str:
        """Read a scan; returns the study's id.

        Args:
            upload: where its files come from; it ends, and the study takes over what DICOM SEG refers to.
            title: what the scan is called; as its file by default.
            reading: see `read_volume`.

        Raises:
            Busy: where another scan is being read or no study may be closed for it.
            CTInstructError: for a scan that cannot be read.
        """
        if not self.reading.acquire(timeout=60):
            raise Busy("Other scans are being read: try again later.")
        folder = self.root / f"study-{secrets.token_hex(8)}"
        try:
            self._make_room()
            limits = {"max_bytes": self.limits.volume_bytes}
            study = Study.open(source, (self.model, self.processor), names=self.names, **{**limits, **reading})
            study.results.masks = PackedMasks(self.limits)  # type: ignore[assignment]
            folder.mkdir(mode=0o700)
            volume = study.volume
            if title:
                volume.source.name = safe_name(title)
            volume.to_source(volume.hu, folder / "scan.nii")
            one = OpenStudy(study, folder)
            if upload is not None:
                if volume.source.dicom_files:
                    one.source = self.uploads.keep(upload)
                self.uploads.drop(upload)
            name = secrets.token_urlsafe(16)
            self.studies[name] = one
            return name
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            self.reading.release()

    def sentence(self, error: Exception) -> str:
        """An error as a client may read it: without folders of this server."""
        text = re.sub(re.escape(str(self.root)) + r"(/(upload|study)-\w+(?=/))?/?", "", str(error))
        text = text.encode("utf-8", "backslashreplace").decode()  # names of files need not be text
        text = re.sub(r"\b(upload|study)-[0-9a-f]{16}\b", r"the \1", text)
        text = text.replace(": pass max_bytes to allow more", " for a file of this size")
        return text[:1].upper() + text[1:] if text.startswith("the ") else text

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
        """An open study. Raises Gone for one that is not there any more."""
        one = self.studies.get(study)
        if one is None:
            raise Gone
        one.touched = time.monotonic()
        return one

    def close_study(self, study: str) -> None:
        one = self.studies.pop(study, None)
        if one is not None:
            with self.changed:
                for job in self.jobs.values():
                    if job.study == study:
                        job.cancelled.set()
            one.close()

    # jobs

    def submit(self, study: str, kind: str, words: dict[str, Any], most: int | None = None) -> Job:
        """Put a job at the end of the line.

        Args:
            most: tokens of an answer; the server's limit by default.

        Raises:
            KeyError: for a study that is not there.
            Busy: where the line is full.
            CTInstructError: for something that cannot be asked.
        """
        words = self._checked(kind, words)
        one = self.find(study)
        diseases = words.get("diseases")  # refused now, not when its turn comes
        if isinstance(diseases, str):
            words = {"diseases": one.study.diseases_asked(diseases)}
        elif isinstance(diseases, list):
            one.study.disease_rows(diseases)
        if kind == "segment":
            one.study.results.masks.check(words["structures"])  # type: ignore[attr-defined]
        with self.changed:
            if len(self.line) >= self.limits.waiting:
                raise Busy("Too many questions are waiting: try again later.")
            job = Job(kind, study, words, most=most, observers=self.observers)
            ended = [other.id for other in self.jobs.values() if other.ended is not None]
            for other in ended[: max(0, len(ended) - _KEPT_JOBS)]:
                self.jobs.pop(other)
            self.jobs[job.id] = job
            self.line.append(job)
            self.changed.notify_all()
        return job

    def _checked(self, kind: str, words: dict[str, Any]) -> dict[str, Any]:
        if kind not in KINDS:
            raise CTInstructError(f"'{str(kind)[:40]}' cannot be asked: use {', '.join(KINDS)}.")
        key = {"ask": "question", "segment": "structures", "diagnose": "diseases"}.get(kind)
        refuse_unknown(words, ["kind", *([key] if key else [])])
        if kind == "ask":
            question = words.get("question")
            if not isinstance(question, str) or not 0 < len(question.strip()) <= 2000:
                raise CTInstructError("question must be a text of 1 to 2000 characters.")
            return {"question": question.strip()}
        if key is None:
            return {}
        names = words.get(key)
        if kind == "diagnose" and (names is None or (isinstance(names, str) and 0 < len(names.strip()) <= 2000)):
            return {"diseases": names}
        listed = names if isinstance(names, list) else []
        if not 0 < len(listed) <= 200 or not all(
            isinstance(one, str) and 0 < len(one.strip()) <= 100 for one in listed
        ):
            raise CTInstructError(f"{key} must be a list of 1 to 200 names.")
        names = list(dict.fromkeys(one.strip() for one in listed))
        return {key: names}

    def state(self, job: str) -> dict[str, Any]:
        """The state of a job as its client sees it. Raises KeyError for one that is not there."""
        one = self.jobs[job]
        one.seen = time.monotonic()
        with self.changed:
            ahead = self.line.index(one) + bool(self.current) if one in self.line else 0
        return one.state(ahead)

    def partial(self, job: Job) -> str:
        """What of an answer in words is certain already."""
        if job.finished.is_set() or not job.tokens:
            return str((job.result or {}).get("answer", ""))
        text = self.processor.tokenizer.decode(list(job.tokens)).partition(DISEASE_TOKEN)[0]
        return self.processor.write_out(text).rstrip("\ufffd")

    def running(self, study: str) -> str | None:
        """The job that was asked last about a study and has not ended."""
        return next((job.id for job in reversed(self.jobs.values()) if job.study == study and job.ended is None), None)

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
            with self.find(jobs[0].study).use() as one:
                try:
                    results = self._results(jobs, one)
                finally:  # what a cancelled job has marked stays
                    one.label_map.update(one.study.results.masks)
            for job, result in zip(jobs, results, strict=True):
                if job.cancelled.is_set():
                    job.end("cancelled")
                else:
                    job.end("done", result)
        except (Cancelled, Gone):
            for job in jobs:
                job.end("cancelled")
        except CTInstructError as error:
            for job in jobs:
                job.end("failed", error=self.sentence(error))
        except Exception as error:  # the server goes on; what was asked stays out of the log
            logger.exception("A job of kind %s failed.", jobs[0].kind)
            for job in jobs:
                job.end("failed", error=f"It failed by {type(error).__name__}: the server's log says more.")

    def _results(self, jobs: list[Job], one: OpenStudy) -> list[dict[str, Any]]:
        study = one.study

        def step(name: str) -> None:
            if all(job.cancelled.is_set() for job in jobs):
                raise Cancelled
            for job in jobs:
                job.step = name

        step("encoding the scan" if "features" not in study.__dict__ else "reading the question")
        _ = study.features
        step("thinking")
        job = jobs[0]
        if job.kind == "findings":
            return [self._findings(one, step)]
        if job.kind in ("ask", "report"):
            generation: dict[str, Any] = {
                "max_new_tokens": self.limits.new_tokens,
                "stopping_criteria": StoppingCriteriaList(
                    [Watch(jobs, self.limits.new_tokens, study.closing_tokens())]
                ),
            }
        if job.kind == "report":
            before = study.results.report
            text = study.report(**generation)
            if job.cancelled.is_set():  # half a report is none
                study.results.report = before
                raise Cancelled
            return [{"report": text}]
        if job.kind == "diagnose":
            asked_for = job.words["diseases"]
            notes = [study.diseases.find(name).note for name in asked_for] if isinstance(asked_for, list) else []
            return [{"diagnosis": study.diagnose(asked_for), "warnings": _notes(notes)}]
        if job.kind == "segment":
            return [self._segment(one, job.words["structures"], step)]
        for asked in jobs:
            asked.prompt_tokens = study.prompt_tokens(study.structures.question(asked.words["question"])[0])
        kept = len(study.results.answers)
        answers = study.ask_many([job.words["question"] for job in jobs], **generation)
        pairs = study.results.answers[kept:]
        study.results.answers[kept:] = [
            pair for pair, asked in zip(pairs, jobs, strict=True) if not asked.cancelled.is_set()
        ]
        results = []
        for asked, answer in zip(jobs, answers, strict=True):
            masks = {}
            warnings = _notes(study.structures.question(asked.words["question"])[1])
            names = mask_names(asked.words["question"], len(answer.masks))
            for name, mask in zip(names, answer.masks, strict=True):
                try:
                    study.results.masks[name] = mask
                except Full as error:
                    warnings = _notes([*warnings, str(error)])
                    continue
                masks[name] = one.keep_mask(name, mask)
            results.append({"answer": str(answer), "masks": masks, "probabilities": answer.probabilities, "warnings": warnings})  # fmt: skip
        return results

    def _segment(self, one: OpenStudy, names: list[str], step: Callable[[str], None]) -> dict[str, Any]:
        """Masks by name, as many as the study may have."""
        masks: dict[str, Any] = {}
        warnings = _notes(one.study.structures.find(name).note for name in names)
        for name in names:
            step(f"marking {name}")
            try:
                masks[name] = one.keep_mask(name, one.study.segment(name))
            except Full as error:
                if not masks:
                    raise
                warnings.append(f"{len(names) - len(masks)} of {len(names)} structures are not marked. {error}")
                break
        return {"masks": masks, "warnings": warnings}

    def _findings(self, one: OpenStudy, step: Callable[[str], None]) -> dict[str, Any]:
        """The table of findings with a report of several drafts, the masks that are not empty, and whether the scan fits."""
        study = one.study
        fitness = study.fitness()
        warnings = _notes([fitness.warning])
        if study.results.report is None:
            step("writing the report")
            study.report(consensus=DRAFTS, max_new_tokens=self.limits.new_tokens)
        step("comparing")
        try:
            rows = study.findings()
        except Full as error:
            return {"findings": {}, "masks": {}, "report": study.results.report, "warnings": [*warnings, str(error)]}
        shown = {name: study.results.masks[name] for name, row in rows.items() if row["mask"] and row["mask"]["voxels"]}
        masks = {name: one.keep_mask(name, mask) for name, mask in shown.items()}
        result = {"findings": rows, "masks": masks, "report": study.results.report, "warnings": warnings}
        return {**result, "fitness": fitness.to_json()}

    # what is left behind

    def _sweep(self) -> None:
        while not self.closed:
            try:
                self.sweep_once()
            except Exception:
                logger.exception("Removing what nobody uses failed.")
            with self.changed:
                self.changed.wait(timeout=1.0)

    def sweep_once(self, now: float | None = None) -> None:
        """Drop jobs that nobody asks about, forget old ones, close studies and uploads that nobody touches."""
        now = time.monotonic() if now is None else now
        for job in list(self.jobs.values()):
            if job.ended is None and now - job.seen > self.limits.idle_job:
                self.cancel(job.id)
            elif job.ended is not None and now - max(job.ended, job.seen) > self.limits.idle_job:
                self.jobs.pop(job.id, None)
        with self.changed:
            busy = {job.study for job in [*self.line, *self.current]}
        for name, one in list(self.studies.items()):
            if name not in busy and now - one.touched > self.limits.idle_study:
                self.close_study(name)
        self.uploads.sweep(now)


def _notes(notes: Iterable[str | None]) -> list[str]:
    """Each note once."""
    return [note for note in dict.fromkeys(notes) if note]


__all__ = ["Busy", "Engine", "Gone", "Job", "Limits", "OpenStudy", "SeveralSeries", "remove_left_over", "safe_name"]
