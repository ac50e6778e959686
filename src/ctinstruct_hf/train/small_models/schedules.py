"""What of a small model's training changes with the steps: weights of its losses, and when batch norms stand still."""

from __future__ import annotations

from typing import Any

from accelerate.utils import extract_model_from_parallel
from transformers import TrainerCallback

from ..batch_norm import set_batch_norm
from ..trainer import base_of


class LossSchedule(TrainerCallback):
    """Sets, before each step, how much voxels inside of a mask and names that are not learned yet count in the losses.

    Args:
        positive_voxels: {weight, end, steps, power}, see `SmallModel`.
        hard_names: {power, from}, see `SmallPretraining`.
    """

    def __init__(self, positive_voxels: dict[str, float], hard_names: dict[str, float]) -> None:
        self.positive_voxels = positive_voxels
        self.hard_names = hard_names

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        base = base_of(extract_model_from_parallel(model))
        if self.positive_voxels:
            voxels = {"weight": 1.0, "end": 1.0, "steps": state.max_steps, **self.positive_voxels}
            done = min(state.global_step / voxels["steps"], 1.0) if voxels["steps"] else 1.0
            base.positive_voxel_weight = voxels["weight"] ** (1 - done) * voxels["end"] ** done
            base.positive_voxel_power = voxels.get("power")
        if self.hard_names:
            hard = {"power": 0.0, "from": 0.0, **self.hard_names}
            base.hard_names = hard["power"] if state.global_step >= hard["from"] * state.max_steps else 0.0


class FreezeBatchNorm(TrainerCallback):
    """Batch norms keep their running statistics from a share of the steps on: a batch of one volume then is seen in training
    as it is in inference.

    Args:
        share: 0 to 1 of `max_steps`.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self.frozen = False

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.frozen and state.global_step >= self.share * state.max_steps:
            set_batch_norm(model, "frozen")
            self.frozen = True
