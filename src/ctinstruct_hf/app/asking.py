"""Jobs over HTTP: asked, followed, cancelled."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from .engine import Engine
from .receiving import read_json

_POLL = 0.05  # seconds


def add_jobs(app: FastAPI, engine: Engine) -> None:
    @app.post("/api/studies/{study}/jobs", status_code=202)
    async def submit(study: str, request: Request, wait: bool = False) -> Response:
        """Ask: {"kind": "ask", "question"}, {"kind": "report"}, {"kind": "segment", "structures"}, {"kind": "diagnose",
        "diseases"} or {"kind": "findings"}. With `wait` the answer comes at once, and a client that leaves cancels it."""
        words = await read_json(request, engine.limits.idle_upload)
        job = engine.submit(study, words.get("kind"), words)  # type: ignore[arg-type]
        if not wait:
            return JSONResponse(engine.state(job.id), status_code=202)
        while not job.finished.is_set():
            if await request.is_disconnected():
                engine.cancel(job.id)
                return Response(status_code=499)
            engine.state(job.id)  # somebody waits
            await asyncio.sleep(_POLL)
        return JSONResponse(engine.state(job.id), status_code=200)

    @app.get("/api/jobs/{job}")
    async def state(job: str) -> dict[str, Any]:
        """How far a job is; its result, once done. A job that nobody asks about for a while is dropped."""
        return engine.state(job)

    @app.get("/api/jobs/{job}/events", response_class=StreamingResponse)
    async def events(job: str) -> StreamingResponse:
        """The same as server-sent events, one for each change until it has ended; `text` is what is written so far."""
        engine.state(job)
        return StreamingResponse(_events(engine, job), media_type="text/event-stream")

    @app.delete("/api/jobs/{job}", status_code=202)
    async def cancel(job: str) -> dict[str, Any]:
        engine.cancel(job)
        return engine.state(job)


async def _events(engine: Engine, job: str) -> AsyncIterator[str]:
    sent = None
    while True:
        state = {**engine.state(job), "text": engine.partial(engine.jobs[job])}
        if state != sent:
            yield f"data: {json.dumps(state, ensure_ascii=False)}\n\n"
            sent = state
        if state["status"] not in ("queued", "running"):
            return
        await asyncio.sleep(_POLL)


__all__ = ["add_jobs"]
