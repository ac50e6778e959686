"""Losses and gradients that are no numbers: the step is left out and counted, ten in a row end the training."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from transformers import TrainerCallback

from ..errors import CTInstructError
from ..inference.models import first_bad

logger = logging.getLogger(__name__)
MOST_IN_A_ROW = 10


def check_weights(model: torch.nn.Module) -> None:
    """Raises CTInstructError naming the first weight that holds NaN or infinity."""
    name = first_bad(model)
    if name is not None:
        raise CTInstructError(f"The weight {name} holds NaN or infinity: start from another checkpoint.")


class BadSteps(TrainerCallback):
    """Leaves out optimizer steps whose gradients are not finite.

    Gradients are the same on all processes, and so is the decision. Running statistics that such a batch has spoilt are
    put back.

    Attributes:
        count: steps left out so far.
        in_a_row: since the last good one.
        parts: names of the losses of this step that were no numbers, which the trainer notes.
        ended: the sentence, once there were too many.
    """

    def __init__(self) -> None:
        self.count = self.in_a_row = 0
        self.parts: list[str] = []
        self.ended: str | None = None
        self._kept: dict[str, torch.Tensor] = {}

    def note(self, losses: dict[str, torch.Tensor | None]) -> None:
        """Remember which losses of a forward pass are no numbers."""
        self.parts += [
            name for name, value in losses.items() if value is not None and not bool(torch.isfinite(value).all())
        ]

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._keep(model)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        if not self.parts and _finite(gradients):
            self.in_a_row = 0
            self._keep(model)
            return
        what = ", ".join(dict.fromkeys(self.parts)) or "the gradient"
        self.count += 1
        self.in_a_row += 1
        self.parts = []
        logger.warning("Step %d is left out: %s is NaN or infinity.", state.global_step + 1, what)
        model.zero_grad(set_to_none=True)  # a weight without gradient is passed over by the optimizer
        for name, value in model.named_buffers():
            if name in self._kept:
                value.data.copy_(self._kept[name])
        if self.in_a_row >= MOST_IN_A_ROW:
            self.ended = (
                f"{self.in_a_row} steps in a row gave NaN or infinity ({what}), the last at step {state.global_step + 1}: "
                "a checkpoint is written; lower learning_rate or look at the data."
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self.ended is not None:
            control.should_save = True
            control.should_training_stop = True
        return control

    def _keep(self, model: Any) -> None:
        """Copies of the running statistics, which the next forward pass changes."""
        for name, value in model.named_buffers():
            if name.endswith(("running_mean", "running_var", "num_batches_tracked")):
                if name in self._kept:
                    self._kept[name].copy_(value)
                else:
                    self._kept[name] = value.detach().clone()


def _finite(gradients: Sequence[torch.Tensor]) -> bool:
    if not gradients:
        return True
    norms = torch.stack([torch.linalg.vector_norm(one.detach().float()) for one in gradients])
    return bool(torch.isfinite(norms).all())


__all__ = ["BadSteps", "check_weights"]
