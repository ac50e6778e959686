"""The benchmarks run; their numbers are for `make benchmarks`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from repository import script
from wordnets import has_wordnet

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


LONG = [pytest.param(name, marks=pytest.mark.slow) for name in ("data", "evaluation", "scale", "study", "volumes")]


@pytest.mark.parametrize("name", ["model", *LONG])
def test_a_quick_run_prints_its_table_and_gives_the_figures_of_numbers_json(name: str, tmp_path: Path) -> None:
    if name == "evaluation":
        pytest.importorskip("nltk", reason="the `eval` extra is not installed")
        if not has_wordnet():
            pytest.skip("METEOR needs WordNet")
    if name == "volumes":
        pytest.importorskip("monai", reason="monai is not installed")
    done = subprocess.run(
        [sys.executable, f"{name}.py", "--quick", "--check", "--json", str(tmp_path / "figures.json")],
        cwd=BENCHMARKS,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "ratio" in done.stdout
    assert "torch" in done.stdout
    rows = json.loads((BENCHMARKS.parent / "docs" / "numbers.json").read_text())["figures"]
    wanted = {row["figure"] for row in rows if "figure" in row and f"benchmarks/{name}.py" in row["command"]}
    given = json.loads((tmp_path / "figures.json").read_text()) if wanted else {}
    assert set(given) == wanted
    assert all(isinstance(value, str) and value for value in given.values())


def test_the_table_of_numbers_is_that_of_numbers_json() -> None:
    numbers = script("write_numbers")
    page = numbers.PAGE.read_text(encoding="utf-8")
    table = page.partition(numbers.START)[2].partition(numbers.END)[0]
    found = json.loads(numbers.NUMBERS.read_text(encoding="utf-8"))
    assert table == numbers.render(found)
    for row in found["figures"]:
        assert set(row) - {"figure"} == {"what", "value", "command", "date", "machine"}


def test_make_numbers_takes_what_a_benchmark_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A figure with a name gets today's value; another keeps what it was."""
    numbers = script("write_numbers")
    program = 'import pathlib, sys; pathlib.Path(sys.argv[-1]).write_text(\'{"speed": "2.00 times"}\')'
    old = {"what": "speed", "value": "1.00 times", "command": "", "date": "2020-01-01", "machine": "a slow one"}
    rows = [{**old, "command": f"python {tmp_path / 'benchmark.py'}", "figure": "speed"}, {**old, "command": "by hand"}]
    (tmp_path / "benchmark.py").write_text(program)
    monkeypatch.setattr(numbers, "NUMBERS", tmp_path / "numbers.json")
    monkeypatch.setattr(numbers, "PAGE", tmp_path / "numbers.md")
    numbers.PAGE.write_text(f"Before.\n{numbers.START}{numbers.END}After.\n")
    found = {"figures": rows}
    numbers.update(found, [])
    numbers.write(found)
    page = numbers.PAGE.read_text()
    assert page.startswith("Before.\n")
    assert page.endswith("After.\n")
    assert [row["value"] for row in found["figures"]] == ["2.00 times", "1.00 times"]
    assert found["figures"][0]["date"] > "2020-01-01" == found["figures"][1]["date"]
    assert "| speed | 2.00 times |" in page
