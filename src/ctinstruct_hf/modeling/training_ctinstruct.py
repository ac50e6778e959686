"""What training needs of a model beside its forward: labels that are optional, running statistics that count a batch once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


class ForwardWithLabels:
    """A `forward` whose labels are optional, for Trainer.

    Trainer takes every parameter of the *class's* `forward` with "label" in its name for one that a batch must have, else
    an evaluation has no loss and `compute_metrics` is not called. On the class only `needed` labels are seen here (without
    any, that a loss comes from any batch); on an instance, where Trainer reads which columns to keep, all parameters.
    """

    def __init__(self, function: Callable[..., Any], needed: tuple[str, ...]) -> None:
        self.function = function
        signature = inspect.signature(function)
        kept = [one for name, one in signature.parameters.items() if "label" not in name or name in needed]
        if not needed:
            kept.insert(-1, inspect.Parameter("return_loss", inspect.Parameter.KEYWORD_ONLY, default=True))

        @functools.wraps(function)
        def on_class(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        on_class.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
        self.on_class = on_class

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self.on_class if instance is None else MethodType(self.function, instance)


def needs_labels(*needed: str) -> Callable[[Callable[..., Any]], Any]:
    """Decorates a `forward` that ends in `**kwargs`; see `ForwardWithLabels`."""
    return lambda function: ForwardWithLabels(function, needed)


class CountsBatchesOnce:
    """For a `PreTrainedModel` with batch norms: gradient checkpointing, which runs blocks a second time in the backward pass, updates
    their running statistics in the first run only."""

    def _set_gradient_checkpointing(
        self: Any,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        def run_twice(block: Callable[..., Any], *inputs: Any) -> Any:
            done = False

            def run(*inputs: Any) -> Any:
                nonlocal done
                again, done = done, True
                if not again:
                    return block(*inputs)
                with _statistics_kept(_module_of(block)):
                    return block(*inputs)

            return gradient_checkpointing_func(run, *inputs)

        super()._set_gradient_checkpointing(enable, run_twice, every_n_layers)  # type: ignore[misc]


def _module_of(block: Callable[..., Any]) -> nn.Module | None:
    """The module whose forward or call a checkpointed function is."""
    owners = (*getattr(block, "args", ())[:1], getattr(getattr(block, "func", block), "__self__", None))
    return next((owner for owner in owners if isinstance(owner, nn.Module)), None)


@contextmanager
def _statistics_kept(module: nn.Module | None) -> Iterator[None]:
    """Batch norms normalise by the batch, as in training, and leave their running statistics as they are."""
    norms = [] if module is None else [one for one in module.modules() if isinstance(one, _BatchNorm)]
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms if norm.track_running_stats]
    counts = [None if count is None else count.clone() for _, _, count in before]
    for norm, _, _ in before:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for (norm, momentum, tracked), count in zip(before, counts, strict=True):
            norm.momentum = momentum
            if tracked is not None and count is not None:
                tracked.copy_(count)
