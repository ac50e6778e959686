"""`ctinstruct card`, `publish`, `convert` and `export`: models on their way to and from the Hub."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ..errors import CTInstructError
from .shared import DryRunOption, ModelOption, QuantizeOption, RevisionOption, as_note, show_steps, split_names

ScoresOption = Annotated[Path | None, typer.Option("--scores", help="scores.json of ctinstruct evaluate.")]
DatasetsOption = Annotated[str | None, typer.Option("--datasets", help="What it was trained on, with commas.")]
BaseModelOption = Annotated[str | None, typer.Option("--base-model", help="What it was made from.")]
LicenseOption = Annotated[str, typer.Option("--license", help="Of the weights.")]
NotesOption = Annotated[Path | None, typer.Option("--notes", help="A text of your own on data and limits.")]


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
    from ..hub.card import make_card, write_card

    text = make_card(
        folder,
        scores,
        name=name,
        datasets=split_names(datasets),
        base_model=base_model,
        license=license,
        notes=_text_of(notes),
    )
    typer.echo(str(write_card(folder, text)))


def _text_of(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CTInstructError(f"{path} cannot be read as text.") from error


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

    from ..hub.card import make_card
    from ..hub.publish import check_repository, make_plan
    from ..hub.publish import publish as send

    check_repository(repository)
    text = make_card(
        folder,
        scores,
        name=repository,
        datasets=split_names(datasets),
        base_model=base_model,
        license=license,
        notes=_text_of(notes),
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
        typer.echo(send(folder, repository, plan, private=not public, progress=show_steps(status)))


def convert(
    layout: Annotated[
        str, typer.Argument(help="released: the authors' checkpoint. model: one of this format, to quantise it.")
    ],
    source: Annotated[str, typer.Option("-i", "--input", help="Folder or file of the weights, or a name on the Hub.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")],
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", help="Folder or name of the tokenizer; beside the weights, or Qwen2-VL's."),
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="Folder or name of the model that an adapter (LoRA) changes.")
    ] = None,
    text_encoder: Annotated[
        str,
        typer.Option("--text-encoder", help="Of a stage-one file: biolord-2023 (the release's), all-minilm-l6-v2 …"),
    ] = "biolord-2023",
    quantize: QuantizeOption = None,
    revision: RevisionOption = None,
) -> None:
    """Bring the authors' released weights into this format: the whole model, or their stage one (vision_encoder.pth)."""
    from rich.console import Console

    if layout not in ("released", "model"):
        raise CTInstructError(f"'{layout}' cannot be converted: use released or model.")
    if layout == "model" and quantize is None:
        raise CTInstructError(
            "A model of this format needs no conversion: name what to make of it by --quantize int8 or int4."
        )
    from ..hub.released import convert_released, convert_stage_one, is_stage_one, stage_one_beside
    from ..inference.packing import packer_of, quantize_folder

    console = Console(stderr=True)
    with console.status("reading") as status:
        progress = show_steps(status)
        if layout == "model":
            quantize_folder(source, output, str(quantize), progress, revision)
        elif is_stage_one(Path(source)):
            if quantize is not None:
                raise CTInstructError(f"--quantize {quantize} is for models that speak: {source} is stage one.")
            from ..train.text_encoders import load_text_encoder

            convert_stage_one(Path(source), output, lambda: load_text_encoder(text_encoder), progress)
        else:
            packer = None if quantize is None else partial(packer_of, quantize=quantize)
            convert_released(source, output, tokenizer, progress, base=base, revision=revision, packer=packer)
            beside = stage_one_beside(Path(source))
            if beside is not None:
                console.print(as_note(f"{beside} is stage one: ctinstruct convert released -i {beside} converts it."))
    typer.echo(str(output))


def export(
    layout: Annotated[str, typer.Argument(help="onnx: the vision tower for ONNX Runtime.")],
    scan: Annotated[
        str, typer.Option("-i", "--input", help="A scan: the file is for scans that are cut into patches as it is.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write, .onnx.")],
    model: ModelOption = None,
    revision: RevisionOption = None,
    attention: Annotated[str, typer.Option("--attention", help="sdpa or eager.")] = "sdpa",
) -> None:
    """Write the vision tower for other programs, compared with PyTorch on a scan before it is kept."""
    from rich.console import Console

    if layout != "onnx":
        raise CTInstructError(f"'{layout}' is no layout to export: use onnx.")
    from ..inference.onnx_export import export_tower

    with Console(stderr=True).status("reading") as status:
        difference = export_tower(scan, output, model, attention, show_steps(status), revision)
    typer.echo(f"{output}: within {difference:.1g} of PyTorch")
