"""`ctinstruct predict`: one scan or many."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import CTInstructError
from ..output.types import NOTICE, OUTPUT_TYPES
from .shared import (
    DeviceOption,
    DtypeOption,
    ModelOption,
    NamesOption,
    NumBeamsOption,
    QuantizeOption,
    RevisionOption,
    as_note,
    fetch_model,
    hide_progress_bars,
    show_steps,
    split_names,
)

if TYPE_CHECKING:
    from rich.console import Console

    from ..inference.predict import Request
    from ..inference.scans import Scan, Scans
    from ..pacs.addresses import Address

_OF_BATCHES = ("devices", "workers", "engine", "restart")


def predict(
    inputs: Annotated[
        list[str],
        typer.Option(
            "-i", "--input", help="A scan, a folder of scans, or dicomweb+http(s)://…/studies/UID; repeatable."
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")],
    report: Annotated[bool, typer.Option("--report", help="Write a report.")] = False,
    ask: Annotated[list[str] | None, typer.Option("--ask", help="A question in words; repeatable.")] = None,
    segment: Annotated[str | None, typer.Option("--segment", help="Names of structures, with commas.")] = None,
    diagnose: Annotated[
        str | None, typer.Option("--diagnose", help="A list of the model (ct_rate …), names with commas, or all.")
    ] = None,
    findings: Annotated[
        bool,
        typer.Option(
            "--findings", help="The table of findings with its masks; --report with --diagnose makes the table alone."
        ),
    ] = False,
    consensus: Annotated[
        int,
        typer.Option("--consensus", min=1, max=64, help="Drafts of the report, of which the most consistent is kept."),
    ] = 1,
    output_type: Annotated[
        list[str] | None, typer.Option("--output-type", "-ot", help=f"{', '.join(OUTPUT_TYPES)}; repeatable.")
    ] = None,
    ml: Annotated[
        bool, typer.Option("--ml", help="All structures in one label file, but those that overlap others.")
    ] = False,
    keep_series_uid: Annotated[
        bool, typer.Option("--keep-series-uid", help="Keep the SeriesInstanceUID in findings.json.")
    ] = False,
    series: Annotated[
        str | None,
        typer.Option(
            "--series", help="Of several CT series: UID, number, part of the description, largest, thinnest, all."
        ),
    ] = None,
    spacing: Annotated[str | None, typer.Option("--spacing", help="mm depth,height,width, for files without.")] = None,
    send: Annotated[
        str | None,
        typer.Option(
            "--send", help="Store SEG and SR at dicomweb+http(s)://host:port/path or dimse://TITLE@host:port."
        ),
    ] = None,
    workers: Annotated[int | None, typer.Option("--workers", help="Processes over many scans.")] = None,
    engine: Annotated[str, typer.Option("--engine", help="local, or ray for several machines.")] = "local",
    restart: Annotated[bool, typer.Option("--restart", help="Answer anew what an earlier run has finished.")] = False,
    names: NamesOption = None,
    model: ModelOption = None,
    revision: RevisionOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    quantize: QuantizeOption = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", min=1, help="Of a report (512) and of an answer (256).")
    ] = None,
    num_beams: NumBeamsOption = 1,
) -> None:
    """Ask one or many scans; without --report, --ask, --segment, --diagnose or --findings, a report is written.

    Of many, those that an earlier run has finished are kept; results.csv and failures.csv tell about all. Exit code 3: an
    output type could not be written, all others were.
    """
    from rich.console import Console

    from ..data.names import read_names
    from ..files import remove_left_over
    from ..inference.predict import Request
    from ..pacs.addresses import parse_address
    from ..pacs.transfer import local_inputs, with_sent_types

    hide_progress_bars()
    remove_left_over()
    destination = None if send is None else parse_address(send)
    output_types = tuple(output_type or ("nifti",))
    if destination is not None:
        output_types = with_sent_types(output_types)
    request = Request(
        report, list(ask or []), split_names(segment), diagnose, output_types, ml, keep_series_uid,
        findings=findings, consensus=consensus,
    )  # fmt: skip
    request.report = request.report or request.empty
    if max_new_tokens is not None:
        request.generation["max_new_tokens"] = max_new_tokens
    if num_beams != 1:
        request.generation["num_beams"] = num_beams
    reading: dict[str, Any] = {
        "model": model,
        "revision": revision,
        "dtype": dtype,
        "quantize": quantize,
        "series": series,
        "spacing": _millimetres(spacing),
        "names": None if names is None else read_names(names),
    }
    reading |= {"devices": _devices(device), "workers": workers, "engine": engine, "restart": restart}
    console = Console(stderr=True)
    with console.status("looking for scans") as status, local_inputs(inputs, show_steps(status)) as paths:
        status.stop()
        complete = _predict_paths(console, paths, output, request, reading, destination)
    if not complete:
        raise typer.Exit(3)


def _predict_paths(
    console: Console, paths: list[Path], output: Path, request: Request, options: dict[str, Any], send: Address | None
) -> bool:
    """Whether every output type of all scans was written."""
    from rich.markup import escape

    from ..inference.predict import find_scans

    series, devices = options["series"], options["devices"]
    with console.status("looking for scans"):
        scans = find_scans(paths, series)
    if not scans:
        raise CTInstructError(f"{paths[0]}: there is no scan. {_left_out(scans.skipped)}")
    if scans.skipped:
        console.print(escape(_left_out(scans.skipped)), highlight=False, soft_wrap=True)
    if scans.is_one_study(paths) and len(scans) > 1 and series is None:
        listed = "; ".join(scan.description for scan in scans)
        raise CTInstructError(
            f"{paths[0]} holds {len(scans)} CT series: choose by --series (UID, number, part of the description, largest, "
            f"thinnest or all): {listed}."
        )
    if not (scans.is_one_study(paths) and len(scans) == 1):
        return _predict_scans(console, scans, output, request, options, send)
    if len(devices) > 1:
        raise CTInstructError(f"--device names {len(devices)} devices for one scan: give one.")
    reading = {key: value for key, value in options.items() if key not in _OF_BATCHES}
    reading["device"] = devices[0] if devices else None
    return _predict_scan(console, scans[0], output, request, reading, send)


def _predict_scan(
    console: Console, scan: Scan, output: Path, request: Request, options: dict[str, Any], send: Address | None
) -> bool:
    """Whether every output type of the only scan was written."""
    from ..inference.predict import predict_study

    with console.status("starting") as status:
        study = predict_study(scan, output, request, tell=show_steps(status, f"{scan.path.name}: "), **options)
    for note in study.warnings:
        console.print(as_note(f"{scan.path.name}: {note}"))
    if send is not None:
        _send(console, output, send)
    typer.echo(f"{output / 'report.html'}")
    console.print(NOTICE)
    return not study.results.failures


def _predict_scans(
    console: Console, scans: Scans, output: Path, request: Request, options: dict[str, Any], send: Address | None
) -> bool:
    """Whether every output type of all scans was written; raises CTInstructError where scans failed."""
    from rich.markup import escape
    from rich.progress import Progress

    from ..inference.batch import predict_studies

    fetch_model(console, options["model"], options["revision"])
    with Progress(console=console) as bar:
        task = bar.add_task("scans", total=len(scans))

        def show(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, description=escape(name))

        outcomes = predict_studies(scans, output, request, tell=show, **options)
    counts = Counter(outcome.status for outcome in outcomes)
    order = ("done", "kept", "incomplete", "failed")
    typer.echo(", ".join(f"{counts[status]} {status}" for status in order if counts[status]))
    for outcome in outcomes:
        if outcome.changed:
            console.print(escape(f"{outcome.study} was answered anew: {outcome.changed} changed."), highlight=False)
    if send is not None:
        for outcome in outcomes:
            if outcome.status != "failed":
                _send(console, output / outcome.study, send)
    typer.echo(f"{output / 'results.csv'}")
    console.print(NOTICE)
    failed = [f"{outcome.study}: {outcome.error}" for outcome in outcomes if outcome.status == "failed"]
    if failed:
        more = f" And {len(failed) - 5} more, see {output / 'failures.csv'}." if len(failed) > 5 else ""
        raise CTInstructError(f"{len(failed)} of {len(scans)} scans failed. " + " ".join(failed[:5]) + more)
    return not counts["incomplete"]


def _send(console: Console, folder: Path, address: Address) -> None:
    """Store the DICOM objects of a folder of results."""
    from rich.markup import escape

    from ..pacs.transfer import result_files, send

    files = result_files(folder)
    try:
        send(files, address)
    except CTInstructError as error:
        raise CTInstructError(f"{error} The results are in {folder}; the same command sends them again.") from error
    console.print(escape(f"{len(files)} objects were stored at {address.server}."), highlight=False, soft_wrap=True)


def _left_out(skipped: list[tuple[Path, str]], most: int = 5) -> str:
    """What is no scan, in a line."""
    lines = [f"{path.name}: {reason.rstrip('.')}" for path, reason in skipped[:most]]
    more = f"; and {len(skipped) - most} more" if len(skipped) > most else ""
    return f"Left out: {'; '.join(lines)}{more}." if lines else ""


def _millimetres(spacing: str | None) -> tuple[float, float, float] | None:
    if spacing is None:
        return None
    try:
        depth, height, width = (float(value) for value in spacing.split(","))
    except ValueError as error:
        raise CTInstructError(f"--spacing is '{spacing}': give three numbers in mm, as 2.5,0.7,0.7.") from error
    return depth, height, width


def _devices(text: str | None) -> list[str]:
    """cuda:0,1 -> cuda:0, cuda:1."""
    names = split_names(text)
    device_type = names[0].split(":")[0] if names else ""
    return [f"{device_type}:{name}" if name.isdigit() else name for name in names]
