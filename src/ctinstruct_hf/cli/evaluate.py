"""`ctinstruct evaluate`, `calibrate` and `compare`: scores of models and of predictions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import CTInstructError
from .shared import (
    DeviceOption,
    DtypeOption,
    ModelOption,
    NumBeamsOption,
    QuantizeOption,
    RevisionOption,
    hide_progress_bars,
    refuse_beside,
    show_steps,
    split_names,
)

if TYPE_CHECKING:
    from ..evaluation.predictions import Predictions
    from ..evaluation.tables import Table

ThresholdsOption = Annotated[
    str, typer.Option("--thresholds", help="Of diagnosis: validation, a number, or test_set (as released).")
]
SurfaceOption = Annotated[bool, typer.Option("--surface", help="Also NSD and HD95, which take long.")]
WordsOption = Annotated[
    str, typer.Option("--words", help="Words of texts: ascii, unicode, or auto: unicode where the texts need it.")
]

# of `evaluate`: what only matters where a model is run
RUN_PARAMETERS = (
    "model",
    "revision",
    "tasks",
    "split",
    "limit",
    "batch_size",
    "max_new_tokens",
    "num_beams",
    "device",
    "dtype",
    "quantize",
)


def evaluate(
    context: typer.Context,
    model: ModelOption = None,
    revision: RevisionOption = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", help="A prepared folder, a JSONL file, or a set of made-up scans (ctinstruct data sources)."
        ),
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
    batch_size: Annotated[int, typer.Option("--batch-size", help="Questions about one scan answered at once.")] = 4,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Of an answer.")] = 512,
    thresholds: ThresholdsOption = "validation",
    surface: SurfaceOption = False,
    words: WordsOption = "auto",
    vlm3d: Annotated[Path | None, typer.Option("--vlm3d", help="Also write the reports as a VLM3D submission.")] = None,
    against: Annotated[
        str | None,
        typer.Option("--against", help="Shown beside it: the folder of an earlier evaluation, or a model to run too."),
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    quantize: QuantizeOption = None,
    num_beams: NumBeamsOption = 1,
) -> None:
    """Run a model over data and score it, or score the predictions of any system."""
    from rich.console import Console

    from ..evaluation.run import RunOptions, run_model
    from ..evaluation.scoring import parse_thresholds
    from ..inference.folders import BUNDLED_MODEL

    if (data is None) == (predictions is None):
        raise CTInstructError("Give either --data (and --model) or --predictions.")
    if data is not None:
        refuse_beside(context, "--data", "converter", "references", "dataset")
    else:
        refuse_beside(context, "--predictions", *RUN_PARAMETERS)
    if converter is None:
        refuse_beside(context, "a file of predictions without --from", "references", "dataset")
    limits = parse_thresholds(thresholds)
    asked = tuple(split_names(tasks))
    options = RunOptions(
        asked, split or "", limit, batch_size, max_new_tokens, limits == "validation", num_beams, quantize
    )
    hide_progress_bars()
    with Console(stderr=True).status("starting") as status:
        progress = show_steps(status)

        def run(name: str | None, folder: Path, commit: str | None = None) -> Path:
            chosen = name or str(BUNDLED_MODEL)
            return run_model(
                chosen, str(data), folder, options, device=device, dtype=dtype, revision=commit, progress=progress
            )

        file = predictions or run(model, output, revision)
        earlier = None if against is None else _earlier(against, output, run if data is not None else None)
        if data is not None and not is_main_process():
            return
        found = _read(file, converter, references, dataset, output)
        systems = [found] if earlier is None else _before_and_after(_read(earlier), found)
        tables = _score(systems, output, limits, surface, words, progress)
    for table in tables:
        typer.echo(table.markdown())
    if "splits" in found.header:
        typer.echo(
            f"Scored on split {found.header['split']}; {found.header['data']} has {', '.join(found.header['splits'])}."
        )
    if found.failed:
        typer.echo(f"{len(found.failed)} samples failed: " + ", ".join(record.id for record in found.failed[:20]))
    if vlm3d is not None:
        from ..evaluation.challenge import write_submission

        typer.echo(f"{write_submission(found, vlm3d)} reports in {vlm3d}")
    typer.echo(f"Research use only. Open {(output / 'page' / 'index.html').resolve()}")


def _earlier(against: str, output: Path, run: Callable[[str, Path], Path] | None) -> Path:
    """The predictions of an earlier evaluation, or of a model that is run over the same data."""
    from ..inference.models import load_model

    folder = Path(against).expanduser()
    if (folder / "predictions.jsonl").is_file():
        return folder / "predictions.jsonl"
    if run is None:
        raise CTInstructError(
            f"--against {against} has no predictions.jsonl: beside --predictions name the folder of an earlier evaluation."
        )
    load_model.cache_clear()  # the first model's memory is free again
    return run(against, output / "against")


def _read(
    file: Path, converter: str | None = None, references: Path | None = None, dataset: str = "", output: Path = Path()
) -> Predictions:
    """A file of predictions; one of another system is also written in our form."""
    from ..evaluation.converters import convert_predictions
    from ..evaluation.predictions import read_predictions, write_predictions

    if converter is None:
        return read_predictions(file)
    found = convert_predictions(converter, file, references, dataset)
    write_predictions(found, output / "predictions.jsonl")
    return found


def _before_and_after(before: Predictions, after: Predictions) -> list[Predictions]:
    """Two systems on the same samples, named for tables."""
    _check_same_samples([before, after])
    return [replace(before, system=f"before: {before.system}"), replace(after, system=f"after: {after.system}")]


def _check_same_samples(systems: Sequence[Predictions]) -> None:
    """Raises CTInstructError where another system than the first was given other samples."""
    from ..evaluation.predictions import check_same

    keys = [{(record.task, record.dataset) for record in system.records} for system in systems]
    for other, shared in zip(systems[1:], keys[1:], strict=True):
        check_same(systems[0], other, sorted(keys[0] & shared))


def _score(
    systems: Sequence[Predictions],
    output: Path,
    thresholds: str | float,
    surface: bool,
    words: str,
    progress: Callable[[str], None],
) -> list[Table]:
    """`scores.json` of the last system, and a page of all."""
    from ..evaluation.page import write_comparison, write_scores
    from ..evaluation.scoring import score_predictions

    scores = [
        score_predictions(system, thresholds, surface=surface, tokenizer=words, progress=progress) for system in systems
    ]
    tables = write_comparison(scores, output / "page")
    write_scores(scores[-1], output / "scores.json")
    return tables


def calibrate(
    model: Annotated[Path, typer.Option("--model", help="Folder of a stage-two model; its processor is changed.")],
    data: Annotated[str, typer.Option("--data", help="As for evaluate, with masks.")],
    split: Annotated[
        str, typer.Option("--split", help="train, validation or test; never what is scored later.")
    ] = "train",
    limit: Annotated[int | None, typer.Option("--limit", help="Scans.")] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Calibrate a model on scans whose truth is known: when a mask is to be left empty, temperature, bias and threshold of each
    disease, and which scans it fits. Written into its processor and calibration.json.
    """
    from rich.console import Console

    from ..data.samples import from_row
    from ..evaluation.calibrating import find_calibration, pooled_ece
    from ..evaluation.floors import write_floors
    from ..evaluation.run import load_data
    from ..inference.calibration import write_calibration
    from ..inference.study import load_model

    hide_progress_bars()
    if not model.is_dir():
        raise CTInstructError(f"--model {model} is no folder: calibrate writes into the model's processor.")
    with Console(stderr=True).status("starting") as status:
        network, processor = load_model(str(model), device, dtype)
        rows = load_data(data, "alignment", split)[:limit]
        if not any(row["masks"] for row in rows):
            raise CTInstructError(f"{data} has no sample of split {split} with a mask: nothing to learn a floor from.")
        samples = (from_row(row, "alignment") for row in rows)
        floors, found = find_calibration(network, processor, samples, show_steps(status))  # type: ignore[arg-type]  # of that stage
        write_floors(model, floors)
        write_calibration(model, found)
        processor.image_processor.mask_floors = floors  # this process may have it loaded
        network.calibration = found
    for name, (least, level) in sorted(floors.items()):
        typer.echo(f"{name}: empty unless more than {least:g} mL have a logit above {level:g}")
    for name, one in found.diseases.items():
        typer.echo(
            f"{name}: there from a probability of {one.threshold:.3f} (temperature {one.temperature:.2f}, bias {one.bias:.2f})"
        )
    errors = pooled_ece(found.diseases)
    if errors is not None:
        typer.echo(f"expected calibration error {errors[0]:.4f} before, {errors[1]:.4f} after")
    typer.echo(f"{len(floors)} structures of {len(rows)} scans have a floor in {model}")


def is_main_process() -> bool:
    """Whether this is the first of several processes, or the only one."""
    from accelerate import PartialState

    return bool(PartialState().is_main_process)


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

    from ..evaluation.page import write_comparison
    from ..evaluation.scoring import parse_thresholds, score_predictions

    limits = parse_thresholds(thresholds)
    found = [_read(file) for file in files]
    names = [system.system for system in found]
    for file, system in zip(files, found, strict=True):  # systems of the same name are told apart by their files
        if names.count(system.system) > 1:
            system.system = f"{system.system} ({file.parent.name or file.stem})"
    _check_same_samples(found)
    with Console(stderr=True).status("scoring") as status:
        scores = [
            score_predictions(system, limits, surface=surface, tokenizer=words, progress=show_steps(status))
            for system in found
        ]
        tables = write_comparison(scores, output, pictures)
    for table in tables:
        typer.echo(table.markdown())
    typer.echo(f"Research use only. Open {(output / 'index.html').resolve()}")
