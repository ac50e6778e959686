"""Hugging Face's client, pointed to a Hub of the tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from ctinstruct_hf.inference import models


def point_to(monkeypatch: pytest.MonkeyPatch, address: str, cache: Path) -> None:
    """Have the client, which reads its settings when it is imported, use this Hub."""
    import huggingface_hub
    from huggingface_hub import constants, hf_api

    old = constants.ENDPOINT
    for name, value in {"ENDPOINT": address, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": False,
                        "HUGGINGFACE_CO_URL_TEMPLATE": constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(old, address)}.items():  # fmt: skip
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(hf_api.api, "endpoint", address)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    assert huggingface_hub.HfApi().endpoint == address
    for cached in (models._snapshot, models.load_processor, models.load_model):
        cached.cache_clear()
