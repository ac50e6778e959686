"""Options that several verbs share, and how they print."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import CTInstructError

ModelOption = Annotated[
    str | None, typer.Option("--model", help="A folder or a name on the Hub; the bundled model by default.")
]
RevisionOption = Annotated[
    str | None, typer.Option("--revision", help="Branch, tag or commit of a model on the Hub; its newest by default.")
]
DeviceOption = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1 …; a GPU where there is one.")]
DtypeOption = Annotated[
    str | None, typer.Option("--dtype", help="float32, bfloat16, float16, or auto: what the machine is quick in.")
]
QuantizeOption = Annotated[
    str | None, typer.Option("--quantize", help="int8 or int4: the language model in as many bits, for less memory.")
]
NumBeamsOption = Annotated[int, typer.Option("--num-beams", help="Beams of an answer; the authors' release takes 5.")]
NamesOption = Annotated[
    Path | None, typer.Option("--names", help="YAML or JSON of your names: 'left kidney: [LK, ren sinister]'.")
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Show exactly what would go, and send nothing.")]


def hide_progress_bars() -> None:
    """No bars of Transformers between our own lines."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def show_steps(status: Any, before: str = "") -> Callable[[str], None]:
    """A callback that shows steps beside the spinner, names with brackets in them as they are."""
    from rich.text import Text

    return lambda step: status.update(Text(before + step))


def fetch_model(console: Any, model: str | None, revision: str | None) -> None:
    """A model of the Hub into the cache, with the way shown: downloaded, and converted where it is the authors'."""
    from ..inference.models import resolve_model

    with console.status("looking for the model") as status:
        resolve_model(model, revision, progress=show_steps(status))


def as_note(text: str) -> Any:
    """A line that begins with a coloured "Note:"."""
    from rich.text import Text

    return Text.assemble(("Note:", "yellow"), f" {text}")


def split_names(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def refuse_beside(context: typer.Context, option: str, *ignored: str) -> None:
    """Raises CTInstructError for parameters that were given although `option` leaves no use for them."""
    given = [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name in ignored
        and getattr(context.get_parameter_source(parameter.name), "name", "") == "COMMANDLINE"
    ]
    if given:
        raise CTInstructError(f"{', '.join(given)} has no effect beside {option}: leave it out.")
