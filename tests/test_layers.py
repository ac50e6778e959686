"""Who may import whom: the contracts in pyproject.toml, as `make check` runs them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("lint-imports")
    if not program.exists():
        pytest.skip("import-linter is not installed")
    command = [sys.executable, str(program), "--no-cache", "--config", str(folder / "pyproject.toml")]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env={"PYTHONPATH": str(folder / "src")})  # fmt: skip


def test_every_room_imports_downward_and_no_two_files_import_each_other() -> None:
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("output/report.py", "from ..inference.study import Study"),
        ("output/measure.py", "def late() -> None:\n    from .folder import file_name"),
        ("inference/scans.py", "from ..hub.publish import publish"),
        ("evaluation/text.py", "from ..train.recipe import load_recipe"),
        ("modeling/losses_ctinstruct.py", "from ctinstruct_hf.files import whole_file"),
        ("processing/volume.py", "from ctinstruct_hf.modeling import losses_ctinstruct"),
        ("processing/volume.py", "from .volume_reading import read_volume"),
        ("newroom.py", ""),
    ],
)
def test_an_import_upward_or_in_a_circle_is_found(tmp_path: Path, file: str, line: str) -> None:
    ignored = shutil.ignore_patterns("assets", "static", "__pycache__")
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "src" / "ctinstruct_hf" / file).open("a", encoding="utf-8") as source:
        source.write(f"\n{line}\n")
    assert "BROKEN" in lint(tmp_path).stdout


def test_tests_share_what_is_in_helpers_and_import_no_other_test() -> None:
    imports = re.compile(r"^\s*(?:from|import) (?:\w+\.)*(?:test_\w+|conftest)\b", re.M)
    tests = ROOT / "tests"
    assert [file.name for file in tests.rglob("*.py") if imports.search(file.read_text())] == []
