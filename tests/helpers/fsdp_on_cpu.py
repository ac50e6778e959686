"""A training of either stage from a recipe, sharded by FSDP where `accelerate launch` asks for it.

accelerate makes DDP of FSDP where there are only CPUs. torch itself shards there too, so that this lets accelerate do it: for
tests, and started by them.

accelerate launch --config_file fsdp2.yaml … fsdp_on_cpu.py recipe.json
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONFIG = Path(__file__).parents[2] / "src" / "ctinstruct_hf" / "train" / "recipes" / "accelerate" / "fsdp2.yaml"


def launch(recipe: dict[str, Any], folder: Path, sharded: bool) -> None:
    """Train in two processes, by our FSDP2 configuration or as DDP."""
    folder.mkdir(exist_ok=True)
    (folder / "recipe.json").write_text(json.dumps(recipe))
    several = (
        ["accelerate.commands.launch", "--config_file", str(CONFIG), "--mixed_precision", "no", "--num_processes", "2", "--main_process_port", "0"]
        if sharded
        else ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", *several, __file__, str(folder / "recipe.json")],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert ("sharded: True" in done.stdout) == sharded
    assert "trained: {torch.float32}" in done.stdout, done.stdout[-3000:]


def train_both_ways(recipe: dict[str, Any], folder: Path, check: Callable[[Path, Path], None]) -> None:
    """Train as DDP and by FSDP, take the end of the second away, and let it go on from what is left; `check` is called with
    the folders of the two runs, before and after."""
    ddp, fsdp = folder / "ddp", folder / "fsdp"
    for run in (ddp, fsdp):
        launch({**recipe, "output_dir": str(run)}, folder / f"{run.name}-run", sharded=run == fsdp)
    check(ddp, fsdp)
    shutil.rmtree(fsdp / f"checkpoint-{recipe['max_steps']}")
    shutil.rmtree(fsdp / "model")
    launch({**recipe, "output_dir": str(fsdp)}, folder / "again", sharded=True)
    check(ddp, fsdp)


def _shard_on_cpus() -> None:
    from accelerate import state
    from accelerate.utils import DistributedType

    begin = state.AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        begin(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    state.AcceleratorState.__init__ = init  # type: ignore[method-assign]


def _report_shards() -> None:
    from ctinstruct_hf.train import sharded

    whole_model = sharded.whole_model

    def reported(trainer: Any, everywhere: bool = False) -> Any:
        from torch.distributed.tensor import DTensor

        shards = [weight for weight in trainer.model.parameters() if isinstance(weight, DTensor)]
        held = sum(weight.to_local().numel() for weight in shards)
        groups = [group["params"] for group in trainer.optimizer.param_groups]
        trained = [weight for weight in trainer.model.parameters() if weight.requires_grad]
        print("trained:", {weight.dtype for group in [*groups, trained] for weight in group}, flush=True)
        print("sharded:", bool(shards) and held < 0.6 * sum(weight.numel() for weight in shards), flush=True)
        return whole_model(trainer, everywhere)

    sharded.whole_model = reported


if __name__ == "__main__":
    _shard_on_cpus()
    _report_shards()
    recipe = json.loads(Path(sys.argv[1]).read_text())
    if "language_model" in recipe:
        from ctinstruct_hf.train.instruct import instruct as train
    else:
        from ctinstruct_hf.train.pretrain import pretrain as train
    train(recipe)
