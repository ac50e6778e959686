"""What small training runs of the tests share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ctinstruct_hf import CTInstructForConditionalGeneration

# what every small training of the tests shares
QUICK: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "learning_rate": "1e-3",
    "logging_steps": 1,
    "seed": 1,
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
}
SMALL = {"patch_size": {"depth": 8, "height": 64, "width": 64}, "max_patches": 1}


def losses(folder: Path) -> list[dict[str, float]]:
    state = json.loads(
        (max(folder.glob("checkpoint-*"), key=lambda path: int(path.name[11:])) / "trainer_state.json").read_text()
    )
    return [{name: value for name, value in entry.items() if "loss" in name} for entry in state["log_history"] if "loss" in entry]  # fmt: skip


def check_equal(one: Path, two: Path) -> None:
    a, b = (CTInstructForConditionalGeneration.from_pretrained(path / "model") for path in (one, two))
    for (name, first), second in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.allclose(first, second, atol=1e-5), name


def check_same_run(one: Path, two: Path) -> None:
    """The same weights at the end, and the same losses on the way."""
    check_equal(one, two)
    for first, second in zip(losses(one), losses(two), strict=True):
        assert second == pytest.approx(first, rel=1e-4)
