"""For operators: `/health`, `/metrics` for Prometheus, and a line of JSON per job; none has an identifier."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from fastapi import FastAPI, Response

from .._version import __version__
from ..errors import CTInstructError
from .engine import Engine
from .jobs import Job

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class Meter:
    """Counts what jobs did: by kind and end, and the seconds of each of their steps."""

    def __init__(self) -> None:
        self.jobs: Counter[tuple[str, str]] = Counter()
        self.tokens = 0
        self.steps: dict[str, list[int]] = {}
        self.seconds: Counter[str] = Counter()

    def __call__(self, job: Job) -> None:
        self.jobs[job.kind, job.status] += 1
        self.tokens += len(job.tokens)
        for step, seconds in job.seconds.items():
            counts = self.steps.setdefault(step, [0] * (len(_SECONDS) + 1))
            counts[sum(seconds > most for most in _SECONDS)] += 1
            self.seconds[step] += seconds  # type: ignore[assignment]


def log_line(job: Job) -> str:
    """A job as a line of JSON."""
    seconds = {step: round(value, 3) for step, value in job.seconds.items()}
    found = {"time": round(time.time(), 3), "event": "job", "kind": job.kind, "status": job.status, "seconds": seconds}
    return json.dumps({**found, "tokens": len(job.tokens)})


def add_metrics(app: FastAPI, engine: Engine, log: Callable[[str], None] | None = None) -> None:
    """Serve both; `log` is called with `log_line` of each job that ended."""
    meter = Meter()
    engine.observers.append(meter)
    if log is not None:
        engine.observers.append(lambda job: log(log_line(job)))
    started = time.time()

    @app.get("/health")
    async def health() -> Response:
        """Whether the worker that answers is alive, and what waits for it."""
        alive = engine.worker.is_alive() and not engine.closed
        found = {"status": "ok" if alive else "failed", "version": __version__, **_state(engine)}
        return Response(json.dumps(found), 200 if alive else 503, media_type="application/json")

    @app.get("/metrics", response_class=Response)
    def metrics() -> Response:
        """In the text format of Prometheus."""
        try:
            from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector, generate_latest
        except ImportError as error:
            raise CTInstructError("The server lacks prometheus-client: pip install 'ctinstruct-hf[app]'.") from error
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        registry.register(_Collector(engine, meter, started))
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


def _state(engine: Engine) -> dict[str, int]:
    return {"waiting": len(engine.line), "running": len(engine.current), "studies": len(engine.studies)}


class _Collector:
    """What prometheus-client reads at each scrape."""

    def __init__(self, engine: Engine, meter: Meter, started: float) -> None:
        self.engine, self.meter, self.started = engine, meter, started

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        helps = {"waiting": "Jobs in the line.", "running": "Jobs being answered.", "studies": "Open studies."}
        for name, value in _state(self.engine).items():
            yield GaugeMetricFamily(f"ctinstruct_{name}", helps[name], value=value)
        device = getattr(self.engine.model, "device", None)
        if device is not None and device.type == "cuda":
            import torch

            used = torch.cuda.memory_allocated(device)
            yield GaugeMetricFamily("ctinstruct_gpu_memory_bytes", "Memory of tensors on the GPU.", value=used)
        jobs = CounterMetricFamily("ctinstruct_jobs", "Jobs that ended.", labels=["kind", "status"])
        for labels, count in sorted(self.meter.jobs.items()):
            jobs.add_metric(labels, count)
        yield jobs
        yield CounterMetricFamily("ctinstruct_tokens", "Tokens written.", value=self.meter.tokens)
        steps = HistogramMetricFamily("ctinstruct_step_seconds", "Seconds of each step of a job.", labels=["step"])
        for step, counts in sorted(self.meter.steps.items()):
            steps.add_metric([step], _buckets(counts), self.meter.seconds[step])
        yield steps


def _buckets(counts: Iterable[int]) -> list[tuple[str, int]]:
    total, found = 0, []
    for most, count in zip([*map(str, _SECONDS), "+Inf"], counts, strict=True):
        total += count
        found.append((most, total))
    return found


__all__ = ["Meter", "add_metrics", "log_line"]
