"""`ctinstruct app`: the local page and its HTTP interface."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import CTInstructError
from .shared import (
    DeviceOption,
    DtypeOption,
    ModelOption,
    NamesOption,
    QuantizeOption,
    RevisionOption,
    fetch_model,
    hide_progress_bars,
)

LOOPBACK = ("127.0.0.1", "localhost", "::1")  # this computer only


def serve(
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; this computer only by default.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="0 takes a free one.")] = 7860,
    api: Annotated[bool, typer.Option("--api", help="The HTTP interface only, without the page.")] = False,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page.")] = True,
    max_upload: Annotated[float, typer.Option("--max-upload", help="GiB of the files of one study.")] = 2.0,
    studies: Annotated[int, typer.Option("--studies", help="Open at once.")] = 4,
    waiting: Annotated[int, typer.Option("--waiting", help="Questions in the line before more are refused.")] = 16,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key", envvar="CTINSTRUCT_API_KEY", help="Serve nothing without it; needed beyond this computer."
        ),
    ] = None,
    files: Annotated[
        Path | None, typer.Option("--files", help="Folder of scans that chats may name by file://.")
    ] = None,
    pacs: Annotated[
        str | None,
        typer.Option("--pacs", help="Archive that studies may be opened from: dicomweb+https://host:port/path."),
    ] = None,
    log_jobs: Annotated[bool, typer.Option("--log-jobs", help="A line of JSON for every job, without names.")] = False,
    names: NamesOption = None,
    model: ModelOption = None,
    revision: RevisionOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    quantize: QuantizeOption = None,
) -> None:
    """A local page to open a scan, see it, ask, and mark structures; the same as an HTTP interface."""
    if host not in LOOPBACK and not api_key:
        raise CTInstructError(
            f"--host {host} can be reached from other computers: set CTINSTRUCT_API_KEY or --api-key, without which nothing "
            "is served there."
        )
    if files is not None and not files.is_dir():
        raise CTInstructError(f"--files {files} is no folder.")
    try:
        from ..app.archive import archive_address
        from ..app.engine import Engine, Limits
        from ..app.server import run
    except ModuleNotFoundError as error:
        raise CTInstructError(f"The page needs {error.name}: pip install 'ctinstruct-hf[app]'.") from error

    from rich.console import Console

    from ..data.names import read_names

    if pacs is not None:
        archive_address(pacs)  # refused before a model is loaded
    hide_progress_bars()
    fetch_model(Console(stderr=True), model, revision)
    limits = Limits(upload_bytes=int(max_upload * 2**30), studies=studies, waiting=waiting)
    engine = Engine(model, device, dtype, limits, revision, None if names is None else read_names(names), quantize)

    def announce(address: str) -> None:
        page = f"{address}/?key=…" if api_key else address
        typer.echo(
            f"Research use only. {address}/v1 and {address}/api" if api else f"Research use only. The page is at {page}"
        )
        if host in LOOPBACK and not api_key and browser and not api and sys.stdout.isatty():
            import webbrowser

            webbrowser.open(address)

    log = (lambda line: typer.echo(line, err=True)) if log_jobs else None
    run(engine, host, port, page=not api, announce=announce, key=api_key or None, files=files, log=log, pacs=pacs)
