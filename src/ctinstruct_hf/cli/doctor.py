"""`ctinstruct doctor`: what is installed, what this machine offers, and whether the bundled model runs."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import typer

from .shared import hide_progress_bars


@dataclass
class Finding:
    """One line: a topic, what was found, and what to do where something is missing."""

    topic: str
    found: str
    advice: str = ""
    fails: bool = False


# what a normal user can do without -> (module, how it is installed, what for)
OPTIONAL = {
    "DICOM SEG": ("highdicom", "pip install 'ctinstruct-hf[dicom-seg]'"),
    "DICOMweb": ("dicomweb_client", "pip install 'ctinstruct-hf[dicomweb]'"),
    "DIMSE": ("pynetdicom", "pip install 'ctinstruct-hf[pacs]'"),
    "the page": ("fastapi", "pip install 'ctinstruct-hf[app]'"),
    "many scans on several machines": ("ray", "pip install 'ctinstruct-hf[ray]'"),
    "scores of texts": ("nltk", "pip install 'ctinstruct-hf[eval]'"),
    "surface distances": ("monai", "pip install 'ctinstruct-hf[eval]'"),
    "pictures of a comparison": ("matplotlib", "pip install 'ctinstruct-hf[eval]'"),
    "export of the vision tower": ("onnxscript", "pip install 'ctinstruct-hf[onnx]'"),
    "4-bit training on a GPU": ("bitsandbytes", "pip install bitsandbytes"),
}


def examine() -> Iterator[Finding]:
    """Every line, one after the other; the self-test last."""
    yield Finding("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield from _packages()
    yield from _devices()
    for what, (module, command) in OPTIONAL.items():
        there = find_spec(module) is not None
        yield Finding(what, module if there else "missing", "" if there else f"{command}, if you need it")
    yield _wordnet()
    yield _self_test()


def _packages() -> Iterator[Finding]:
    from importlib.metadata import PackageNotFoundError, requires, version

    for requirement in requires("ctinstruct-hf") or []:
        if "extra ==" in requirement:
            continue
        name = requirement.split(";")[0].split(">")[0].split("=")[0].split("[")[0].strip()
        try:
            yield Finding(name, version(name))
        except PackageNotFoundError:
            yield Finding(name, "missing", f"pip install '{requirement}'", fails=True)


def _devices() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = ""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = f", {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GB of memory"
    yield Finding("CPU", f"{cores} cores{memory}")
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            yield Finding(f"cuda:{index}", f"{card.name}, {card.total_memory / 2**30:.0f} GB")
    else:
        yield Finding(
            "GPU", "none that torch can use", "the tiny model runs on a CPU; the paper's size wants a GPU of 24 GB"
        )


def _wordnet() -> Finding:
    if find_spec("nltk") is None:
        return Finding("METEOR", "missing", "pip install 'ctinstruct-hf[eval]', if you need it")
    from ..errors import CTInstructError
    from ..evaluation.wordnet import find_wordnet

    try:
        find_wordnet()
    except CTInstructError:
        return Finding("METEOR", "WordNet is missing", "python -m nltk.downloader wordnet, if you need it")
    return Finding("METEOR", "WordNet is there")


def _self_test() -> Finding:
    """One made-up slice, one mask, one answer."""
    start = time.perf_counter()
    try:
        from ..data.sources.made import made_up_slice
        from ..inference.study import Study, load_model

        study = Study(made_up_slice(3), *load_model(None, "cpu"))
        mask = study.segment("liver")
        answer = study.ask("Is there emphysema?", max_new_tokens=8)
        if mask.shape != study.volume.shape or not isinstance(answer, str):
            raise RuntimeError("the answer has another form than it should")
    except Exception as error:
        return Finding("self-test", f"failed: {type(error).__name__}: {error}", "pip install --force-reinstall ctinstruct-hf", True)  # fmt: skip
    return Finding("self-test", f"the bundled model answers in {time.perf_counter() - start:.1f} s")


def doctor() -> None:
    """Versions, devices, memory, optional parts, and a self-test; exit code 1 where something is broken."""
    hide_progress_bars()
    broken = False
    for finding in examine():
        broken = broken or finding.fails
        advice = f"   -> {finding.advice}" if finding.advice else ""
        typer.echo(f"{finding.topic:26s} {finding.found}{advice}")
    if broken:
        raise typer.Exit(1)
