"""The monthly check and the audit read what other tools say rightly; both need the package index to run in earnest."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from repository import script

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def check() -> Any:
    return script("check_releases")


def test_newer_releases_are_found_by_any_spelling(check: Any) -> None:
    tested = check.pins("# the set\ntorch==2.13.0\nhuggingface_hub==2.4.0\nPyYAML==6.0.4\n")
    newest = check.pins("torch==2.13.0+cpu\nhuggingface-hub==2.5.0\npyyaml==6.0.4\nother==1\n")
    assert check.newer(tested, newest, {"torch", "huggingface-hub", "pyyaml", "other"}) == {"huggingface-hub": ("2.4.0", "2.5.0")}  # fmt: skip


def test_every_dependency_has_a_tested_version_and_a_lower_bound(check: Any) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = check.named(project)
    assert {"torch", "transformers", "fastapi", "highdicom"} <= names
    wanted = [*project["dependencies"], *(one for part in project["optional-dependencies"].values() for one in part)]
    assert all(">=" in one and "<" not in one for one in wanted if not one.startswith("ctinstruct-hf"))
    user = check.named({**project, "optional-dependencies": {}})
    assert user <= set(check.pins((ROOT / "constraints.txt").read_text()))


def test_failures_are_read_from_the_summary(check: Any) -> None:
    log = "..F\nFAILED tests/a.py::test_one[x] - AssertionError: no\nERROR tests/b.py::test_two\n1 failed, 2 passed"
    assert check.failed_tests(log) == ["tests/a.py::test_one[x]", "tests/b.py::test_two"]


def test_known_holes_are_told_unless_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    audit = script("audit")
    hole = {"id": "PYSEC-1", "fix_versions": ["2.0"], "aliases": [], "description": ""}
    told = {"dependencies": [{"name": "a", "version": "1.0", "vulns": [hole]}, {"name": "b", "version": "1.0", "vulns": []},
                             {"name": "c", "skip_reason": "not found on PyPI"}]}  # fmt: skip
    holes, sentence = audit.judge(told)
    assert holes == ["a 1.0: PYSEC-1, mended in 2.0"]
    assert sentence.startswith("2 of 3 packages were asked for, 1 holes")
    monkeypatch.setitem(audit.EXPLAINED, "PYSEC-1", "its part is not used")
    assert audit.judge(told)[0] == []
    assert "no advisories" in audit.judge({"dependencies": told["dependencies"][2:]})[1]
