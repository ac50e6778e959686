"""`ctinstruct demo`: the main job on a made-up scan with the bundled model, nothing from the network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .shared import as_note, hide_progress_bars, show_steps

if TYPE_CHECKING:
    from ..inference.study import Study

STRUCTURES = [
    "right lung",
    "left lung",
    "liver",
    "heart",
    "spleen",
    "left kidney",
    "right kidney",
    "spine",
    "pleural effusion",
]
QUESTIONS = ["Is there a pleural effusion?", "How many lung nodules are there?"]


def run_demo(output: Path, seed: int = 3, progress: Callable[[str], None] = lambda step: None) -> Study:
    """Make a phantom scan, ask it everything, write the page.

    Args:
        output: folder for the scan (`scan.nii.gz`) and the results.
        seed: which phantom.
        progress: called with the name of each step.
    """
    from ..inference.consensus import DRAFTS
    from ..inference.predict import Request, predict_study
    from ..phantoms import phantom_of

    progress("making a scan")
    output.mkdir(parents=True, exist_ok=True)
    scan = output / "scan.nii.gz"
    phantom = phantom_of(f"phantom:trunk:{seed}")
    phantom.volume.to_source(phantom.volume.hu, scan)
    request = Request(
        report=True, questions=QUESTIONS, structures=STRUCTURES, diagnose="phantom", findings=True, consensus=DRAFTS
    )
    return predict_study(scan, output / "results", request, tell=progress)


def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")] = Path("demo_output"),
    seed: Annotated[int, typer.Option(help="Which made-up scan.")] = 3,
) -> None:
    """Run the main job on a made-up scan with the bundled model and write a page to look at."""
    from rich.console import Console

    hide_progress_bars()
    console = Console(stderr=True)
    with console.status("starting") as status:
        study = run_demo(output, seed, progress=show_steps(status))
    for note in study.warnings:
        console.print(as_note(note))
    typer.echo(f"Research use only. Open {(output / 'results' / 'report.html').resolve()}")
