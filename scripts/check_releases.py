"""Which new release breaks us: for once a month, and before a release of our own.

    python scripts/check_releases.py [--tests tests] [--report releases.md]

Takes the newest releases of everything that pyproject.toml names and runs the tests. Where some fail, each newer package is
put alone (with what it asks for) into the tested set of constraints.txt, and only the failed tests run again: the table says
which package breaks which test. Exit code 1 where one does. Needs the package index; environments are in .venv-newest.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLACE = ROOT / ".venv-newest"


def run(*command: str | Path, check: bool = True) -> str:
    """What a command printed; ends this one where it fails."""
    done = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True, check=False)
    if check and done.returncode:
        sys.exit(f"{' '.join(map(str, command[:4]))} … failed:\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


def normal(name: str) -> str:
    """A package's name as the index writes it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(text: str) -> dict[str, str]:
    """{name: version} of `name==version` lines; names as the index writes them."""
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;#]+)", text, re.MULTILINE)
    return {normal(name): version for name, version in found}


def named(project: dict) -> set[str]:
    """Every package that pyproject.toml names, as the index writes it."""
    wanted = [*project["dependencies"], *(one for part in project["optional-dependencies"].values() for one in part)]
    names = (re.match(r"[A-Za-z0-9._-]+", one) for one in wanted)
    return {normal(name[0]) for name in names if name} - {"ctinstruct-hf"}


def newer(tested: dict[str, str], newest: dict[str, str], names: set[str]) -> dict[str, tuple[str, str]]:
    """{name: (tested, newest)} of what has a release that we do not test yet."""
    return {
        name: (tested[name], newest[name])
        for name in sorted(names)
        if name in tested and name in newest and tested[name].split("+")[0] != newest[name].split("+")[0]
    }


def failed_tests(log: str) -> list[str]:
    """Node ids of failures and errors in pytest's short summary."""
    return re.findall(r"^(?:FAILED|ERROR) (\S+)", log, re.MULTILINE)


def install(*constraints: Path) -> None:
    options = [part for file in constraints for part in ("-c", str(file))]
    run(
        PLACE / "bin" / "uv",
        "pip",
        "install",
        "--quiet",
        "--python",
        PLACE / "bin" / "python",
        *options,
        "-e",
        ".[dev]",
    )


def test(nodes: Sequence[str]) -> list[str]:
    return failed_tests(
        run(PLACE / "bin" / "python", "-m", "pytest", "-q", "-n", "2", "--dist", "worksteal", *nodes, check=False)
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", nargs="+", default=["tests"], help="what pytest runs")
    parser.add_argument("--report", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    run("bash", "scripts/test_versions.sh", "newest", "--install-only")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    tested = pins((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    changed = newer(tested, pins((PLACE / "versions.txt").read_text(encoding="utf-8")), named(project))
    failures = test(options.tests)
    lines = [
        f"{len(changed)} packages have releases newer than constraints.txt; with all of them {len(failures)} tests fail."
    ]
    lines += ["", "| package | tested | newest | tests that fail with it alone |", "|---|---|---|---|"]
    blamed: set[str] = set()
    for name, (before, after) in changed.items():
        broken: list[str] = []
        if failures:
            others = PLACE / "others.txt"
            kept = (line for line in (ROOT / "constraints.txt").read_text().splitlines() if name not in pins(line))
            others.write_text("\n".join([*kept, f"{name}=={after}"]), encoding="utf-8")
            install(others)
            broken = test(failures)
        blamed |= set(broken)
        lines.append(f"| {name} | {before} | {after} | {', '.join(broken) or '–'} |")
    together = sorted(set(failures) - blamed)
    if together:
        lines.append(f"\nOnly together, or by a package that is not named: {', '.join(together)}")
    text = "\n".join(lines)
    print(text)
    if options.report:
        options.report.write_text(text + "\n", encoding="utf-8")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
