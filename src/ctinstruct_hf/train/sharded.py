"""Trainings whose weights are shared out over processes (FSDP, DeepSpeed): what stays whole, and the whole model in the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback


@contextmanager
def built_whole(args: Any) -> Iterator[None]:
    """Models are put together whole on every process; DeepSpeed shares their weights out when the training begins, and not, as
    Transformers would have it for ZeRO 3, while they are made."""
    plugin = getattr(args, "deepspeed_plugin", None)
    if plugin is None:
        yield
        return
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if getattr(plugin, "dschf", None) is not None:
            set_hf_deepspeed_config(plugin.dschf)


def ready_to_shard(trainer: Any) -> None:
    """What FSDP has to know of a model before accelerate shards it. What is frozen in stage one stays whole on every process: each
    reads only texts that it has not read before, one more or less than the others, and momentum copies are written to within a
    forward pass. Embeddings and head with adapters, which share the rows of new tokens, are sharded with the rest of the model,
    where accelerate would shard each of them apart."""
    model = trainer.model
    encoder = getattr(model, "text_encoder", None)
    if encoder is not None:
        parts = [part for part in model.children() if not any(one.requires_grad for one in part.parameters())]
        trainer.accelerator.state.fsdp_plugin.ignored_modules = parts
        model._no_split_modules = sorted(set(model._no_split_modules) - set(encoder._no_split_modules or ()))
    if hasattr(model, "get_base_model"):
        model.get_input_embeddings = model.get_output_embeddings = lambda: None


class FreshOptimizerState(TrainerCallback):
    """Gives every trained weight an optimizer state from the start: one that no step has used has none otherwise, and a
    checkpoint without it is refused on resume."""

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        inner = getattr(optimizer, "optimizer", optimizer)
        if inner is None or inner.state:  # resumed
            return
        rates = [group["lr"] for group in inner.param_groups]
        for group in inner.param_groups:
            group["lr"] = torch.tensor(0.0) if isinstance(group["lr"], torch.Tensor) else 0.0
            for weight in group["params"]:
                weight.grad = torch.zeros_like(weight)
        inner.step()
        inner.zero_grad(set_to_none=True)
        for group, rate in zip(inner.param_groups, rates, strict=True):
            group["lr"] = rate
        for values in inner.state.values():
            for value in values.values():
                if isinstance(value, torch.Tensor):
                    value.zero_()


def whole_model(trainer: Any, everywhere: bool = False) -> Any:
    """The model with all its weights: itself, or, where every process holds a part of them, another of its kind with the
    weights of all. Every process has to call it.

    Args:
        trainer: a `MixtureLoop`, whose `make_anew` gives another model of the kind.
        everywhere: all processes need it; else only the main one gets it, and None the others.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        return model
    if everywhere and trainer.is_fsdp_enabled:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        weights = get_model_state_dict(trainer.model, options=StateDictOptions(full_state_dict=True))
    else:
        weights = trainer.accelerator.get_state_dict(trainer.model)
        if everywhere:  # DeepSpeed gives them to the main process
            shared = [weights]
            torch.distributed.broadcast_object_list(shared, src=0)
            weights = shared[0]
    if not (everywhere or trainer.is_world_process_zero()):
        return None
    whole = trainer.make_anew()
    whole.load_state_dict(weights)
    return whole.to(trainer.args.device if everywhere else "cpu")


__all__ = ["FreshOptimizerState", "built_whole", "ready_to_shard", "whole_model"]
