"""The HTTP side of `ctinstruct app`: the page's files, and JSON for the page and for programs."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .. import __version__
from ..errors import CTInstructError
from ..study import notes_on
from .engine import Busy, Engine, OpenStudy, safe_name

STATIC = Path(__file__).parent / "static"
NOTICE = "Research use only. Not a diagnosis."
# the page and its viewer come from here, nothing from elsewhere; the viewer unpacks masks by WebAssembly
_POLICY = (
    "default-src 'none'; script-src 'self' 'wasm-unsafe-eval' blob:; worker-src 'self' blob:; style-src 'self' "
    "'unsafe-inline'; img-src 'self' data: blob:; connect-src 'self' data: blob:; font-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_DOWNLOADS = {
    "findings.json": "application/json",
    "report.txt": "text/plain; charset=utf-8",
    "report.html": "text/html; charset=utf-8",
    "masks.dcm": "application/dicom",
}


def create_app(engine: Engine, hosts: tuple[str, ...] = ("127.0.0.1", "localhost", "[::1]"), page: bool = True) -> FastAPI:  # fmt: skip
    """The application over an engine, which is closed with it.

    Args:
        engine: answers.
        hosts: names by which the server may be called; others are refused, so that no page from elsewhere reaches it
            by a name of its own.
        page: serve the page too, not only the interface.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(engine.close)

    app = FastAPI(title="CTInstruct", version=__version__, description=NOTICE, lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url="/api/openapi.json")  # fmt: skip
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))

    app.add_middleware(_Guard)

    @app.exception_handler(Busy)
    async def busy(_: Request, error: Busy) -> JSONResponse:
        return _said(503, str(error), {"Retry-After": "5"})

    @app.exception_handler(CTInstructError)
    async def wrong(_: Request, error: CTInstructError) -> JSONResponse:
        return _said(400, str(error))

    @app.exception_handler(KeyError)
    async def missing(_: Request, error: KeyError) -> JSONResponse:
        return _said(404, "It is not there, or not any more: open the study again.")

    if page:
        _add_page(app)
    _add_studies(app, engine)
    _add_jobs(app, engine)
    _add_downloads(app, engine)
    return app


class _Guard:
    """Refuses what other sites send, and gives every answer its headers."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Headers(scope=scope)
        origin = request.get("origin")
        foreign = origin is not None and urlsplit(origin).netloc != request.get("host")
        if foreign and scope["method"] not in ("GET", "HEAD"):
            await _said(403, "Requests from other sites are refused.")(scope, receive, send)
            return

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self.app(scope, receive, send_on)


def _said(status: int, sentence: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": sentence}, status_code=status, headers={**_HEADERS, **(headers or {})})


def _add_page(app: FastAPI) -> None:
    files = {path.name: path for path in STATIC.iterdir() if path.suffix in (".html", ".css", ".js", ".svg")}

    @app.get("/", include_in_schema=False)
    async def index() -> FileResponse:
        return FileResponse(files["index.html"], headers={"Cache-Control": "no-cache"})

    @app.get("/static/{name}", include_in_schema=False)
    async def static(name: str) -> Response:
        return FileResponse(files[name], headers={"Cache-Control": "no-cache"})


def _add_studies(app: FastAPI, engine: Engine) -> None:
    @app.get("/api/model")
    async def model() -> dict[str, Any]:
        """What the model is called and can be asked."""
        return describe_model(engine)

    @app.post("/api/uploads", status_code=201)
    async def new_upload() -> dict[str, str]:
        """A place for the files of one study."""
        return {"upload": engine.new_upload()}

    @app.put("/api/uploads/{upload}", status_code=201)
    async def put_file(upload: str, name: str, request: Request) -> dict[str, str]:
        """One file of it: the body, as it is."""
        return {"file": await receive(engine, upload, name, request)}

    @app.post("/api/studies", status_code=201)
    async def open_study(request: Request, name: str | None = None) -> dict[str, Any]:
        """Open a study: JSON {"upload": id} or {"sample": seed}, or a file as the body with its name in the address."""
        if name is not None:
            upload = engine.new_upload()
            try:
                await receive(engine, upload, name, request)
            except BaseException:
                engine.drop_upload(upload)
                raise
            wanted: dict[str, Any] = {"upload": upload}
        else:
            wanted = await _json(request)
        if "sample" in wanted:
            study = await run_in_threadpool(_open_sample, engine, wanted["sample"])
        elif isinstance(wanted.get("upload"), str):
            study = await run_in_threadpool(engine.open_upload, wanted["upload"])
        else:
            raise CTInstructError("Give an upload or a sample.")
        return {"study": study, **describe_study(engine.find(study))}

    @app.get("/api/studies/{study}")
    async def one_study(study: str) -> dict[str, Any]:
        return {"study": study, **describe_study(engine.find(study))}

    @app.delete("/api/studies/{study}", status_code=204)
    async def close_study(study: str) -> Response:
        engine.find(study)
        await run_in_threadpool(engine.close_study, study)
        return Response(status_code=204)

    @app.get("/api/studies/{study}/scan.nii")
    async def scan(study: str) -> FileResponse:
        """The scan, HU, on its own grid."""
        return FileResponse(engine.find(study).folder / "scan.nii", media_type="application/octet-stream")


def _add_jobs(app: FastAPI, engine: Engine) -> None:
    @app.post("/api/studies/{study}/jobs", status_code=202)
    async def submit(study: str, request: Request, wait: bool = False) -> Response:
        """Ask: {"kind": "ask", "question"}, {"kind": "report"}, {"kind": "segment", "structures"} or {"kind": "diagnose",
        "diseases"}. With `wait` the answer comes at once, and a client that leaves cancels it."""
        words = await _json(request)
        job = engine.submit(study, words.get("kind"), words)  # type: ignore[arg-type]
        if not wait:
            return JSONResponse(engine.state(job.id), status_code=202)
        while not job.finished.is_set():
            if await request.is_disconnected():
                engine.cancel(job.id)
                return Response(status_code=499)
            engine.state(job.id)  # somebody waits
            await asyncio.sleep(0.05)
        return JSONResponse(engine.state(job.id), status_code=200)

    @app.get("/api/jobs/{job}")
    async def state(job: str) -> dict[str, Any]:
        """How far a job is; its result, once done. A job that nobody asks about for a while is dropped."""
        return engine.state(job)

    @app.delete("/api/jobs/{job}", status_code=202)
    async def cancel(job: str) -> dict[str, Any]:
        engine.cancel(job)
        return engine.state(job)


def _add_downloads(app: FastAPI, engine: Engine) -> None:
    @app.get("/api/studies/{study}/masks/{file}")
    async def mask(study: str, file: str) -> FileResponse:
        """A mask as NIfTI on the scan's own grid."""
        one = engine.find(study)
        if file not in one.masks.values():
            raise KeyError(file)
        return FileResponse(one.folder / "masks" / file, media_type="application/gzip", filename=file)

    @app.get("/api/studies/{study}/results/{file}")
    async def results(study: str, file: str) -> FileResponse:
        """findings.json, report.txt, report.html or masks.dcm (DICOM SEG) of everything asked so far."""
        one = engine.find(study)
        media = _DOWNLOADS[file]
        path = await run_in_threadpool(save, one, file)
        # the page is to be saved, not shown here, where it would run beside the interface
        return FileResponse(path, media_type=media, filename=file, content_disposition_type="attachment")


def save(one: OpenStudy, file: str) -> Path:
    """Write the results of a study, in its folder; the path of one of the files."""
    with one.lock:
        kinds = ("dicom-seg",) if file == "masks.dcm" else ("nifti",)
        if file == "masks.dcm" and not one.study.results.masks:
            raise CTInstructError("There is no mask yet: mark a structure first.")
        one.study.save(one.folder / "results", output_types=kinds)
    return one.folder / "results" / file


async def receive(engine: Engine, upload: str, name: str, request: Request) -> str:
    """Write the body of a request into an upload, no more than its limit allows."""
    folder = engine.upload_folder(upload)
    limits = engine.limits
    files = list(folder.iterdir())
    if len(files) >= limits.upload_files:
        raise CTInstructError(f"A study may have {limits.upload_files} files.")
    left = limits.upload_bytes - sum(file.stat().st_size for file in files)
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > left:
        raise CTInstructError(_too_large(limits.upload_bytes))
    target = folder / safe_name(name)
    if target.exists():
        target = folder / f"{len(files):06d}_{target.name}"
    try:
        with target.open("wb") as file:
            async for part in request.stream():
                left -= len(part)
                if left < 0:
                    raise CTInstructError(_too_large(limits.upload_bytes))
                file.write(part)
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    return target.name


def _too_large(most: int) -> str:
    return f"The files of a study may have {most / 2**30:.3g} GiB together."


async def _json(request: Request) -> dict[str, Any]:
    """The body as an object; small, since nothing large is said in JSON here."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > 2**20:
            raise CTInstructError("The request is too long.")
    try:
        found = json.loads(body or b"{}")
    except ValueError as error:
        raise CTInstructError("The request is not JSON.") from error
    if not isinstance(found, dict):
        raise CTInstructError("The request must be a JSON object.")
    return found


def _open_sample(engine: Engine, seed: Any) -> str:
    from ..data.reading import phantom_of

    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 10**9:
        raise CTInstructError("sample must be a whole number, the seed of a made-up scan.")
    return engine.open_source(phantom_of(f"phantom:trunk:{seed}").volume)


def describe_study(one: OpenStudy) -> dict[str, Any]:
    """Size and warnings of a scan; nothing of who it is."""
    volume = one.study.volume
    return {
        "name": re.sub(r"^\d{6}_", "", str(volume.source.name or "scan")),
        "shape": list(volume.shape),
        "spacing": [round(float(mm), 3) for mm in volume.spacing],
        "warnings": one.study.warnings,
        "dicom": volume.source.kind == "dicom",
    }


def describe_model(engine: Engine) -> dict[str, Any]:
    """What the page needs to know before a study is open."""
    from ..data.phantoms import FINDINGS, ORGANS, UNIONS
    from ..output.report import COLOURS, WINDOWS

    config = engine.model.config
    return {
        "model": Path(str(config.name_or_path or "model")).name,
        "trained": bool(config.trained),
        "notice": " ".join([NOTICE, *notes_on(config)]),
        "disease_lists": dict(config.disease_lists),
        "structures": [name for name in [*ORGANS, *UNIONS] if name != "body"],
        "findings": list(FINDINGS),
        "windows": {name: list(levels) for name, levels in WINDOWS.items()},
        "colours": list(COLOURS),
        "upload_bytes": engine.limits.upload_bytes,
        "version": __version__,
    }


def run(engine: Engine, host: str, port: int, page: bool = True, told: Callable[[str], None] = print) -> None:
    """Serve until interrupted."""
    import socket

    import uvicorn

    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(128)
    except OSError as error:
        engine.close()
        raise CTInstructError(f"{host}:{port} cannot be used: {error.strerror or error}.") from error
    shown = f"[{host}]" if ":" in host else host
    hosts = ("127.0.0.1", "localhost", "[::1]", shown)
    config = uvicorn.Config(create_app(engine, hosts, page), log_level="warning", access_log=False)
    try:
        told(f"http://{shown}:{listener.getsockname()[1]}")
        uvicorn.Server(config).run(sockets=[listener])
    except KeyboardInterrupt:
        pass
    finally:
        engine.close()
        listener.close()


__all__ = ["create_app", "run"]
