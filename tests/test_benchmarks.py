"""The benchmarks run; their numbers are for `make benchmarks`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.evaluation.test_text import has_wordnet

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


LONG = [pytest.param(name, marks=pytest.mark.slow) for name in ("data", "evaluation", "scale", "study")]


@pytest.mark.parametrize("name", ["model", "volumes", *LONG])
def test_a_quick_run_prints_its_table(name: str) -> None:
    if name == "evaluation":
        pytest.importorskip("nltk", reason="the `eval` extra is not installed")
        if not has_wordnet():
            pytest.skip("METEOR needs WordNet")
    if name == "volumes":
        pytest.importorskip("monai", reason="monai is not installed")
    done = subprocess.run(
        [sys.executable, f"{name}.py", "--quick", "--check"],
        cwd=BENCHMARKS,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "ratio" in done.stdout
    assert "torch" in done.stdout
