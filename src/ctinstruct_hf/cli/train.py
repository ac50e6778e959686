"""`ctinstruct pretrain` and `ctinstruct instruct`: the two stages of training."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from .shared import refuse_beside

ChangesOption = Annotated[
    list[str] | None, typer.Option("--set", help="key=value instead of the recipe's; repeatable.")
]
OutputDirOption = Annotated[Path | None, typer.Option("-o", "--output", help="output_dir instead of the recipe's.")]
ResumeOption = Annotated[str | None, typer.Option("--resume", help="A checkpoint; the last whole one by default.")]
RestartOption = Annotated[bool, typer.Option("--restart", help="Begin anew and remove the earlier run.")]
RecipeArgument = Annotated[str, typer.Argument(help="A YAML file, or the name of a bundled recipe.")]


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
    from ..train.recipe import read_recipe

    if table is not None:
        refuse_beside(context, "--table", "row", "resume", "restart")
    settings = read_recipe(recipe if table is None or recipe != "tiny" else "miniature", changes or [])
    if output is not None:
        settings["output_dir"] = str(output)
    if table is not None:
        from ..train.tables import run_table

        typer.echo(run_table(table, settings))
        return
    from ..train.pretrain import pretrain as run

    if row is not None:
        from ..train.tables import recipe_of_row

        settings = recipe_of_row(settings, row)
    show_end(run(settings, resume, restart), settings)


def show_end(metrics: dict[str, float], settings: dict[str, Any]) -> None:
    """Scores and the model's folder, by the main process of those that a launcher has started."""
    if os.environ.get("RANK", "0") != "0":
        return
    for name, value in metrics.items():
        typer.echo(f"{name} {value:.4f}")
    typer.echo(f"The model is in {Path(settings['output_dir']) / 'model'}.")


def instruct(
    context: typer.Context,
    recipe: RecipeArgument = "tiny",
    changes: ChangesOption = None,
    vision: Annotated[
        Path | None, typer.Option("--vision", help="Folder of a stage-one model instead of the recipe's.")
    ] = None,
    output: OutputDirOption = None,
    resume: ResumeOption = None,
    restart: RestartOption = False,
    preview: Annotated[
        int | None,
        typer.Option("--preview", min=1, help="Show so many samples as the model will read them; nothing is trained."),
    ] = None,
) -> None:
    """Stage two: tune on instructions. Goes on where an interrupted run stopped."""
    from rich.console import Console

    from ..train.instruct import instruct as run
    from ..train.recipe import INSTRUCT, read_recipe

    settings = read_recipe(recipe, changes or [], INSTRUCT)
    if output is not None:
        settings["output_dir"] = str(output)
    if vision is not None:
        settings["vision"] = str(vision)
    if preview is not None:
        refuse_beside(context, "--preview", "resume", "restart")
        from ..train.preview import MARKS
        from ..train.preview import preview as show_samples

        typer.echo(f"Between {MARKS[0]} and {MARKS[1]}: what counts for the loss.")
        for path in show_samples(settings, preview, typer.echo):
            typer.echo(f"masks: {path}")
        return
    console = Console(stderr=True)
    metrics = run(settings, resume, restart, tell=lambda step: console.print(step, highlight=False, markup=False))
    show_end(metrics, settings)
