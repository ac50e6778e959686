"""`ctinstruct data …`: prepare, check, import and export training data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import CTInstructError
from .shared import DryRunOption, show_steps

if TYPE_CHECKING:
    from ..data.prepare import PrepareOptions

data_app = typer.Typer(help="Prepare, check, import and export training data.", no_args_is_help=True)


@data_app.command()
def prepare(
    source: Annotated[
        str, typer.Argument(help="ct_rate, totalsegmentator, nnunet …; ctinstruct data sources lists them.")
    ],
    folder: Annotated[
        Path,
        typer.Option("-i", "--input", help="The data set as downloaded; of scans that are made, which: trunk:0-700."),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write; an interrupted run goes on.")],
    seed: Annotated[int, typer.Option(help="Of phrasings and choices.")] = 0,
    segmentations: Annotated[int, typer.Option(help="Requests for masks a case.")] = 4,
    check_volumes: Annotated[bool, typer.Option("--check-volumes", help="Read every image in full.")] = False,
    workers: Annotated[int | None, typer.Option(help="Processes; all cores by default.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many cases.")] = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Only say, from a few cases, how large it gets and how long it takes.")
    ] = False,
) -> None:
    """Turn a downloaded data set into rows for both stages."""
    from rich.console import Console
    from rich.progress import Progress

    from ..data.prepare import PrepareOptions
    from ..data.prepare import prepare as run

    options = PrepareOptions(seed, segmentations, check_volumes)
    if estimate:
        _print_estimate(source, folder, options, workers, limit)
        return
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(source, total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        summary = run(source, folder, output, options, workers, limit, show)
    _print_rows(summary["rows"])
    if summary["problems"]:
        typer.echo(f"{summary['problems']} cases could not be used: see {output / 'problems.jsonl'}")


def _print_estimate(source: str, folder: Path, options: PrepareOptions, workers: int | None, limit: int | None) -> None:
    from rich.console import Console

    from ..data.estimate import estimate

    with Console(stderr=True).status("trying a few cases"):
        found = estimate(source, folder, options, workers, limit)
    typer.echo(
        f"{found.cases} cases, {found.tried} tried"
        + (f", {found.failed} of these cannot be used" if found.failed else "")
        + (f"; {found.unusable} more have no files or no labels" if found.unusable else "")
    )
    typer.echo(f"rows: {_size(found.rows_bytes)}, {_duration(found.seconds)}")
    typer.echo(
        f"cache of patches, filled by the first epoch, at the paper's patch size: {_size(found.cache_bytes)}, "
        f"{_duration(found.cache_seconds)}"
    )


def _size(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    hours, minutes = seconds / 3600, seconds / 60
    return f"{hours:.1f} h" if hours >= 1 else f"{minutes:.0f} min" if minutes >= 1 else f"{seconds:.1f} s"


@data_app.command()
def sources() -> None:
    """The data sets that can be prepared."""
    from ..data.sources import SOURCES

    for name, cases in SOURCES.items():
        typer.echo(f"{name:18}{(cases.__doc__ or '').splitlines()[0]}")


@data_app.command("check")
def check_data(
    folder: Annotated[Path, typer.Argument(help="A prepared data set, or a JSONL file of instructions.")],
    volumes: Annotated[bool, typer.Option("--volumes", help="Read every volume too.")] = False,
) -> None:
    """Counts, label balance, missing files, broken volumes, patients in two splits; exit code 1 where something is wrong."""
    from rich.console import Console
    from rich.table import Table

    from ..data.check import check

    console = Console(stderr=True)
    with console.status("reading") as status:
        found = check(folder, volumes, show_steps(status))
    out = Console(highlight=False, markup=False)
    table = Table("kind", "source", "task", "split", "rows")
    for (kind, source, task, split), count in sorted(found.counts.items()):
        table.add_row(kind, source, task, split, str(count))
    out.print(table)
    if found.labels:
        table = Table("kind", "label", "present", "absent", "unknown")
        for (kind, name), values in found.labels.items():
            table.add_row(kind, name, str(values[1]), str(values[0]), str(values[-1]))
        out.print(table)
    for title, lines in (
        ("faults", found.faults),
        ("missing files", found.missing),
        ("broken volumes", [f"{path}: {why}" for path, why in found.broken.items()]),
        ("patients in two splits", [f"{patient}: {', '.join(splits)}" for patient, splits in found.leaks.items()]),
    ):
        typer.echo(f"{title}: {len(lines) or 'none'}")
        for line in lines[:20]:
            typer.echo(f"  {line}")
    if not found.sound:
        raise typer.Exit(1)


@data_app.command("export")
def export_data(
    folder: Annotated[Path, typer.Option("-i", "--input", help="A prepared data set.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="JSONL file to write.")],
    kind: Annotated[str, typer.Option(help="instructions or alignment.")] = "instructions",
) -> None:
    """Rows as JSONL, one a line."""
    from ..data.prepared import export_jsonl

    typer.echo(f"{export_jsonl(folder, output, _kind(kind))} rows in {output}")


@data_app.command("import")
def import_data(
    source: Annotated[
        Path,
        typer.Option(
            "-i",
            "--input",
            help="CSV, JSONL or Parquet with a path, a report, labels a row; a set of datasets with messages and images; a "
            "folder of NIfTI with masks.",
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")],
    kind: Annotated[
        str, typer.Option(help="Of JSONL that ctinstruct data export wrote: instructions or alignment.")
    ] = "instructions",
    root: Annotated[
        Path | None, typer.Option("--root", help="Folder that the files lie in; that of -i by default.")
    ] = None,
) -> None:
    """Data of your own as a prepared data set."""
    from rich.console import Console

    from ..data.importing import import_own

    console = Console(stderr=True)
    with console.status("reading") as status:
        summary = import_own(source, output, _kind(kind), root, show_steps(status))
    _print_rows(summary["rows"])
    count = sum(number for splits in summary["rows"].values() for number in splits.values())
    typer.echo(f"{count} rows in {output}")
    for note in summary["notes"]:
        typer.echo(note)
    if summary["problems"]:
        typer.echo(f"{summary['problems']} cases could not be used: see {output / 'problems.jsonl'}")


@data_app.command("publish")
def publish_data(
    folder: Annotated[Path, typer.Argument(help="A prepared data set.")],
    repository: Annotated[str, typer.Argument(help="user/name on the Hub.")],
    root: Annotated[
        Path | None, typer.Option("--root", help="Folder of the scans, which the rows' paths become relative to.")
    ] = None,
    license: Annotated[str, typer.Option("--license", help="Of the rows.")] = "other",
    public: Annotated[bool, typer.Option("--public", help="Everybody may see it; private by default.")] = False,
    dry_run: DryRunOption = False,
) -> None:
    """Put the rows of a data set on the Hub; scans and label files stay here, ids, patients and paths become numbers."""
    from rich.console import Console

    from ..data.share import share

    with Console(stderr=True).status("reading") as status:
        counts = share(
            folder, repository, root, private=not public, license=license, dry_run=dry_run, progress=show_steps(status)
        )
    _print_rows(counts)
    typer.echo(f"{'would go' if dry_run else 'sent'} to {repository}, {'public' if public else 'private'}")


@data_app.command("fetch")
def fetch_data(
    repository: Annotated[str, typer.Argument(help="user/name on the Hub, sent by ctinstruct data publish.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")],
    root: Annotated[Path | None, typer.Option("--root", help="Folder of the scans here.")] = None,
    mapping: Annotated[
        Path | None, typer.Option("--mapping", help="published.json of who sent the rows: the files' names.")
    ] = None,
) -> None:
    """Rows from the Hub as a prepared data set with the paths of this machine."""
    from ..data.share import fetch

    _print_rows(fetch(repository, output, root, mapping))


def _print_rows(counts: dict[str, dict[str, int]]) -> None:
    for kind, splits in counts.items():
        typer.echo(f"{kind}: " + (", ".join(f"{split} {count}" for split, count in sorted(splits.items())) or "none"))


def _kind(kind: str) -> str:
    if kind not in ("instructions", "alignment"):
        raise CTInstructError(f"--kind is '{kind}': use instructions or alignment.")
    return kind
