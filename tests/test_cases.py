"""Made scans and requests that once failed, from the folder of shared cases: each is read rightly, refused in one sentence,
or comes with a warning that names what is odd; never another scan in silence, and no foreign error."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from repository import shared

# imports what the scripts share once; each script then runs in a process of its own
RUN = """
import importlib, os, runpy, sys
for name in sys.argv[1].split(","):
    importlib.import_module(name)
for script in sys.argv[2:]:
    sys.stdout.flush()
    child = os.fork()
    if not child:
        sys.argv, sys.path[0] = [script], os.path.dirname(script)
        try:
            runpy.run_path(script, run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        sys.stdout.flush()
        os._exit(code)
    print(f"== {os.path.basename(script)} ended with {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}", flush=True)
"""
CASE = re.compile(r"^## (?P<name>.*)\n   exp: (?P<expected>.*)\n   got: (?P<got>(?:.*\n)*?)(?=^## |^== |\Z)", re.M)
# the generators' own checks read a tag that they removed, or files without preamble; their encoder refuses
OWN = re.compile(
    r"'Dataset' object has no attribute '\w+' @ dataset\.py|SEG InvalidDicomError File is missing DICOM File Meta"
    r"|values is not valid for pixel data encoded with 'RLE Lossless'"
)
FOREIGN = re.compile(
    r"\bEXC (?!CTInstructError)\w+|\b(?:SEG|MASK) (?!CTInstructError)\w*(?:Error|Exception|Warning|Expired)\b"
)
# what the generators cannot make here, or compare with another field than they made, by their own README
NOT_MADE = r"n_dt_u?int64|n_pair_scl"
NOT_COMPARED = r"negative_pos|coronal_flip|nonunit_|p_|i_mha_ascii|n_pad-"


def run(folder: Path, scripts: list[Path], modules: str, work: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(work), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", RUN, modules, *map(str, scripts)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def fault_of(name: str, expected: str, got: str) -> str | None:
    """What is wrong with what came of a case, in the script's words."""
    if re.match(NOT_MADE, name):
        return None
    if FOREIGN.search(got) and not OWN.search(got):
        return f"foreign error: {got}"
    if got.startswith("REFUSED"):
        return f"refused: {got}" if expected.startswith("exact") and "refus" not in expected else None
    if re.match(NOT_COMPARED, name) or "maxerr" not in got:
        return None
    most = re.match(r"(?:read )?within ([\d.]+)", expected)
    far = re.findall(r"maxerr (\S+)", got) if re.search(r"frac>1 (?!0 |0$)", got) else []
    wrong = [
        *(f"maxerr {one}" for one in far if float(one) > (float(most[1]) if most else 1.01)),
        *re.findall(r"same 0\.\d+", got), *re.findall(r"(?:badvox|refbad) [1-9]\d*", got)
    ]  # fmt: skip
    warned = "W []" not in got
    return f"{', '.join(wrong)}: {got}" if wrong and (not warned or expected == "exact") else None


@pytest.mark.slow
def test_reports_of_users_do_not_come_back(tmp_path: Path) -> None:
    folder = shared("cases/reports")
    scripts = sorted(path for path in folder.glob("*.py") if not path.name.startswith("_"))
    out = run(folder, scripts, "ctinstruct_hf.inference.study,ctinstruct_hf.app.server,fastapi.testclient", tmp_path)
    ends = dict(re.findall(r"^== (\S+) ended with (-?\d+)$", out, re.M))
    assert len(ends) == len(scripts)
    assert set(ends.values()) == {"0"}, out


@pytest.mark.slow  # their faults are tested one by one where they stood
@pytest.mark.parametrize("script", ["q_dicom.py", "q_other.py"])
def test_odd_scans_are_right_refused_or_told(script: str, tmp_path: Path) -> None:
    folder = shared("cases")
    out = run(folder, [folder / script], "ctinstruct_hf.processing.volume_reading,nibabel,pydicom,SimpleITK", tmp_path)
    assert f"== {script} ended with 0" in out, out[-2000:]
    cases = [(one["name"], one["expected"], one["got"].strip()) for one in CASE.finditer(out)]
    assert len(cases) > 100
    faults = {name: fault for name, expected, got in cases if (fault := fault_of(name, expected, got))}
    assert not faults, "\n".join(f"{name}: {fault}" for name, fault in faults.items())
