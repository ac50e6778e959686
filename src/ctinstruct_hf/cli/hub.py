"""`ctinstruct card`, `publish` and `convert`: models on their way to and from the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import CTInstructError
from .shared import DryRunOption, show_steps, split_names

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
        typer.echo(send(folder, repository, plan, private=not public, tell=show_steps(status)))


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
    from ..hub.released import convert_released

    with Console(stderr=True).status("reading") as status:
        convert_released(source, output, tokenizer, tell=show_steps(status))
    typer.echo(str(output))
