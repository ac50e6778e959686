from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from trainings import QUICK

from ctinstruct_hf.phantoms import FINDINGS


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def recipe(tmp_path: Path, stage_one: Path, cache: Path) -> dict[str, Any]:
    """Stage two on a few slices; tests of stage one have their own."""
    slices = {"kind": "slice", "seeds": [0, 6]}
    return {
        "output_dir": str(tmp_path / "run"),
        "cache": str(cache),
        "vision": str(stage_one),
        "language_model": "tiny",
        "disease_lists": {"phantom": FINDINGS},
        "only_these_lists": True,
        "mixture": [
            {"name": "words", "phantoms": slices, "tasks": ["report", "question"]},
            {"name": "masks", "phantoms": slices, "tasks": ["segmentation"]},
            {"name": "diagnosis", "phantoms": slices, "tasks": ["diagnosis"]},
        ],
        "max_steps": 6,
        "save_steps": 3,
        **QUICK,
    }
