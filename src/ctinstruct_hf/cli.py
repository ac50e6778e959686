"""`ctinstruct …`: parse, call, print; nothing else. Everything heavy is imported inside the commands."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import CTInstructError
from .threads import choose_threads

app = typer.Typer(
    name="ctinstruct",
    help="CTInstruct: ask 3D CT scans in words. Research use only, never a diagnosis.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ModelOption = Annotated[
    str | None, typer.Option("--model", help="A folder or a name on the Hub; the bundled model by default.")
]
RevisionOption = Annotated[
    str | None, typer.Option("--revision", help="Branch, tag or commit of a model on the Hub; its newest by default.")
]
DeviceOption = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1 …; a GPU where there is one.")]
DtypeOption = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16.")]
NamesOption = Annotated[
    Path | None, typer.Option("--names", help="YAML or JSON of your names: 'left kidney: [LK, ren sinister]'.")
]
ChangesOption = Annotated[
    list[str] | None, typer.Option("--set", help="key=value instead of the recipe's; repeatable.")
]
OutputDirOption = Annotated[Path | None, typer.Option("-o", "--output", help="output_dir instead of the recipe's.")]
ResumeOption = Annotated[str | None, typer.Option("--resume", help="A checkpoint; the last whole one by default.")]
RestartOption = Annotated[bool, typer.Option("--restart", help="Begin anew and remove the earlier run.")]
RecipeArgument = Annotated[str, typer.Argument(help="A YAML file, or the name of a bundled recipe.")]
ScoresOption = Annotated[Path | None, typer.Option("--scores", help="scores.json of ctinstruct evaluate.")]
DatasetsOption = Annotated[str | None, typer.Option("--datasets", help="What it was trained on, with commas.")]
BaseModelOption = Annotated[str | None, typer.Option("--base-model", help="What it was made from.")]
LicenseOption = Annotated[str, typer.Option("--license", help="Of the weights.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Show exactly what would go, and send nothing.")]
NotesOption = Annotated[Path | None, typer.Option("--notes", help="A text of your own on data and limits.")]
ThresholdsOption = Annotated[
    str, typer.Option("--thresholds", help="Of diagnosis: validation, a number, or test_set (as released).")
]
SurfaceOption = Annotated[bool, typer.Option("--surface", help="Also NSD and HD95, which take long.")]
WordsOption = Annotated[
    str, typer.Option("--words", help="Words of texts: ascii, unicode, or auto: unicode where the texts need it.")
]


def _quiet() -> None:
    """No bars of Transformers between our own lines."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _shown(status: Any, before: str = "") -> Callable[[str], None]:
    """A callback that shows steps beside the spinner, names with brackets in them as they are."""
    from rich.text import Text

    return lambda step: status.update(Text(before + step))


def _note(text: str) -> Any:
    """A line that begins with a coloured "Note:"."""
    from rich.text import Text

    return Text.assemble(("Note:", "yellow"), f" {text}")


def _split(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


@app.callback()
def options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    context.obj = {"debug": debug}


@app.command()
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")] = Path("demo_output"),
    seed: Annotated[int, typer.Option(help="Which made-up scan.")] = 3,
) -> None:
    """Run the main job on a made-up scan with the bundled model and write a page to look at."""
    from rich.console import Console

    from .demo import run_demo

    _quiet()
    console = Console(stderr=True)
    with console.status("starting") as status:
        study = run_demo(output, seed, tell=_shown(status))
    for note in study.warnings:
        console.print(_note(note))
    typer.echo(f"Research use only. Open {(output / 'results' / 'report.html').resolve()}")


@app.command()
def predict(
    inputs: Annotated[list[Path], typer.Option("-i", "--input", help="A scan, or a folder of scans; repeatable.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")],
    report: Annotated[bool, typer.Option("--report", help="Write a report.")] = False,
    ask: Annotated[list[str] | None, typer.Option("--ask", help="A question in words; repeatable.")] = None,
    segment: Annotated[str | None, typer.Option("--segment", help="Names of structures, with commas.")] = None,
    diagnose: Annotated[
        str | None, typer.Option("--diagnose", help="A list of the model (ct_rate …), names with commas, or all.")
    ] = None,
    output_type: Annotated[
        list[str] | None, typer.Option("--output-type", "-ot", help="nifti, dicom-seg, or both.")
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
    workers: Annotated[int | None, typer.Option("--workers", help="Processes over many scans.")] = None,
    engine: Annotated[str, typer.Option("--engine", help="local, or ray for several machines.")] = "local",
    restart: Annotated[bool, typer.Option("--restart", help="Answer anew what an earlier run has finished.")] = False,
    names: NamesOption = None,
    model: ModelOption = None,
    revision: RevisionOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Ask one or many scans; without --report, --ask, --segment or --diagnose, a report is written.

    Of many, those that an earlier run has finished are kept; results.csv and failures.csv tell about all. Exit code 3: an
    output type could not be written, all others were.
    """
    from rich.console import Console
    from rich.markup import escape

    from .data.names import read_names
    from .inference.predict import Request, find_scans, predict_study

    _quiet()
    request = Request(
        report, list(ask or []), _split(segment), diagnose, tuple(output_type or ("nifti",)), ml, keep_series_uid
    )
    request.report = request.report or request.empty
    reading: dict[str, Any] = {
        "model": model,
        "revision": revision,
        "dtype": dtype,
        "series": series,
        "spacing": _millimetres(spacing),
    }
    reading["names"] = None if names is None else read_names(names)
    devices = _devices(device)
    console = Console(stderr=True)
    with console.status("looking for scans"):
        scans = find_scans(inputs, series)
    if not scans:
        raise CTInstructError(f"{inputs[0]}: there is no scan. {_left_out(scans.skipped)}")
    if scans.skipped:
        console.print(escape(_left_out(scans.skipped)), highlight=False, soft_wrap=True)
    if scans.is_one_study(inputs) and len(scans) > 1 and series is None:
        listed = "; ".join(scan.description for scan in scans)
        raise CTInstructError(
            f"{inputs[0]} holds {len(scans)} CT series: choose by --series (UID, number, part of the description, largest, "
            f"thinnest or all): {listed}."
        )
    if scans.is_one_study(inputs) and len(scans) == 1:
        if len(devices) > 1:
            raise CTInstructError(f"--device names {len(devices)} devices for one scan: give one.")
        with console.status("starting") as status:
            study = predict_study(
                scans[0],
                output,
                request,
                device=devices[0] if devices else None,
                tell=_shown(status, f"{scans[0].path.name}: "),
                **reading,
            )
        for note in study.warnings:
            console.print(_note(f"{scans[0].path.name}: {note}"))
        typer.echo(f"{output / 'report.html'}")
        console.print("Research use only. Not a diagnosis.")
        if study.results.failures:
            raise typer.Exit(3)
        return

    from rich.markup import escape
    from rich.progress import Progress

    from .inference.batch import predict_studies

    with Progress(console=console) as bar:
        task = bar.add_task("scans", total=len(scans))
        outcomes = predict_studies(
            scans,
            output,
            request,
            workers=workers,
            devices=devices,
            engine=engine,
            restart=restart,
            tell=lambda done, total, name: bar.update(task, completed=done, description=escape(name)),
            **reading,
        )
    counts = {
        status: sum(one.status == status for one in outcomes) for status in ("done", "kept", "incomplete", "failed")
    }
    typer.echo(", ".join(f"{count} {status}" for status, count in counts.items() if count))
    for one in outcomes:
        if one.changed:
            console.print(escape(f"{one.study} was answered anew: {one.changed} changed."), highlight=False)
    typer.echo(f"{output / 'results.csv'}")
    console.print("Research use only. Not a diagnosis.")
    failed = [f"{one.study}: {one.error}" for one in outcomes if one.status == "failed"]
    if failed:
        more = f" And {len(failed) - 5} more, see {output / 'failures.csv'}." if len(failed) > 5 else ""
        raise CTInstructError(f"{len(failed)} of {len(scans)} scans failed. " + " ".join(failed[:5]) + more)
    if counts["incomplete"]:
        raise typer.Exit(3)


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
    names = _split(text)
    kind = names[0].split(":")[0] if names else ""
    return [f"{kind}:{name}" if name.isdigit() else name for name in names]


@app.command("app")
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
    model: ModelOption = None,
    revision: RevisionOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """A local page to open a scan, see it, ask, and mark structures; the same as an HTTP interface."""
    try:
        from .app.engine import Engine, Limits
        from .app.server import run
    except ModuleNotFoundError as error:
        raise CTInstructError(f"The page needs {error.name}: pip install 'ctinstruct-hf[app]'.") from error

    _quiet()
    limits = Limits(upload_bytes=int(max_upload * 2**30), studies=studies, waiting=waiting)
    engine = Engine(model, device, dtype, limits, revision)

    def told(address: str) -> None:
        typer.echo(f"Research use only. The page is at {address}" if not api else f"Research use only. {address}/api")
        if host not in ("127.0.0.1", "localhost", "::1"):
            typer.echo("Whoever reaches this address can use it: there is no password.", err=True)
        elif browser and not api and sys.stdout.isatty():
            import webbrowser

            webbrowser.open(address)

    run(engine, host, port, page=not api, told=told)


@app.command()
def convert(
    kind: Annotated[str, typer.Argument(help="What to convert: released (the authors' checkpoint).")],
    source: Annotated[Path, typer.Option("-i", "--input", help="Folder with the safetensors shards.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")],
    tokenizer: Annotated[str | None, typer.Option("--tokenizer", help="Folder of the tokenizer, if elsewhere.")] = None,
) -> None:
    """Bring the authors' released weights into this format."""
    from rich.console import Console

    if kind != "released":
        raise CTInstructError(f"'{kind}' cannot be converted: use released.")
    from .hub.released import convert_released

    with Console(stderr=True).status("reading") as status:
        convert_released(source, output, tokenizer, tell=_shown(status))
    typer.echo(str(output))


data_app = typer.Typer(help="Prepare, check, import and export training data.", no_args_is_help=True)
app.add_typer(data_app, name="data")


@data_app.command()
def prepare(
    source: Annotated[
        str, typer.Argument(help="ct_rate, totalsegmentator, nnunet …; ctinstruct data sources lists them.")
    ],
    folder: Annotated[Path, typer.Option("-i", "--input", help="The data set as downloaded.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write; an interrupted run goes on.")],
    seed: Annotated[int, typer.Option(help="Of phrasings and choices.")] = 0,
    segmentations: Annotated[int, typer.Option(help="Requests for masks a case.")] = 4,
    check_volumes: Annotated[bool, typer.Option("--check-volumes", help="Read every image in full.")] = False,
    workers: Annotated[int | None, typer.Option(help="Processes; all cores by default.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many cases.")] = None,
) -> None:
    """Turn a downloaded data set into rows for both stages."""
    from rich.console import Console
    from rich.progress import Progress

    from .data.prepare import PrepareOptions
    from .data.prepare import prepare as run

    options = PrepareOptions(seed, segmentations, check_volumes)
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(source, total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        told = run(source, folder, output, options, workers, limit, show)
    _tell_rows(told["rows"])
    if told["problems"]:
        typer.echo(f"{told['problems']} cases could not be used: see {output / 'problems.jsonl'}")


@data_app.command()
def sources() -> None:
    """The data sets that can be prepared."""
    from .data.sources import SOURCES

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

    from .data.check import check

    console = Console(stderr=True)
    with console.status("reading") as status:
        found = check(folder, volumes, _shown(status))
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
    from .data.prepared import export_jsonl

    typer.echo(f"{export_jsonl(folder, output, _kind(kind))} rows in {output}")


@data_app.command("import")
def import_data(
    file: Annotated[Path, typer.Option("-i", "--input", help="A JSONL file.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")],
    kind: Annotated[str, typer.Option(help="instructions or alignment.")] = "instructions",
    root: Annotated[
        Path | None, typer.Option("--root", help="Folder that its files lie in; the JSONL file's own by default.")
    ] = None,
) -> None:
    """A JSONL file of your own as a prepared data set."""
    from .data.prepared import import_jsonl

    typer.echo(f"{import_jsonl(file, output, _kind(kind), root)} rows in {output}")


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

    from .data.share import share

    with Console(stderr=True).status("reading") as status:
        counts = share(
            folder, repository, root, private=not public, license=license, dry_run=dry_run, tell=_shown(status)
        )
    _tell_rows(counts)
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
    from .data.share import fetch

    _tell_rows(fetch(repository, output, root, mapping))


def _tell_rows(counts: dict[str, dict[str, int]]) -> None:
    for kind, splits in counts.items():
        typer.echo(f"{kind}: " + (", ".join(f"{split} {count}" for split, count in sorted(splits.items())) or "none"))


def _kind(kind: str) -> str:
    if kind not in ("instructions", "alignment"):
        raise CTInstructError(f"--kind is '{kind}': use instructions or alignment.")
    return kind


@app.command()
def pretrain(
    context: typer.Context,
    recipe: RecipeArgument = "tiny",
    changes: ChangesOption = None,
    output: OutputDirOption = None,
    resume: ResumeOption = None,
    restart: RestartOption = False,
    table: Annotated[
        int | None, typer.Option("--table", help="3, 4 or 5: the paper's ablation in miniature instead of one run.")
    ] = None,
    row: Annotated[
        str | None, typer.Option("--row", help="One row of those tables for any recipe, as 'ITC + Seg.' or ViT3D.")
    ] = None,
) -> None:
    """Stage one: align images with text at three grains. Goes on where an interrupted run stopped."""
    from .train.recipe import read_recipe

    if table is not None:
        _refuse_beside(context, "--table", "row", "resume", "restart")
    told = read_recipe(recipe if table is None or recipe != "tiny" else "miniature", changes or [])
    if output is not None:
        told["output_dir"] = str(output)
    if table is not None:
        from .train.tables import run_table

        typer.echo(run_table(table, told))
        return
    from .train.pretrain import pretrain as run

    if row is not None:
        from .train.tables import recipe_of_row

        told = recipe_of_row(told, row)
    for name, value in run(told, resume, restart).items():
        typer.echo(f"{name} {value:.4f}")
    typer.echo(f"The model is in {Path(told['output_dir']) / 'model'}.")


@app.command()
def instruct(
    recipe: RecipeArgument = "tiny",
    changes: ChangesOption = None,
    vision: Annotated[
        Path | None, typer.Option("--vision", help="Folder of a stage-one model instead of the recipe's.")
    ] = None,
    output: OutputDirOption = None,
    resume: ResumeOption = None,
    restart: RestartOption = False,
) -> None:
    """Stage two: tune on instructions. Goes on where an interrupted run stopped."""
    from rich.console import Console

    from .train.instruct import instruct as run
    from .train.recipe import INSTRUCT, read_recipe

    told = read_recipe(recipe, changes or [], INSTRUCT)
    if output is not None:
        told["output_dir"] = str(output)
    if vision is not None:
        told["vision"] = str(vision)
    console = Console(stderr=True)
    metrics = run(told, resume, restart, tell=lambda step: console.print(step, highlight=False, markup=False))
    for name, value in metrics.items():
        typer.echo(f"{name} {value:.4f}")
    typer.echo(f"The model is in {Path(told['output_dir']) / 'model'}.")


# of `evaluate`: what only matters where a model is run
RUN_PARAMETERS = ("model", "revision", "tasks", "split", "limit", "batch_size", "max_new_tokens", "device", "dtype")


@app.command()
def evaluate(
    context: typer.Context,
    model: ModelOption = None,
    revision: RevisionOption = None,
    data: Annotated[
        str | None, typer.Option("--data", help="A prepared folder, a JSONL file, or phantoms:trunk:900000-900040.")
    ] = None,
    predictions: Annotated[
        Path | None, typer.Option("--predictions", help="Score this file instead of running a model.")
    ] = None,
    converter: Annotated[
        str | None, typer.Option("--from", help="The file is m3d's, radfm's, ct_chat's or released's own.")
    ] = None,
    references: Annotated[
        Path | None, typer.Option("--references", help="Right answers, where such a file has none (ct_chat).")
    ] = None,
    dataset: Annotated[str, typer.Option("--dataset", help="Name of the data in such a file, as ct_rate.")] = "",
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write; an interrupted run goes on.")] = Path(
        "evaluation"
    ),
    tasks: Annotated[str | None, typer.Option("--tasks", help="With commas; all that there are by default.")] = None,
    split: Annotated[
        str | None,
        typer.Option("--split", help="train, validation or test; by default test, or validation without one."),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Samples of each task.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Questions answered at once.")] = 4,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Of an answer.")] = 512,
    thresholds: ThresholdsOption = "validation",
    surface: SurfaceOption = False,
    words: WordsOption = "auto",
    vlm3d: Annotated[Path | None, typer.Option("--vlm3d", help="Also write the reports as a VLM3D submission.")] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Run a model over data and score it, or score the predictions of any system."""
    from rich.console import Console

    from .evaluation.converters import convert_predictions
    from .evaluation.page import write_comparison, write_scores
    from .evaluation.predictions import read_predictions, write_predictions
    from .evaluation.run import RunOptions, run_model
    from .evaluation.scoring import parse_thresholds, score_predictions

    if (data is None) == (predictions is None):
        raise CTInstructError("Give either --data (and --model) or --predictions.")
    if data is not None:
        _refuse_beside(context, "--data", "converter", "references", "dataset")
    else:
        _refuse_beside(context, "--predictions", *RUN_PARAMETERS)
    if converter is None:
        _refuse_beside(context, "a file of predictions without --from", "references", "dataset")
    limits = parse_thresholds(thresholds)
    _quiet()
    with Console(stderr=True).status("starting") as status:
        if data is not None:
            from .hub.models import BUNDLED_MODEL

            options = RunOptions(
                tuple(_split(tasks)), split or "", limit, batch_size, max_new_tokens, limits == "validation"
            )
            file = run_model(
                model or str(BUNDLED_MODEL),
                data,
                output,
                options,
                device=device,
                dtype=dtype,
                revision=revision,
                tell=_shown(status),
            )
            if not is_main_process():
                return
            found = read_predictions(file)
        elif converter is not None:
            assert predictions is not None
            found = convert_predictions(converter, predictions, references, dataset)
            write_predictions(found, output / "predictions.jsonl")
        else:
            assert predictions is not None
            found = read_predictions(predictions)
        scores = score_predictions(found, limits, surface=surface, tokenizer=words, tell=_shown(status))
        tables = write_comparison([scores], output / "page")
        write_scores(scores, output / "scores.json")
    for table in tables:
        typer.echo(table.markdown())
    if found.failed:
        typer.echo(f"{len(found.failed)} samples failed: " + ", ".join(record.id for record in found.failed[:20]))
    if vlm3d is not None:
        from .evaluation.challenge import write_submission

        typer.echo(f"{write_submission(found, vlm3d)} reports in {vlm3d}")
    typer.echo(f"Research use only. Open {(output / 'page' / 'index.html').resolve()}")


def _refuse_beside(context: typer.Context, option: str, *ignored: str) -> None:
    """Raises CTInstructError for parameters that were given although `option` leaves no use for them."""
    given = [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name in ignored
        and getattr(context.get_parameter_source(parameter.name), "name", "") == "COMMANDLINE"
    ]
    if given:
        raise CTInstructError(f"{', '.join(given)} has no effect beside {option}: leave it out.")


@app.command()
def calibrate(
    model: Annotated[Path, typer.Option("--model", help="Folder of a stage-two model; its processor is changed.")],
    data: Annotated[
        str, typer.Option("--data", help="As for evaluate, with masks: a folder, or phantoms:trunk:0-120.")
    ],
    split: Annotated[
        str, typer.Option("--split", help="train, validation or test; never what is scored later.")
    ] = "train",
    limit: Annotated[int | None, typer.Option("--limit", help="Scans.")] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Find when a mask is to be left empty, on scans whose truth is known, and write it into the model's processor."""
    from rich.console import Console

    from .data.samples import from_row
    from .evaluation.floors import find_floors, write_floors
    from .evaluation.run import load_data
    from .inference.study import load_model

    _quiet()
    if not model.is_dir():
        raise CTInstructError(f"--model {model} is no folder: calibrate writes into the model's processor.")
    with Console(stderr=True).status("starting") as status:
        network, processor = load_model(str(model), device, dtype)
        rows = load_data(data, "alignment", split)[:limit]
        if not any(row["masks"] for row in rows):
            raise CTInstructError(f"{data} has no sample of split {split} with a mask: nothing to learn a floor from.")
        floors = find_floors(network, processor, (from_row(row, "alignment") for row in rows), _shown(status))  # type: ignore[misc]
        write_floors(model, floors)
        processor.image_processor.mask_floors = floors  # this process may have it loaded
    for name, (least, level) in sorted(floors.items()):
        typer.echo(f"{name}: empty unless more than {least:g} mL have a logit above {level:g}")
    typer.echo(f"{len(floors)} structures of {len(rows)} scans have a floor in {model}")


def is_main_process() -> bool:
    """Whether this is the first of several processes, or the only one."""
    from accelerate import PartialState

    return bool(PartialState().is_main_process)


@app.command()
def compare(
    files: Annotated[list[Path], typer.Argument(help="Files of predictions; the first is compared with the others.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")] = Path("comparison"),
    thresholds: ThresholdsOption = "validation",
    surface: SurfaceOption = False,
    words: WordsOption = "auto",
    pictures: Annotated[bool, typer.Option(help="Dice by structure, ROC curves, reliability.")] = True,
) -> None:
    """Tables 3 to 8 of the paper with these systems beside its rows: Markdown, LaTeX, CSV, pictures, one page."""
    from rich.console import Console

    from .evaluation.page import write_comparison
    from .evaluation.predictions import check_same, read_predictions
    from .evaluation.scoring import parse_thresholds, score_predictions

    limits = parse_thresholds(thresholds)
    found = [read_predictions(file) for file in files]
    names = [one.system for one in found]
    for place, one in enumerate(found):  # systems of one name are told apart by their files
        if names.count(one.system) > 1:
            one.system = f"{one.system} ({files[place].parent.name or files[place].stem})"
    for other in found[1:]:
        keys = [{(record.task, record.dataset) for record in one.records} for one in (found[0], other)]
        check_same(found[0], other, sorted(keys[0] & keys[1]))
    with Console(stderr=True).status("scoring") as status:
        scores = [
            score_predictions(one, limits, surface=surface, tokenizer=words, tell=_shown(status)) for one in found
        ]
        tables = write_comparison(scores, output, pictures)
    for table in tables:
        typer.echo(table.markdown())
    typer.echo(f"Research use only. Open {(output / 'index.html').resolve()}")


@app.command()
def card(
    folder: Annotated[Path, typer.Argument(help="A saved model.")],
    scores: ScoresOption = None,
    name: Annotated[str | None, typer.Option("--name", help="As on the Hub; the folder's name by default.")] = None,
    datasets: DatasetsOption = None,
    base_model: BaseModelOption = None,
    license: LicenseOption = "apache-2.0",
    notes: NotesOption = None,
) -> None:
    """Write the model card of a folder, with the numbers of an evaluation."""
    from .hub.card import make_card, write_card

    own = "" if notes is None else _text_of(notes)
    text = make_card(
        folder, scores, name=name, datasets=_split(datasets), base_model=base_model, license=license, notes=own
    )
    typer.echo(str(write_card(folder, text)))


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CTInstructError(f"{path} cannot be read as text.") from error


@app.command()
def publish(
    folder: Annotated[Path, typer.Argument(help="A saved model.")],
    repository: Annotated[str, typer.Argument(help="user/name on the Hub.")],
    scores: ScoresOption = None,
    datasets: DatasetsOption = None,
    base_model: BaseModelOption = None,
    license: LicenseOption = "apache-2.0",
    notes: NotesOption = None,
    public: Annotated[bool, typer.Option("--public", help="Everybody may see it; private by default.")] = False,
    dry_run: DryRunOption = False,
) -> None:
    """Put a model, its processor, code files and card on the Hub in one commit."""
    from rich.console import Console

    from .hub.card import make_card
    from .hub.publish import check_repository, make_plan
    from .hub.publish import publish as send

    check_repository(repository)
    own = "" if notes is None else _text_of(notes)
    text = make_card(
        folder, scores, name=repository, datasets=_split(datasets), base_model=base_model, license=license, notes=own
    )
    plan = make_plan(folder, text)
    for name, size in plan.files:
        typer.echo(f"{size:>14,}  {name}")
    typer.echo(f"{plan.size:>14,}  bytes to {repository}, {'public' if public else 'private'}")
    if plan.left:
        typer.echo(f"stays here: {', '.join(plan.left)}")
    if dry_run:
        typer.echo(text)
        return
    with Console(stderr=True).status("starting") as status:
        typer.echo(send(folder, repository, plan, private=not public, tell=_shown(status)))


@app.command()
def doctor() -> None:
    """Versions, devices, memory, optional parts, and a self-test; exit code 1 where something is broken."""
    from .doctor import examine

    _quiet()
    broken = False
    for finding in examine():
        broken = broken or finding.fails
        advice = f"   -> {finding.advice}" if finding.advice else ""
        typer.echo(f"{finding.topic:26s} {finding.found}{advice}")
    if broken:
        raise typer.Exit(1)


def spread(arguments: list[str]) -> list[str]:
    """`--output-type nifti dicom-seg` as two options, as radiology tools write it."""
    spread_out: list[str] = []
    option = ""
    for argument in arguments:
        if option and argument in ("nifti", "dicom-seg") and spread_out[-1] != option:
            spread_out.append(option)
        spread_out.append(argument)
        if argument in ("--output-type", "-ot"):
            option = argument
        elif argument not in ("nifti", "dicom-seg"):
            option = ""
    return spread_out


def main() -> None:
    """Entry point: an error of ours is one sentence and exit code 2."""
    debug = "--debug" in sys.argv[1:]
    choose_threads()
    try:
        app(args=spread(sys.argv[1:]))
    except CTInstructError as error:
        if debug:
            raise
        print(f"ctinstruct: {error}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        from .files import why_unwritable

        told = why_unwritable(error)
        if debug or told is None:
            raise
        print(f"ctinstruct: {told}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
