"""The HTTP side of `ctinstruct app`: the page's files, and JSON for the page and for programs."""

from __future__ import annotations

import asyncio
import os
import re
import socket
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, urlsplit

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from h11 import LocalProtocolError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .._version import __version__
from ..errors import CTInstructError
from ..inference.models import notes_on
from ..output.types import NOTICE
from .archive import Archive, add_archive
from .asking import add_jobs
from .engine import Busy, Engine, OpenStudy, SeveralSeries
from .keys import KeyGuard, api_error
from .metrics import add_metrics
from .openai_api import NoSuchModel, add_openai
from .receiving import is_form, read_json, receive, refuse_unknown
from .review_routes import add_review

STATIC = Path(__file__).parent / "static"
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


def create_app(
    engine: Engine,
    hosts: tuple[str, ...] = ("127.0.0.1", "localhost", "[::1]"),
    page: bool = True,
    key: str | None = None,
    files: Path | None = None,
    log: Callable[[str], None] | None = None,
    pacs: str | None = None,
) -> FastAPI:
    """The application over an engine, which is closed with it.

    Args:
        engine: answers.
        hosts: names by which the server may be called; others are refused, so that no page from elsewhere reaches it
            by a name of its own.
        page: serve the page too, not only the interface.
        key: nothing is served without it.
        files: folder of scans that chats may name by `file://`.
        log: called with a line of JSON for every job that ended.
        pacs: `dicomweb+http(s)://…`, the archive that studies may be opened from; no other one is asked.
    """
    archive = None if pacs is None else Archive(engine, pacs)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(engine.close)

    app = FastAPI(title="CTInstruct", version=__version__, description=NOTICE, lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url="/api/openapi.json")  # fmt: skip
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))

    if key is not None:
        app.add_middleware(KeyGuard, key=key)
    app.add_middleware(_Guard)

    _add_errors(app, engine)
    if page:
        _add_page(app)
    _add_studies(app, engine, archive)
    add_jobs(app, engine)
    _add_downloads(app, engine)
    add_review(app, engine)
    add_openai(app, engine, files)
    add_metrics(app, engine, log)
    return app


def _add_errors(app: FastAPI, engine: Engine) -> None:
    """Every error is one sentence as JSON."""

    @app.exception_handler(Busy)
    async def busy(request: Request, error: Busy) -> JSONResponse:
        return _refusal(503, str(error), {"Retry-After": "5"}, request)

    @app.exception_handler(SeveralSeries)
    async def choose(request: Request, error: SeveralSeries) -> JSONResponse:
        if request.url.path.startswith("/v1/"):
            engine.uploads.drop(error.upload)
            return _refusal(400, engine.sentence(error), None, request)
        content = {
            "error": engine.sentence(error),
            "upload": error.upload,
            "series": error.series,
            "skipped": error.skipped,
        }
        return JSONResponse(content, status_code=300, headers=_HEADERS)

    @app.exception_handler(CTInstructError)
    async def wrong(request: Request, error: CTInstructError) -> JSONResponse:
        return _refusal(404 if isinstance(error, NoSuchModel) else 400, engine.sentence(error), None, request)

    @app.exception_handler(KeyError)
    async def missing(request: Request, error: KeyError) -> JSONResponse:
        return _refusal(404, "It is not there, or not any more: open the study again.", None, request)

    @app.exception_handler(ClientDisconnect)
    async def left(_: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nobody reads it

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        places = ", ".join(dict.fromkeys(str(one["loc"][-1]) for one in error.errors()))
        return _refusal(422, f"{places} is missing or has no such value.", None, request)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        return _refusal(error.status_code, f"{error.detail}.", dict(error.headers or {}), request)


class _Guard:
    """Refuses what other sites send, gives every answer its headers, and answers HEAD as GET without a body."""

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
            await _refusal(403, "Requests from other sites are refused.")(scope, receive, send)
            return

        head = scope["method"] == "HEAD"
        if head:
            scope = {**scope, "method": "GET", "ctinstruct.head": True}

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            elif head:
                message = {**message, "body": b""}
            try:
                await send(message)
            except LocalProtocolError:  # what came after the head was no HTTP: the connection is being closed
                await asyncio.sleep(0)

        await self.app(scope, receive, send_on)


class _File(StreamingResponse):
    """A file that is opened now: what is removed meanwhile is still sent whole. Raises KeyError where it is not there."""

    def __init__(self, path: Path, media_type: str, filename: str | None = None) -> None:
        try:
            self.file: BinaryIO = path.open("rb")
        except OSError as error:
            raise KeyError(path.name) from error
        headers = {"Content-Length": str(os.fstat(self.file.fileno()).st_size)}
        if filename is not None:
            # to be saved, not shown here, where a page would run beside the interface
            headers["Content-Disposition"] = f"attachment; filename*=utf-8''{quote(filename)}"
            if filename.isascii():
                headers["Content-Disposition"] = f'attachment; filename="{filename}"'
        super().__init__(self._parts(), headers=headers, media_type=media_type)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if scope.get("ctinstruct.head"):
                await Response(headers=dict(self.headers), media_type=self.media_type)(scope, receive, send)
            else:
                await super().__call__(scope, receive, send)
        finally:
            self.file.close()

    def _parts(self) -> Iterator[bytes]:
        while part := self.file.read(2**18):
            yield part


class _InTurn:
    """Runs slow functions in threads, a few at once, so that those who wait for them leave threads for the others."""

    def __init__(self, together: int, waiting: int) -> None:
        self.turns, self.waiting, self.here = asyncio.Semaphore(together), waiting, 0

    async def __call__(self, function: Callable[..., Any], *words: Any) -> Any:
        if self.here >= self.waiting:
            raise Busy("Too much is waiting: try again later.")
        self.here += 1
        try:
            async with self.turns:
                return await run_in_threadpool(function, *words)
        finally:
            self.here -= 1


def _refusal(
    status: int, sentence: str, headers: dict[str, str] | None = None, request: Request | None = None
) -> JSONResponse:
    """One sentence, as the interface that was called writes errors."""
    content: dict[str, Any] = {"error": sentence}
    if request is not None and request.url.path.startswith("/v1/"):
        code = "model_not_found" if status == 404 and "model" in sentence else None
        content = api_error(status, sentence, code)
    return JSONResponse(content, status_code=status, headers={**_HEADERS, **(headers or {})})


def _add_page(app: FastAPI) -> None:
    files = {path.name: path for path in STATIC.iterdir() if path.suffix in (".html", ".css", ".js", ".svg")}

    @app.get("/", include_in_schema=False)
    async def index() -> FileResponse:
        return FileResponse(files["index.html"], headers={"Cache-Control": "no-cache"})

    @app.get("/static/{name}", include_in_schema=False)
    async def static(name: str) -> Response:
        return FileResponse(files[name], headers={"Cache-Control": "no-cache"})


def _add_studies(app: FastAPI, engine: Engine, archive: Archive | None) -> None:
    @app.get("/api/model")
    async def model() -> dict[str, Any]:
        """What the model is called and can be asked."""
        return {**describe_model(engine), "pacs": archive is not None}

    @app.post("/api/uploads", status_code=201)
    async def new_upload(title: str | None = None) -> dict[str, str]:
        """A place for the files of one study; `title` is what it is called, its folder's name for example."""
        return {"upload": await run_in_threadpool(engine.uploads.new, title)}

    @app.put("/api/uploads/{upload}", status_code=201)
    async def put_file(upload: str, request: Request, name: str | None = None) -> dict[str, Any]:
        """A file of it: the body, with its name in the address, or the files of a form."""
        if name is None and not is_form(request.headers):
            raise CTInstructError("Give the file's name in the address: ?name=scan.nii.gz.")
        files, _ = await receive(engine.uploads, upload, request, name)
        return {"file": files[-1] if files else None, "files": files}

    opening = _InTurn(4, engine.limits.waiting)
    if archive is not None:
        add_archive(app, archive, _InTurn(4, engine.limits.waiting))

    @app.post("/api/studies", status_code=201)
    async def open_study(request: Request, name: str | None = None, series: str | None = None) -> dict[str, Any]:
        """Open a study: JSON {"upload": id}, {"sample": seed} or {"pacs": StudyInstanceUID of the archive}, a file as the
        body with its name in the address, or a form with files. `series`, in the JSON, the address or the form, chooses
        where there are several CT series: without it the answer is 300 with `upload` and the list `series`."""
        if name is not None or is_form(request.headers):
            upload = await run_in_threadpool(engine.uploads.new)
            try:
                _, fields = await receive(engine.uploads, upload, request, name)
            except BaseException:
                engine.uploads.drop(upload)
                raise
            wanted: dict[str, Any] = {"upload": upload, "series": series or fields.get("series")}
        else:
            wanted = {"series": series, **await read_json(request, engine.limits.idle_upload)}
            refuse_unknown(wanted, ["upload", "sample", "series", *(["pacs"] if archive else [])])
        chosen = wanted["series"]
        if chosen is not None and (not isinstance(chosen, str) or chosen == "all"):
            raise CTInstructError("series must be a text that names one series.")
        if "sample" in wanted:
            study = await opening(_open_sample, engine, wanted["sample"])
        elif archive is not None and "pacs" in wanted:
            study = await opening(archive.open, wanted["pacs"], chosen)
        elif isinstance(wanted.get("upload"), str):
            study = await opening(engine.open_upload, wanted["upload"], chosen)
        else:
            raise CTInstructError(
                "Give an upload or a sample, or a file with its name in the address: ?name=scan.nii.gz."
            )
        if await request.is_disconnected():  # nobody knows its id
            await run_in_threadpool(engine.close_study, study)
        try:
            return {"study": study, **describe_study(engine.find(study))}
        except KeyError as error:  # it made room for another one before its client knew its id
            raise Busy("Too many studies are opened at once: try again later.") from error

    @app.get("/api/studies/{study}")
    async def one_study(study: str) -> dict[str, Any]:
        return {"study": study, **describe_study(engine.find(study))}

    @app.delete("/api/studies/{study}", status_code=204)
    async def close_study(study: str) -> Response:
        engine.find(study)
        await run_in_threadpool(engine.close_study, study)
        return Response(status_code=204)

    @app.get("/api/studies/{study}/scan.nii", response_class=Response)
    async def scan(study: str) -> _File:
        """The scan, HU, on its own grid."""
        return _File(engine.find(study).folder / "scan.nii", "application/octet-stream")


def _add_downloads(app: FastAPI, engine: Engine) -> None:
    saving = _InTurn(4, engine.limits.waiting)

    @app.get("/api/studies/{study}/masks/{file}", response_class=Response)
    async def mask(study: str, file: str) -> _File:
        """A mask as NIfTI on the scan's own grid."""
        one = engine.find(study)
        if file not in {mask["file"] for mask in one.masks.values()}:
            raise KeyError(file)
        return _File(one.folder / "masks" / file, "application/gzip", file)

    @app.get("/api/studies/{study}/labels.nii", response_class=Response)
    async def labels(study: str) -> _File:
        """All masks as one label map on the scan's own grid; `number` in the results says which value is which structure."""
        return _File(engine.find(study).label_map.path, "application/octet-stream")

    @app.get("/api/studies/{study}/results")
    async def so_far(study: str) -> dict[str, Any]:
        """Everything that came out so far: `report`, `answers`, `diagnosis`, `masks`, `findings`, `fitness`, what a reader
        corrected (`sentences`, `labels`), and the `job` that has not ended."""
        return {**engine.find(study).results(), "job": engine.running(study)}

    @app.get("/api/studies/{study}/results/{file}", response_class=Response)
    async def results(study: str, file: str) -> _File:
        """findings.json, report.txt, report.html or masks.dcm (DICOM SEG) of everything asked so far."""
        media = _DOWNLOADS[file]
        return await saving(_saved, engine.find(study), file, media)


def _saved(one: OpenStudy, file: str, media: str) -> _File:
    """Write the results of a study, in its folder; one of the files."""
    with one.use():
        kinds = ("dicom-seg",) if file == "masks.dcm" else ("nifti",)
        if file == "masks.dcm" and not one.study.results.masks:
            raise CTInstructError("There is no mask yet: mark a structure first.")
        one.study.save(one.folder / "results", output_types=kinds)
        if file == "masks.dcm" and one.study.results.failures:
            raise CTInstructError(one.study.results.failures["dicom-seg"])
        return _File(one.folder / "results" / file, media, file)


def _open_sample(engine: Engine, seed: Any) -> str:
    from ..data.sources.made import made_up_scan

    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 10**9:
        raise CTInstructError("sample must be a whole number, the seed of a made-up scan.")
    return engine.open_source(made_up_scan(seed))


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
    from ..data.names import read_table
    from ..output.report import WINDOWS

    config = engine.model.config
    names = config.structures or list(read_table())
    diseases = set(config.disease_names)
    return {
        "model": Path(str(config.name_or_path or "model")).name,
        "trained": bool(config.trained),
        "notice": " ".join([NOTICE, *notes_on(config)]),
        "disease_lists": dict(config.disease_lists),
        "structures": [name for name in names if name not in diseases and name != "body"],
        "findings": [name for name in names if name in diseases],
        "windows": {name: list(levels) for name, levels in WINDOWS.items()},
        "questions": _questions(diseases),
        "upload_bytes": engine.limits.upload_bytes,
        "studies": engine.limits.studies,
        "version": __version__,
    }


def _questions(findings: Iterable[str]) -> list[str]:
    """Questions that the model was taught, to choose from."""
    from ..data.templates import CAPTION, PRESENCE, WHICH, with_article

    return [CAPTION[3], *(PRESENCE[0].format(article=with_article(name)) for name in findings), WHICH[0]]


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        CTInstructError: where the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # with its protocol: asyncio sets TCP_NODELAY only on sockets that say they are TCP, and without it the answer to each
    # request waits 40 ms for the client's acknowledgement
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise CTInstructError(f"{host}:{port} cannot be used: {error.strerror or error}.") from error
    return listener


def run(
    engine: Engine,
    host: str,
    port: int,
    page: bool = True,
    announce: Callable[[str], None] = print,
    key: str | None = None,
    files: Path | None = None,
    log: Callable[[str], None] | None = None,
    pacs: str | None = None,
) -> None:
    """Serve until interrupted; see `create_app`."""
    import uvicorn

    try:
        listener = listen(host, port)
    except CTInstructError:
        engine.close()
        raise
    shown = f"[{host}]" if ":" in host else host
    # with a key, a page from elsewhere gains nothing by a name of its own
    hosts = ("*",) if key is not None else ("127.0.0.1", "localhost", "[::1]", shown)
    config = uvicorn.Config(
        create_app(engine, hosts, page, key, files, log, pacs), log_level="warning", access_log=False
    )
    try:
        announce(f"http://{shown}:{listener.getsockname()[1]}")
        uvicorn.Server(config).run(sockets=[listener])
    except KeyboardInterrupt:
        pass
    finally:
        engine.close()
        listener.close()


__all__ = ["create_app", "listen", "run"]
