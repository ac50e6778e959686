"""`ctinstruct predict` over many scans: resumable, on several processes or Ray; a scan that fails does not stop the others.

Each scan gets a folder of results; `results.csv` has a line per scan, `failures.csv` the errors.
"""

from __future__ import annotations

import csv
import json
import logging
import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from ..errors import CTInstructError
from ..files import whole_file
from ..output.writers import WRITERS
from ..threads import choose_threads
from .predict import Request, predict_study, settings_of
from .scans import Scan

ENGINES = ("local", "ray")


@dataclass
class Task:
    """A scan and everything that is needed to answer about it, in any process or machine.

    Attributes:
        scan: the path.
        folder: of the results.
        request: what to ask.
        reading: model, dtype, series, spacing, names of `predict_study`.
        series, files: of `Scan`.
        asked: `settings_of` scan, request and reading.
    """

    scan: str
    folder: str
    request: Request
    reading: dict[str, Any] = field(default_factory=dict)
    series: str | None = None
    files: list[str] = field(default_factory=list)
    asked: dict[str, Any] = field(default_factory=dict)

    @property
    def source(self) -> Scan:
        """The scan as `find_scans` found it."""
        return Scan(Path(self.scan), self.series, files=[Path(file) for file in self.files])


@dataclass
class Outcome:
    """The outcome of a scan.

    Attributes:
        study: the name of its folder.
        status: done, kept (from an earlier run), incomplete (an output type could not be written) or failed.
        seconds: of work.
        error: a sentence, where it failed or is incomplete.
        changed: what differs from the results of an earlier run that these replace.
    """

    study: str
    status: str
    seconds: float = 0.0
    error: str = ""
    changed: str = ""


def plan(scans: Sequence[Path | Scan], output: Path, request: Request, reading: dict[str, Any]) -> list[Task]:
    """A task per scan; scans of the same name get folders `name`, `name-2` …"""
    taken: set[str] = set()
    tasks = []
    for scan in (scan if isinstance(scan, Scan) else Scan(scan) for scan in scans):
        folder, count = scan.name, 1
        while folder.casefold() in taken:
            count += 1
            folder = f"{scan.name}-{count}"
        taken.add(folder.casefold())
        files = [str(file) for file in scan.files]
        tasks.append(Task(str(scan.path), str(output / folder), request, reading, scan.series, files))
    return tasks


def predict_studies(
    scans: Sequence[Path | Scan],
    output: Path,
    request: Request,
    *,
    workers: int | None = None,
    devices: Sequence[str] = (),
    engine: str = "local",
    restart: bool = False,
    tell: Callable[[int, int, str], None] = lambda done, total, name: None,
    **reading: Any,
) -> list[Outcome]:
    """Ask many scans the same. Results of an earlier run are kept where request, scan, model and version of the package are
    unchanged.

    Args:
        scans: what `find_scans` found.
        output: a folder with a folder of results per scan, `results.csv` and `failures.csv`, and `skipped.csv` where
            `find_scans` left something out.
        request: what to ask.
        workers: processes, by default one per device; on a CPU they share its cores.
        devices: cpu, cuda:0 …, given to the workers in turn.
        engine: local, or ray for Ray Data on machines that must all see the files.
        restart: answer again about scans that have results.
        tell: called with (scans done, all scans, the name of the last).
        reading: model, dtype, quantize, series, spacing, see `predict_study`.

    Returns:
        An outcome per scan, in their order.

    Raises:
        CTInstructError: for an unknown engine or model, or an output folder that cannot be written.
    """
    if engine not in ENGINES:
        raise CTInstructError(f"engine is '{engine}': use {' or '.join(ENGINES)}.")
    count = workers or max(len(devices), 1)
    if count < max(len(devices), 1):
        raise CTInstructError(f"workers is {workers}: give at least {max(len(devices), 1)}, one a device.")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CTInstructError(f"{output} cannot be written: {error.strerror or error}.") from error
    tasks = plan(scans, output, request, reading)
    outcomes: dict[int, Outcome] = {}
    changed: dict[int, str] = {}
    for index, task in enumerate(tasks):
        task.asked = json.loads(json.dumps(settings_of(task.source, task.request, task.reading)))
        found = what_changed(task)
        if found:
            changed[index] = found
            _remove_results(Path(task.folder))
        elif found is not None and not restart:
            outcomes[index] = Outcome(Path(task.folder).name, "kept")
    todo = [index for index in range(len(tasks)) if index not in outcomes]
    if outcomes:
        tell(len(outcomes), len(tasks), "kept from before")
    run = {"local": _on_this_machine, "ray": _on_ray}[engine]
    for index, outcome in run(tasks, todo, count, list(devices)):
        outcome.changed = changed.get(index, "")
        outcomes[index] = outcome
        tell(len(outcomes), len(tasks), outcome.study)
        if outcome.error:  # written at once, to be read during a long run
            write_failures(output / "failures.csv", tasks, outcomes)
    ordered = [outcomes[index] for index in range(len(tasks))]
    write_failures(output / "failures.csv", tasks, outcomes)
    write_table(output / "results.csv", tasks, ordered)
    skipped = getattr(scans, "skipped", [])
    if skipped:
        rows = [{"path": str(path), "reason": reason} for path, reason in skipped]
        _write_csv(output / "skipped.csv", ["path", "reason"], rows)
    return ordered


_NAMES = {"scan_fingerprint": "the scan", "model_fingerprint": "the model", "package_version": "the package's version"}


def what_changed(task: Task) -> str | None:
    """What differs between complete results in the folder and the task, "" for nothing; None without such results."""
    try:
        found = json.loads((Path(task.folder) / "findings.json").read_text(encoding="utf-8"))
        before = found["asked"] or {}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if found.get("failures"):
        return None
    keys = [key for key in {**task.asked, **before} if before.get(key) != task.asked.get(key)]
    if not task.asked["scan_fingerprint"] and "scan_fingerprint" not in keys:
        keys.append("scan_fingerprint")
    if "model_fingerprint" in keys and "model" in keys:
        keys.remove("model")
    return ", ".join(_NAMES.get(key, key) for key in keys)


def _remove_results(folder: Path) -> None:
    """Delete the results of another scan, model or request, some of which may not be written again."""
    old = [*folder.glob("masks/*.nii.gz"), *folder.glob("masks/*.json")]
    old += [folder / name for output_type, (_, name) in WRITERS.items() if output_type not in ("nifti", "dicom-sr")]
    shutil.rmtree(folder / WRITERS["dicom-sr"][1], ignore_errors=True)
    for file in [*old, folder / "findings.json", folder / "report.txt", folder / "report.html"]:
        file.unlink(missing_ok=True)


def answer(task: Task, device: str | None) -> Outcome:
    """Answer about a scan; an error becomes a sentence of the outcome."""
    name = Path(task.folder).name
    start = time.perf_counter()
    try:
        study = predict_study(
            task.source, Path(task.folder), task.request, device=device, asked=task.asked or None, **task.reading
        )
    except CTInstructError as error:
        return Outcome(name, "failed", round(time.perf_counter() - start, 2), str(error))
    except Exception as error:  # a scan must not end the run of all
        sentence = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        return Outcome(name, "failed", round(time.perf_counter() - start, 2), sentence)
    missing = " ".join(study.results.failures.values())
    return Outcome(name, "incomplete" if missing else "done", round(time.perf_counter() - start, 2), missing)


# engines: each yields (index of the task, outcome) as scans are finished


def _on_this_machine(
    tasks: list[Task], todo: list[int], workers: int, devices: list[str]
) -> Iterator[tuple[int, Outcome]]:
    if workers == 1 or len(todo) <= 1:
        for index in todo:
            yield index, answer(tasks[index], devices[0] if devices else None)
        return
    left = list(reversed(todo))
    running: dict[Connection, tuple[Any, int | None, int]] = {}  # pipe -> process, its scan, its number
    context = multiprocessing.get_context("spawn")
    threads = choose_threads(workers)

    def start(number: int) -> None:
        ours, theirs = context.Pipe()
        device = devices[number % len(devices)] if devices else None
        process = context.Process(target=_work, args=(theirs, device, threads), daemon=True)
        process.start()
        theirs.close()
        running[ours] = (process, None, number)
        give(ours)

    def give(pipe: Connection) -> None:
        process, _, number = running[pipe]
        index = left.pop() if left else None
        running[pipe] = (process, index, number)
        with suppress(OSError):  # `wait` finds a process that has died
            pipe.send(None if index is None else tasks[index])
        if index is None:
            del running[pipe]

    for number in range(min(workers, len(todo))):
        start(number)
    try:
        while running:
            ready: list[Any] = wait(list(running))
            for pipe in ready:
                process, current, number = running[pipe]
                try:
                    outcome = pipe.recv()
                except (EOFError, OSError):  # killed, by the system's memory guard for instance
                    process.join()
                    del running[pipe]
                    if current is not None:
                        name = Path(tasks[current].folder).name
                        yield current, Outcome(name, "failed", 0.0, f"Its process ended with code {process.exitcode}.")
                    if left:
                        start(number)
                    continue
                if current is not None:
                    yield current, outcome
                give(pipe)
    finally:
        for process, _, _ in running.values():
            process.terminate()


def _work(pipe: Connection, device: str | None, threads: int) -> None:
    """A worker: answers tasks until it receives None."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    while (task := pipe.recv()) is not None:
        pipe.send(answer(task, device))


class RayWorker:
    """The state of a Ray worker: the model stays loaded from scan to scan."""

    def __init__(self, devices: list[str]) -> None:
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.device = devices[0].split(":")[0] if devices else None  # Ray shows each worker its own GPU

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        task = json.loads(row["task"])
        request = Request(**{**task["request"], "output_types": tuple(task["request"]["output_types"])})
        reading = task["reading"]
        if reading.get("spacing") is not None:
            reading["spacing"] = tuple(reading["spacing"])
        outcome = answer(Task(**{**task, "request": request, "reading": reading}), self.device)
        return {"index": row["index"], **asdict(outcome)}


def _on_ray(tasks: list[Task], todo: list[int], workers: int, devices: list[str]) -> Iterator[tuple[int, Outcome]]:
    try:
        import ray
    except ImportError as error:
        raise CTInstructError("engine ray needs Ray: pip install 'ctinstruct-hf[ray]'.") from error
    if not todo:
        return
    if not ray.is_initialized():
        ray.init(
            log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False
        )  # RAY_ADDRESS names a cluster
    ray.data.DataContext.get_current().enable_progress_bars = False
    items = [{"index": index, "task": json.dumps(asdict(tasks[index]))} for index in todo]
    on_gpu = any(device.startswith("cuda") for device in devices)
    worker: Any = RayWorker
    rows = ray.data.from_items(items, override_num_blocks=len(items)).map(
        worker, fn_constructor_args=(devices,), concurrency=min(workers, len(todo)), num_gpus=1 if on_gpu else None
    )
    for row in rows.iter_rows():
        yield int(row.pop("index")), Outcome(**row)


# the tables


def write_failures(path: Path, tasks: Sequence[Task], outcomes: dict[int, Outcome]) -> None:
    """`failures.csv`: study, scan, error."""
    rows = [
        {"study": outcome.study, "scan": tasks[index].scan, "error": outcome.error}
        for index, outcome in sorted(outcomes.items())
        if outcome.error
    ]
    _write_csv(path, ["study", "scan", "error"], rows)


def write_table(path: Path, tasks: Sequence[Task], outcomes: Sequence[Outcome]) -> None:
    """`results.csv`: a line per scan with status, time, probabilities, volumes in ml and where the scan cuts them off, the
    table of findings, answers, report and warnings."""
    rows = []
    columns = ["study", "status", "seconds"]
    for task, outcome in zip(tasks, outcomes, strict=True):
        row: dict[str, Any] = {"study": outcome.study, "status": outcome.status, "seconds": outcome.seconds}
        if outcome.status != "failed":
            found = json.loads((Path(task.folder) / "findings.json").read_text(encoding="utf-8"))
            row |= {f"probability {name}": value for name, value in found["diagnosis"].items()}
            for name, numbers in found["segmentation"].items():
                row[f"{name} (ml)"] = numbers["volume_ml"]
                row[f"{name} cut off at"] = ", ".join(numbers.get("cut_off") or [])
            for name, finding in found.get("findings", {}).items():
                row[f"{name} in report"], row[f"{name} agreement"] = finding["report"], finding["agreement"]
                row[f"{name} (mm)"] = (finding["mask"] or {}).get("diameter_mm")
            row |= {turn["question"]: turn["answer"] for turn in found["answers"]}
            if found["report"] is not None:
                row["report"] = found["report"]
            row["warnings"] = " ".join(found["warnings"])
        else:
            row["warnings"] = outcome.error
        columns += [name for name in row if name not in columns]
        rows.append(row)
    columns.append(columns.pop(columns.index("warnings")) if "warnings" in columns else "warnings")
    _write_csv(path, columns, rows)


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    try:
        with whole_file(path) as draft, draft.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows([{name: _cell(value) for name, value in row.items()} for row in rows])
    except OSError as error:
        raise CTInstructError(f"{path} cannot be written: {error.strerror or error}.") from error


def _cell(value: Any) -> Any:
    """A value that a spreadsheet does not take for a formula."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t") else value


__all__ = ["Outcome", "Task", "predict_studies"]
