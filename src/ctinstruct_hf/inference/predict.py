"""`ctinstruct predict`: scans in, a folder of results each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .._version import __version__
from ..output.folder import check_output
from .fingerprint import fingerprint
from .models import resolve_model
from .scans import Scan, find_scans
from .study import Study, mask_names


@dataclass
class Request:
    """What to ask about each scan.

    Attributes:
        report: write a report.
        questions: asked in words.
        structures: names to segment.
        diagnose: a list's name, names of diseases with commas, or `all`; None asks for none.
        findings: the table of findings with its masks. A report and probabilities asked together get the table, too, but no
            mask that was not asked for.
        consensus: drafts of the report, see `Study.report`.
        output_types, multi_label, keep_series_uid: see `output.folder.save_results`.
        generation: arguments of `generate` for report and questions, as {"max_new_tokens": 64, "num_beams": 5}.
    """

    report: bool = False
    questions: list[str] = field(default_factory=list)
    structures: list[str] = field(default_factory=list)
    diagnose: str | None = None
    output_types: tuple[str, ...] = ("nifti",)
    multi_label: bool = False
    keep_series_uid: bool = False
    generation: dict[str, int] = field(default_factory=dict)
    findings: bool = False
    consensus: int = 1

    @property
    def empty(self) -> bool:
        return not (self.report or self.questions or self.structures or self.diagnose or self.findings)

    @property
    def wants_findings(self) -> bool:
        """Whether the table of findings is made."""
        return self.findings or bool(self.report and self.diagnose)


def settings_of(scan: Scan, request: Request, reading: dict[str, Any]) -> dict[str, Any]:
    """What was asked about which scan by which model, for `findings.json`: the same again need not be computed."""
    resolved = resolve_model(reading.get("model"), reading.get("revision"))
    name = resolved.folder.resolve().name if resolved.commit is None else resolved.name
    kept = {key: value for key, value in reading.items() if key != "model" and value is not None}
    return {
        **asdict(request),
        **kept,
        "model": name if reading.get("model") else "the bundled model",
        "model_fingerprint": fingerprint(resolved.folder),
        "scan_fingerprint": scan.fingerprint(),
        "package_version": __version__,
    }


def predict_study(
    scan: Path | Scan,
    output: Path,
    request: Request,
    *,
    model: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    quantize: str | None = None,
    series: str | None = None,
    spacing: tuple[float, float, float] | None = None,
    names: dict[str, list[str]] | None = None,
    asked: dict[str, Any] | None = None,
    tell: Callable[[str], None] = lambda step: None,
) -> Study:
    """Ask a scan everything in the request and write the folder.

    Args:
        scan: what `read_volume` takes, or one of `find_scans`, whose own series comes before `series`.
        output: the folder to write.
        request: what to ask.
        model, device, dtype, revision, quantize: see `inference.models.load_model`.
        series, spacing: see `read_volume`.
        names: {name: other names} of the user, see `data.names.read_names`.
        asked: `settings_of` all that, where it is known already.
        tell: called with the name of each step.

    Raises:
        CTInstructError: nothing is written then. What could not be written beside other results is in
            `results.failures` of the study.
    """
    resolve_model(model, revision, progress=tell)
    tell("reading")
    scan = scan if isinstance(scan, Scan) else Scan(scan)
    chosen = scan.series or series
    loading = {"device": device, "dtype": dtype, "revision": revision, "quantize": quantize}
    study = Study.open(scan.path, model, **loading, series=chosen, spacing=spacing, names=names)
    # fail before the work, not after it
    check_output(study.volume, request.output_types)
    diseases = study.diseases_asked(request.diagnose) if request.diagnose else None
    tell("encoding")
    _ = study.features
    study.fitness()
    if request.report or request.findings:
        tell("report")
        study.report(consensus=request.consensus, **request.generation)
    for question in request.questions:
        tell("question")
        answer = study.ask(question, **request.generation)
        study.results.masks.update(zip(mask_names(question, len(answer.masks)), answer.masks, strict=True))
    if request.structures:
        tell("masks")
        study.segment(request.structures)
    if request.diagnose:
        tell("probabilities")
        study.diagnose(diseases)
    if request.wants_findings:
        tell("findings")
        asked_for = dict(study.results.masks)
        study.findings()
        if not request.findings:
            study.results.masks = asked_for
    tell("writing")
    reading = {
        "model": model, "dtype": dtype, "revision": revision, "quantize": quantize, "series": series, "spacing": spacing,
        "names": names,
    }  # fmt: skip
    study.save(
        output,
        output_types=request.output_types,
        multi_label=request.multi_label,
        keep_series_uid=request.keep_series_uid,
        asked=asked or settings_of(scan, request, reading),
    )
    return study


__all__ = ["Request", "find_scans", "predict_study", "settings_of"]
