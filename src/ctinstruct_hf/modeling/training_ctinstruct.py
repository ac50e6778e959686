"""What Transformers' Trainer reads of a model's class."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any


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
