"""`make numbers`: run the quick benchmarks, write docs/numbers.json, and the table of docs/numbers.md from it.

    python scripts/write_numbers.py [--only study,evaluation] [--render]

A figure of numbers.json with a `figure` is one that its command gives by that name (`--json`); it gets today's value and date.
Others take hours, a GPU or a test to find, and keep the date on which they were found.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
NUMBERS, PAGE = ROOT / "docs" / "numbers.json", ROOT / "docs" / "numbers.md"
START, END = "<!-- from numbers.json -->\n", "<!-- end -->\n"
PACKAGES = ("torch", "transformers", "numpy", "scikit-learn", "monai", "nibabel", "SimpleITK", "nltk")


def machine() -> str:
    """ "2 cores of an AMD EPYC": the cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{cores} cores of {name}"


def measure(command: str, quick: bool = False) -> dict[str, str]:
    """{figure: value} that a benchmark gives."""
    program, *arguments = shlex.split(command)
    assert program == "python", command
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        more = ["--quick"] if quick else []
        done = subprocess.run([sys.executable, *arguments, *more, "--json", str(out)], cwd=ROOT, check=False)
        if not out.exists():
            raise SystemExit(f"{command} ended with {done.returncode} and gave no figures.")
        return dict(json.loads(out.read_text(encoding="utf-8")))


def update(numbers: dict[str, Any], only: list[str]) -> None:
    """Today's values of all figures that benchmarks give, or of some benchmarks."""
    measured: dict[str, dict[str, str]] = {}
    for row in numbers["figures"]:
        command = row["command"]
        if "figure" not in row or (only and not any(f"benchmarks/{name}.py" in command for name in only)):
            continue
        if command not in measured:
            print(f"$ {command}", flush=True)
            measured[command] = measure(command)
        row |= {"value": measured[command][row["figure"]], "date": date.today().isoformat(), "machine": machine()}
    numbers |= {
        "machine": machine(),
        "versions": {name: version(name) for name in PACKAGES},
        "date": date.today().isoformat(),
    }


def render(numbers: dict[str, Any]) -> str:
    """The part of docs/numbers.md that comes from numbers.json."""
    versions = ", ".join(f"{name} {number}" for name, number in numbers["versions"].items())
    rows = [
        f"| {row['what']} | {row['value']} | `{row['command']}` | {row['date']}, {row['machine']} |"
        for row in numbers["figures"]
    ]
    head = ["| what | figure | command | found |", "|---|---|---|---|"]
    return "\n".join([*head, *rows, "", f"Last run: {numbers['date']}, {numbers['machine']}; {versions}.", ""])


def write(numbers: dict[str, Any]) -> None:
    NUMBERS.write_text(json.dumps(numbers, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(START)
    PAGE.write_text(before + START + render(numbers) + END + rest.partition(END)[2], encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="benchmarks with commas: study,evaluation")
    parser.add_argument("--render", action="store_true", help="measure nothing")
    options = parser.parse_args()
    numbers = json.loads(NUMBERS.read_text(encoding="utf-8"))
    if not options.render:
        update(numbers, [name for name in options.only.split(",") if name])
    write(numbers)


if __name__ == "__main__":
    main()
