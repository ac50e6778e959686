"""`ctinstruct predict`: scans in, a folder of results each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .errors import CTInstructError
from .output.folder import check_output
from .study import Study

# files that hold a volume each, wherever they lie; slices count only where they are named
VOLUME_SUFFIXES = (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".npy", ".npz", ".zip")
SCAN_SUFFIXES = (*VOLUME_SUFFIXES, ".dcm", ".png", ".jpg", ".jpeg", ".bmp")


@dataclass
class Request:
    """What to ask about each scan.

    Attributes:
        report: write a report.
        questions: asked in words.
        structures: names to segment.
        diagnose: a list's name, names of diseases with commas, or `all`; None asks for none.
        output_types, multi_label, keep_series_uid: see `output.folder.save_study`.
    """

    report: bool = False
    questions: list[str] = field(default_factory=list)
    structures: list[str] = field(default_factory=list)
    diagnose: str | None = None
    output_types: tuple[str, ...] = ("nifti",)
    multi_label: bool = False
    keep_series_uid: bool = False

    @property
    def empty(self) -> bool:
        return not (self.report or self.questions or self.structures or self.diagnose)


def settings_of(request: Request, reading: dict[str, Any]) -> dict[str, Any]:
    """What was asked of which model, for `findings.json`: the same again need not be computed."""
    model = reading.get("model")
    folder = Path(model) if model else None
    name = folder.name if folder is not None and folder.is_dir() else model
    kept = {key: value for key, value in reading.items() if key != "model" and value is not None}
    return {**asdict(request), **kept, "model": name or "the bundled model"}


def find_scans(inputs: Sequence[Path]) -> list[Path]:
    """The scans that the inputs name: files, DICOM folders, or folders of either.

    A folder with volume files in it is a folder of scans; one with subfolders only is looked into one level deep;
    any other is a DICOM folder.
    """
    scans: list[Path] = []
    for path in inputs:
        if not path.exists():
            raise CTInstructError(f"{path} does not exist.")
        if path.is_file():
            scans.append(path)
            continue
        inside = sorted(one for one in path.iterdir() if not one.name.startswith("."))
        volumes = [one for one in inside if one.is_file() and one.name.lower().endswith(VOLUME_SUFFIXES)]
        folders = [one for one in inside if one.is_dir()]
        if volumes:
            scans.extend(volumes)
        elif folders and len(folders) == len(inside):
            scans.extend(folders)
        else:
            scans.append(path)
    return scans


def scan_name(scan: Path) -> str:
    """A scan's file name without its endings, as the name of its folder of results."""
    name = scan.name
    for suffix in sorted(SCAN_SUFFIXES, key=len, reverse=True):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def predict_study(
    scan: Path,
    output: Path,
    request: Request,
    *,
    model: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    series: str | None = None,
    spacing: tuple[float, float, float] | None = None,
    names: dict[str, list[str]] | None = None,
    tell: Callable[[str], None] = lambda step: None,
) -> Study:
    """Ask a scan everything in the request and write the folder.

    Args:
        scan: what `read_volume` takes.
        output: the folder to write.
        request: what to ask.
        model, device, dtype, revision: see `hub.models.load_model`.
        series, spacing: see `read_volume`.
        names: {name: other names} of the user, see `data.names.read_names`.
        tell: called with the name of each step.

    Raises:
        CTInstructError: nothing is written then. What could not be written beside other results is in
            `results.failures` of the study.
    """
    tell("reading")
    study = Study.open(
        scan, model, device=device, dtype=dtype, revision=revision, series=series, spacing=spacing, names=names
    )
    # fail before the work, not after it
    check_output(study.volume, request.output_types)
    diseases = study.diseases_asked(request.diagnose) if request.diagnose else None
    tell("encoding")
    _ = study.features
    if request.report:
        tell("report")
        study.report()
    for question in request.questions:
        tell("question")
        study.ask(question)
    if request.structures:
        tell("masks")
        study.segment(request.structures)
    if request.diagnose:
        tell("probabilities")
        study.diagnose(diseases)
    tell("writing")
    asked = settings_of(
        request,
        {"model": model, "dtype": dtype, "revision": revision, "series": series, "spacing": spacing, "names": names},
    )
    study.save(
        output,
        output_types=request.output_types,
        multi_label=request.multi_label,
        keep_series_uid=request.keep_series_uid,
        asked=asked,
    )
    return study
