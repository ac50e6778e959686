"""`ctinstruct watch`: new studies of a folder, a DICOMweb server or a DIMSE listener are answered as they arrive."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .shared import hide_progress_bars


def watch(
    request: Annotated[Path, typer.Argument(help="YAML: input, output, send, and what to ask; see docs/hospital.md.")],
    source: Annotated[
        str | None,
        typer.Option("-i", "--input", help="A folder, dicomweb+http(s)://…, or dimse://TITLE@host:port to listen on."),
    ] = None,
    output: Annotated[str | None, typer.Option("-o", "--output", help="Folder of results and of the ledger.")] = None,
    send: Annotated[str | None, typer.Option("--send", help="Where SEG and SR are stored.")] = None,
    once: Annotated[bool, typer.Option("--once", help="End when nothing that is there is left to answer.")] = False,
) -> None:
    """Answer every new study that has become stable, once, and send the results; options come before the file's keys."""
    from ..pacs.orders import read_order
    from ..pacs.watch import watch as run

    hide_progress_bars()
    order = read_order(request, {"input": source, "output": output, "send": send})
    run(order, once=once, log=typer.echo)
