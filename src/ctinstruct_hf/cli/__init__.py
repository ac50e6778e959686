"""`ctinstruct …`: parse, call, print; nothing else. Everything heavy is imported inside the verbs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import CTInstructError
from ..output.types import OUTPUT_TYPES, output_type
from ..threads import choose_threads
from . import data, demo, doctor, evaluate, hub, predict, serve, train, watch
from .configuration import read_configuration

app = typer.Typer(
    name="ctinstruct",
    help="CTInstruct: ask 3D CT scans in words. Research use only, never a diagnosis.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# in the order of the help
VERBS: dict[str, Callable[..., Any]] = {
    "demo": demo.demo,
    "predict": predict.predict,
    "watch": watch.watch,
    "app": serve.serve,
    "convert": hub.convert,
    "export": hub.export,
    "pretrain": train.pretrain,
    "instruct": train.instruct,
    "evaluate": evaluate.evaluate,
    "calibrate": evaluate.calibrate,
    "compare": evaluate.compare,
    "card": hub.card,
    "publish": hub.publish,
    "doctor": doctor.doctor,
}
for _name, _verb in VERBS.items():
    app.command(_name)(_verb)
app.add_typer(data.data_app, name="data")


@app.callback()
def options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    config: Annotated[
        Path | None,
        typer.Option("--config", help="YAML of options by verb, {app: {port: 8000}}; the command line's come first."),
    ] = None,
) -> None:
    context.obj = {"debug": debug}
    if config is not None:
        context.default_map = read_configuration(config, context.command)


def spread(arguments: list[str]) -> list[str]:
    """`--output-type nifti dicom-seg` as two options, as radiology tools write it."""
    spread_out: list[str] = []
    option = ""
    for argument in arguments:
        if option and output_type(argument) in OUTPUT_TYPES and spread_out[-1] != option:
            spread_out.append(option)
        spread_out.append(argument)
        if argument in ("--output-type", "-ot"):
            option = argument
        elif output_type(argument) not in OUTPUT_TYPES:
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
        from ..files import why_unwritable

        reason = why_unwritable(error)
        if debug or reason is None:
            raise
        print(f"ctinstruct: {reason}", file=sys.stderr)
        sys.exit(2)
