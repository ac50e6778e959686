"""Transformers' Trainer over our mixture: one task a step on every process, losses logged apart, whole checkpoints."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..data.mixture import Mixture, MixtureBatches, MixtureEntry, StreamedMixture
from ..errors import CTInstructError
from .bad_numbers import BadSteps, check_weights
from .checkpoints import mark_complete
from .outlook import Pace
from .sharded import FreshOptimizerState, ready_to_shard

LOSSES = (
    "contrastive_loss",
    "category_loss",
    "segmentation_loss",
    "cell_loss",
    "lm_loss",
    "disease_loss",
    "query_loss",
)


def data_seed(args: TrainingArguments) -> int:
    """What seeds the order and the draws of training data."""
    return args.seed if args.data_seed is None else args.data_seed


def prepare_arguments(args: TrainingArguments) -> None:
    """What every training here needs of TrainingArguments.

    Raises:
        CTInstructError: without a number of steps.
    """
    if args.max_steps <= 0:
        raise CTInstructError("The recipe has no max_steps: a mixture has no epochs.")
    args.remove_unused_columns = False
    args.logging_nan_inf_filter = False  # it hides bad losses
    if args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = True  # a step of one task leaves the heads of the others alone


def check_rates(rates: dict[str, Any], model: torch.nn.Module) -> dict[str, float]:
    """The rates as numbers. Raises CTInstructError for a prefix that no weight has."""
    names = [name for name, _ in model.named_parameters()]
    for prefix in rates:
        if not any(name.startswith(prefix) for name in names):
            raise CTInstructError(f"learning_rates names '{prefix}', but no weight begins so.")
    return {prefix: float(rate) for prefix, rate in rates.items()}


def make_mixture(entries: Sequence[MixtureEntry], args: Any, start: str | None) -> Mixture | StreamedMixture:
    """The parts together; streamed ones know by themselves where a resumed run goes on."""
    streamed = [not hasattr(entry.rows, "__len__") for entry in entries]
    if not any(streamed):
        return Mixture(entries)
    if not all(streamed):
        raise CTInstructError("The mixture has streamed and stored parts: stream all of them or none.")
    args.ignore_data_skip = True
    done = int(Path(start).name.rpartition("-")[2]) if start else 0
    return StreamedMixture(
        entries, args.per_device_train_batch_size, data_seed(args), start=done * args.gradient_accumulation_steps
    )


def base_of(model: Any) -> Any:
    """The model without adapters around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class MixtureLoop:
    """For a Trainer of Transformers or TRL: batches from a mixture, the model's own loss, each part of it logged.

    The number of steps is `max_steps`; a mixture has no epochs. `learning_rates` gives the weights under a prefix of their
    names another rate than `args.learning_rate`; the longest prefix counts.
    """

    loss_is_scaled_for_ga: bool | None = False  # the loss is a mean: it must be divided by the accumulation steps

    def begin(self: Any, mixture: Mixture | StreamedMixture) -> None:
        """To be called once the trainer is made."""
        self.model_accepts_loss_kwargs = False
        self.mixture = mixture
        self.learning_rates: dict[str, float] = {}
        self._parts: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self.pace = Pace()
        self.bad_steps = BadSteps()
        self.add_callback(self.bad_steps)
        kind, config = type(self.model), self.model.config
        self.make_anew: Callable[[], Any] = lambda: kind(config)
        if self.is_fsdp_enabled:
            ready_to_shard(self)
            self.add_callback(FreshOptimizerState())

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers. Raises CTInstructError for weights that are no numbers, and where ten steps in a row were."""
        check_weights(base_of(self.accelerator.unwrap_model(self.model)))
        result = super().train(*args, **kwargs)  # type: ignore[misc]
        if self.bad_steps.ended is not None:
            raise CTInstructError(self.bad_steps.ended)
        return result

    def get_batch_samples(self: Any, *args: Any, **kwargs: Any) -> Any:
        began = time.monotonic()
        batches, items = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        self.pace.note(time.monotonic() - began, batches)
        return batches, items

    def get_train_dataloader(self: Any) -> DataLoader:
        args = self.args
        mixture: Any = self.mixture
        settings: dict[str, Any] = {
            "collate_fn": self.data_collator,
            "num_workers": args.dataloader_num_workers,
            "pin_memory": args.dataloader_pin_memory and torch.cuda.is_available(),
            "persistent_workers": args.dataloader_persistent_workers and args.dataloader_num_workers > 0,
        }
        if args.dataloader_num_workers and args.dataloader_prefetch_factor:
            settings["prefetch_factor"] = args.dataloader_prefetch_factor
        if isinstance(mixture, StreamedMixture):  # shards itself over processes and workers
            mixture.rank, mixture.world_size = args.process_index, args.world_size
            return DataLoader(mixture, batch_size=None, **settings)
        count = args.max_steps * args.gradient_accumulation_steps
        batches = MixtureBatches(
            mixture, args.per_device_train_batch_size, count, data_seed(args), args.process_index, args.world_size
        )  # shards itself: accelerate's sharding drops batches of another size
        return DataLoader(mixture, batch_sampler=batches, **settings)  # type: ignore[arg-type]

    def create_optimizer(self: Any, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is not None or not self.learning_rates:
            return super().create_optimizer(model)  # type: ignore[misc]
        optimizer = super().create_optimizer(model)  # type: ignore[misc]
        names = {id(weight): name for name, weight in (model or self.model).named_parameters()}
        groups: list[dict[str, Any]] = []
        for group in optimizer.param_groups:
            by_rate: dict[float, list[Any]] = defaultdict(list)
            for weight in group["params"]:
                name = names[id(weight)].removeprefix("module.").removeprefix("base_model.model.")
                prefix = max((one for one in self.learning_rates if name.startswith(one)), key=len, default=None)
                by_rate[group["lr"] if prefix is None else self.learning_rates[prefix]].append(weight)
            groups += [{**group, "params": weights, "lr": rate} for rate, weights in by_rate.items()]
        optimizer.param_groups[:] = groups
        return optimizer

    def compute_loss(
        self: Any, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs)
        if outputs.loss is None:
            raise CTInstructError("A batch has nothing to learn from: check the tasks of the mixture.")
        self.bad_steps.note({name: outputs.get(name) for name in LOSSES} | {"loss": outputs.loss})
        for name in LOSSES:
            value = outputs.get(name)
            if value is not None:
                self._parts[name][0] += float(value.detach())
                self._parts[name][1] += 1
        loss = self.loss_of(outputs, inputs)
        return (loss, outputs) if return_outputs else loss

    def loss_of(self: Any, outputs: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """What a step learns from: the model's own loss."""
        return outputs.loss

    def log(self: Any, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # each part, averaged over the batches that had it
            logs |= {name: total / count for name, (total, count) in self._parts.items() if count}
            self._parts.clear()
            skipped = getattr(self.data_collator, "skipped", None)
            if skipped is not None and skipped.count:
                logs["skipped_samples"] = float(skipped.count)
            if self.bad_steps.count:
                logs["skipped_steps"] = float(self.bad_steps.count)
            pace = self.pace.since_last(self.args.world_size)
            logs |= pace
            for bar in (getattr(callback, "training_bar", None) for callback in self.callback_handler.callbacks):
                if bar is not None:
                    bar.set_postfix(pace)
        super().log(logs, start_time)  # type: ignore[misc]

    def _save_checkpoint(self: Any, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_complete(Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")


class MixtureTrainer(MixtureLoop, Trainer):
    """Transformers' Trainer whose batches come from a `Mixture` or a `StreamedMixture`; `collator` reads the voxels."""

    def __init__(self, model: Any, args: TrainingArguments, mixture: Mixture | StreamedMixture, collator: Any, **kwargs: Any) -> None:  # fmt: skip
        prepare_arguments(args)
        super().__init__(model=model, args=args, train_dataset=mixture, data_collator=collator, **kwargs)
        self.begin(mixture)
