"""The check for a GPU, at a small width on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_part_runs_and_is_in_one_json_with_the_cards_name(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "gpu" / "check.py"), "-o", str(tmp_path / "figures.json")]
    done = subprocess.run(
        [*command, "--tiny", "--device", "cpu"], capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "figures.json").read_text())
    assert (found["card"], found["width"]) == ("CPU", "tiny")
    assert found["parity"]["tokens_float32"] < 1e-5
    assert found["parity"]["tokens_bfloat16"] < 0.05
    for part in ("tower_and_decoder", "language", "lora_step", "full_step", "compiled"):
        assert "failed" not in found[part]
    assert found["fsdp2_step"] == {"left_out": "needs a GPU"}
    assert found["language"]["study"]["ms"] > 0
