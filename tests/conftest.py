"""What tests share: tiny models, small scans, the shared data where it is there."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np
import pytest
import torch

if TYPE_CHECKING:
    from processes import WarmCommand

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # workers side by side, a thread each
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "conformance"), str(ROOT / "tests")]

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


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(scope="session")
def tiny_config():
    """A function that makes the smallest config with every part."""
    from tiny import tiny_config

    return tiny_config


@pytest.fixture(scope="session")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny preset with random weights, as a folder."""
    from ctinstruct_hf.phantoms.tiny import build_tiny

    folder = tmp_path_factory.mktemp("models") / "tiny"
    build_tiny(folder)
    return folder


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmCommand]:
    """`ctinstruct` as a process of its own at each call, without the time of imports."""
    from processes import WarmCommand

    command = WarmCommand(tmp_path_factory.mktemp("warm"))
    yield command
    command.close()


@pytest.fixture
def small_scan(tmp_path: Path) -> Path:
    """A small phantom as NIfTI."""
    from ctinstruct_hf.phantoms import make_phantom

    path = tmp_path / "scan.nii.gz"
    volume = make_phantom(1, shape=(24, 48, 48)).volume
    nib.save(volume.to_source(volume.hu), path)
    return path
