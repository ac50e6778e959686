"""The benchmarks run; their numbers are for `make benchmarks`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize("name", ["data", "model", "volumes"])
def test_a_quick_run_prints_its_table(name: str) -> None:
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
