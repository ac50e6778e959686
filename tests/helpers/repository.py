"""Files of this repository and of the shared data beside it."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("CTINSTRUCT_SHARED", ROOT.parent / "shared"))


def shared(path: str) -> Path:
    """A file of the shared data, or a skip that says why."""
    place = SHARED / path
    if not place.exists():
        pytest.skip(f"the shared data is not here ({path})")
    return place


def script(name: str) -> Any:
    """A file of `scripts` as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
