"""Language models of Transformers: the parts that the network is made of, and a vision-language model without its vision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn
from transformers import AutoConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto import modeling_auto

from .configuration_ctinstruct import CTInstructError


class LanguageParts(NamedTuple):
    """A causal language model in parts: `config` of its text, `body` without head, `head` Linear(D_text -> vocabulary)."""

    config: Any
    body: PreTrainedModel
    head: nn.Linear


def language_parts(model: Any) -> LanguageParts:
    """The parts of a causal language model, or of the text part of a vision-language model.

    Raises:
        CTInstructError: where the model is none of both.
    """
    name = type(model).__name__
    config = model.config.get_text_config(decoder=True)
    body = model.base_model if config is model.config else model.get_decoder().base_model
    head = model.get_output_embeddings()
    if type(body) is not modeling_auto.MODEL_MAPPING.get(type(config), None) or not reads_forward(config):
        raise CTInstructError(f"{name} is no language model: its text part ({type(body).__name__}) is no causal model.")
    shape = [body.get_input_embeddings().num_embeddings, config.hidden_size]
    if not isinstance(head, nn.Linear) or head.bias is not None or list(head.weight.shape) != shape:
        raise CTInstructError(
            f"{name} is no language model: its head is no linear layer of {shape} weights without bias."
        )
    config.tie_word_embeddings = head.weight is body.get_input_embeddings().weight
    return LanguageParts(config, body, head)


def reads_forward(config: Any) -> bool:
    """Whether a text model sees only the words before a word, as far as its config says."""
    two_way = type(config) in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    return not (config.is_encoder_decoder or two_way or getattr(config, "use_bidirectional_attention", None) is True)


def load_language_model(source: str, **loading: Any) -> Any:
    """A causal language model, or a vision-language model of which only text part and head are there: the weights of its vision
    are never read.

    Args:
        source: a folder, or a name on the Hub.
        loading: of `from_pretrained`, as `dtype` and `quantization_config`.

    Raises:
        CTInstructError: where its text part is no causal model, or weights of it are missing.
    """
    config = AutoConfig.from_pretrained(source)
    text = config.get_text_config(decoder=True)
    lists = (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING, modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    found: Any = next(
        (known[type(config)] for known in lists[:: 1 if text is config else -1] if type(config) in known), None
    )
    if found is None or not (reads_forward(config) and reads_forward(text)):
        raise CTInstructError(
            f"{source} holds a {config.model_type} model, whose text part is no causal language model."
        )
    model, report = (found if text is config else _blind(found)).from_pretrained(
        source, config=config, use_safetensors=True, output_loading_info=True, **loading
    )
    if missing := sorted(report["missing_keys"]):
        raise CTInstructError(f"{source} lacks {len(missing)} weights of its language model, as {missing[0]}.")
    return model


def _blind(kind: Any) -> Any:
    """A class of vision-language models that is made, and so loaded, without what is neither its text part nor its head. It keeps
    its name and module, by which Transformers knows how its files name their weights."""

    def make(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, config, *args, **kwargs)
        _keep_only(self, [self.get_decoder(), self.get_output_embeddings()])

    members = {"__init__": make, "__module__": kind.__module__, "_keys_to_ignore_on_load_unexpected": ["."]}
    return type(kind.__name__, (kind,), members)


def _keep_only(module: nn.Module, kept: Sequence[nn.Module | None]) -> None:
    for name, child in list(module.named_children()):
        if not any(child is one for one in kept):
            inside = any(one is part for part in child.modules() for one in kept)
            _keep_only(child, kept) if inside else setattr(module, name, None)


__all__ = ["LanguageParts", "language_parts", "load_language_model", "reads_forward"]
