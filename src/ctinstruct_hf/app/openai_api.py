"""The chat interface that clients of OpenAI speak: `/v1/models` and `/v1/chat/completions`, streamed or whole.

A scan is an `image_url` part (see `scans.Scans`). Masks and probabilities come in the field `ctinstruct` of the answer, which a
request may ask for by a field of that name: {"segment": [names], "diagnose": a list's name or names, "series": which series}.
Each question is answered by itself, greedily, about the scan that was given last.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool

from ..errors import CTInstructError
from .engine import Engine
from .jobs import Job
from .keys import api_error
from .receiving import read_json, refuse_unknown
from .scans import MOST_BODY, Scans

_UNSUPPORTED = ("tools", "functions", "audio", "logprobs", "prediction")
_POLL = 0.03  # seconds


class NoSuchModel(CTInstructError):
    """Another model than the one that is served."""


@dataclass
class _Chat:
    """A request that was understood.

    Attributes:
        question: text of the last message; "" where only the extension asks.
        scan: the URL of the scan.
        most: tokens to write, at most.
    """

    question: str
    scan: str
    stream: bool = False
    with_usage: bool = False
    most: int | None = None
    segment: list[str] = field(default_factory=list)
    diagnose: Any = None
    series: str | None = None


def add_openai(app: FastAPI, engine: Engine, folder: Path | None) -> None:
    """Serve the interface.

    Args:
        folder: see `scans.Scans`.
    """
    name = Path(str(engine.model.config.name_or_path or "model")).name
    model = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "ctinstruct-hf"}
    scans = Scans(engine, folder)
    opening = asyncio.Semaphore(4)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{wanted:path}")
    async def one_model(wanted: str) -> dict[str, Any]:
        _check_model(wanted, name)
        return model

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> Response:
        """Answer a question about a scan."""
        chat = read_chat(await read_json(request, engine.limits.idle_upload, MOST_BODY), name)
        async with opening:
            study = await run_in_threadpool(scans.open, chat.scan, chat.series)
        jobs = _submit(engine, study, chat)
        answer = _Answer(engine, name, study, chat, jobs, str(request.base_url))
        if chat.stream:
            return StreamingResponse(answer.stream(), media_type="text/event-stream")
        try:
            while not all(job.finished.is_set() for job in jobs):
                if await request.is_disconnected():
                    return Response(status_code=499)
                answer.touch()
                await asyncio.sleep(_POLL)
        finally:
            answer.cancel()
        failed = answer.failure()
        if failed is not None:
            return JSONResponse(api_error(400, failed), status_code=400)
        return JSONResponse(answer.whole())


def _check_model(wanted: Any, name: str) -> None:
    if wanted != name:
        raise NoSuchModel(f"The model '{str(wanted)[:60]}' is not served here: use '{name}'.")


def read_chat(words: dict[str, Any], name: str) -> _Chat:
    """A request of the interface.

    Raises:
        CTInstructError: for what it lacks, or what is not done here.
    """
    _check_model(words.get("model"), name)
    asked = [key for key in _UNSUPPORTED if words.get(key)]
    if asked or words.get("n", 1) not in (1, None):
        raise CTInstructError(f"{asked[0] if asked else 'n'} is not supported: the model writes one answer as text.")
    form = words.get("response_format")
    if isinstance(form, dict) and form.get("type") not in ("text", None):
        raise CTInstructError("response_format is not supported: the answer is text.")
    messages = words.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(one, dict) for one in messages):
        raise CTInstructError("messages must be a list of messages with a role and content.")
    if messages[-1].get("role") != "user":
        raise CTInstructError("The last message must be of the user: it holds the question.")
    scan = ""
    for message in messages:
        found = [part for part in _parts(message) if part.get("type") == "image_url"]
        urls = [_url(part) for part in found]
        if len(urls) > 1:
            raise CTInstructError(f"A message has {len(urls)} scans: give one.")
        scan = urls[0] if urls else scan
    if not scan:
        raise CTInstructError("There is no scan: give an image_url part with study:ID, a data URL or a file:// URL.")
    texts = [part.get("text") for part in _parts(messages[-1]) if part.get("type") == "text"]
    question = "\n".join(text for text in texts if isinstance(text, str)).strip()
    more = words.get("ctinstruct") or {}
    if not isinstance(more, dict):
        raise CTInstructError("ctinstruct must be an object with segment, diagnose or series.")
    refuse_unknown(more, ["segment", "diagnose", "series"])
    most = words.get("max_completion_tokens") or words.get("max_tokens")
    if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
        raise CTInstructError("max_completion_tokens must be a whole number from 1 on.")
    series = more.get("series")
    if series is not None and not isinstance(series, str):
        raise CTInstructError("ctinstruct.series must be a text that names one series.")
    if not question and not more.get("segment") and not more.get("diagnose"):
        raise CTInstructError("The last message has no text: ask a question.")
    options = words.get("stream_options")
    return _Chat(
        question=question,
        scan=scan,
        stream=words.get("stream") is True,
        with_usage=isinstance(options, dict) and options.get("include_usage") is True,
        most=most,
        segment=more.get("segment") or [],
        diagnose=more.get("diagnose"),
        series=series,
    )


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    listed = content if isinstance(content, list) else []
    if not all(isinstance(part, dict) for part in listed):
        raise CTInstructError("content must be text or a list of parts with a type.")
    unknown = [str(part.get("type"))[:40] for part in listed if part.get("type") not in ("text", "image_url")]
    if unknown:
        raise CTInstructError(f"A part of type '{unknown[0]}' is not read: use text and image_url.")
    return listed


def _url(part: dict[str, Any]) -> str:
    found = part.get("image_url")
    url = found.get("url") if isinstance(found, dict) else found
    if not isinstance(url, str) or not url:
        raise CTInstructError('An image_url part is {"type": "image_url", "image_url": {"url": …}}.')
    return url


def _submit(engine: Engine, study: str, chat: _Chat) -> list[Job]:
    """What the request asks, as jobs; none is left in the line where one is refused."""
    wanted: list[tuple[str, dict[str, Any]]] = []
    if chat.question:
        wanted.append(("ask", {"question": chat.question}))
    if chat.segment:
        wanted.append(("segment", {"structures": chat.segment}))
    if chat.diagnose:
        wanted.append(("diagnose", {"diseases": chat.diagnose}))
    jobs: list[Job] = []
    try:
        for kind, words in wanted:
            jobs.append(engine.submit(study, kind, words, chat.most if kind == "ask" else None))
    except BaseException:
        for job in jobs:
            engine.cancel(job.id)
        raise
    return jobs


class _Answer:
    """The jobs of a request as the objects that clients read."""

    def __init__(self, engine: Engine, model: str, study: str, chat: _Chat, jobs: list[Job], address: str) -> None:
        self.engine, self.study, self.chat, self.jobs, self.address = engine, study, chat, jobs, address
        self.text_job = next((job for job in jobs if job.kind == "ask"), None)
        self.head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def touch(self) -> None:
        """Somebody waits."""
        for job in self.jobs:
            job.seen = time.monotonic()

    def cancel(self) -> None:
        for job in self.jobs:
            if job.ended is None:
                self.engine.cancel(job.id)

    def failure(self) -> str | None:
        wrong = next((job for job in self.jobs if job.status != "done"), None)
        return None if wrong is None else wrong.error or "The request was cancelled: the study was closed."

    def text(self) -> str:
        return "" if self.text_job is None else str((self.text_job.result or {}).get("answer", ""))

    def partial(self) -> str:
        """What of the answer is certain already."""
        return "" if self.text_job is None else self.engine.partial(self.text_job)

    def usage(self) -> dict[str, int]:
        prompt, written = (0, 0) if self.text_job is None else (self.text_job.prompt_tokens, len(self.text_job.tokens))
        return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}

    def reason(self) -> str:
        return "length" if self.text_job is not None and self.text_job.cut else "stop"

    def extension(self) -> dict[str, Any]:
        """The field `ctinstruct`: masks with their addresses, probabilities, notes."""
        found: dict[str, Any] = {"study": self.study, "research_use_only": True, "masks": {}, "probabilities": []}
        warnings: list[str] = []
        for job in self.jobs:
            result = job.result or {}
            for name, numbers in (result.get("masks") or {}).items():
                place = f"{self.address}api/studies/{self.study}/masks/{numbers['file']}"
                found["masks"][name] = {**numbers, "url": place}
            found["probabilities"] += result.get("probabilities") or []
            if "diagnosis" in result:
                found["diagnosis"] = result["diagnosis"]
            warnings += result.get("warnings") or []
        return {**found, "warnings": list(dict.fromkeys(warnings))}

    def whole(self) -> dict[str, Any]:
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": self.text(), "refusal": None},
            "finish_reason": self.reason(),
            "logprobs": None,
        }
        return {
            **self.head,
            "object": "chat.completion",
            "choices": [choice],
            "usage": self.usage(),
            "ctinstruct": self.extension(),
        }

    async def stream(self) -> AsyncIterator[str]:
        """Server-sent events: text as it is written, then the extension, the usage where it is wanted, and the end."""
        sent = ""
        try:
            yield self._event({"role": "assistant", "content": ""})
            while True:
                ended = all(job.finished.is_set() for job in self.jobs)
                certain = self.partial()
                if len(certain) > len(sent) and certain.startswith(sent):
                    yield self._event({"content": certain[len(sent) :]})
                    sent = certain
                if ended:
                    break
                self.touch()
                await asyncio.sleep(_POLL)
            failed = self.failure()
            if failed is not None:
                yield f"data: {json.dumps(api_error(400, failed))}\n\n"
                return
            yield self._event({}, finish_reason=self.reason(), ctinstruct=self.extension())
            if self.chat.with_usage:
                yield self._event(None, usage=self.usage())
            yield "data: [DONE]\n\n"
        finally:
            self.cancel()

    def _event(self, delta: dict[str, Any] | None, finish_reason: str | None = None, **more: Any) -> str:
        choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish_reason}]
        chunk = {**self.head, "object": "chat.completion.chunk", "choices": choices, **more}
        return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"


__all__ = ["NoSuchModel", "add_openai", "read_chat"]
