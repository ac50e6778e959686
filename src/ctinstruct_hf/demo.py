"""`ctinstruct demo`: the main job on a made-up scan with the bundled model, nothing from the network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .data.reading import phantom_of
from .inference.predict import Request, predict_study
from .inference.study import Study

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


def run_demo(output: Path, seed: int = 3, tell: Callable[[str], None] = lambda step: None) -> Study:
    """Make a phantom scan, ask it everything, write the page.

    Args:
        output: folder for the scan (`scan.nii.gz`) and the results.
        seed: which phantom.
        tell: called with the name of each step.
    """
    tell("making a scan")
    output.mkdir(parents=True, exist_ok=True)
    scan = output / "scan.nii.gz"
    phantom = phantom_of(f"phantom:trunk:{seed}")
    phantom.volume.to_source(phantom.volume.hu, scan)
    request = Request(report=True, questions=QUESTIONS, structures=STRUCTURES, diagnose="phantom")
    return predict_study(scan, output / "results", request, tell=tell)
