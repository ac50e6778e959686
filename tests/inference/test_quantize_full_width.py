"""A language model as wide as the release's, two layers of it with random weights, in 8 bits. Slow; takes 2 GB of disk, 5 of memory."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from ctinstruct_hf import CTInstructConfig, CTInstructForConditionalGeneration, CTVolume, Study
from ctinstruct_hf.data.phantoms import make_phantom
from ctinstruct_hf.inference.folders import BUNDLED_MODEL
from ctinstruct_hf.inference.models import load_model, load_processor

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
# of Qwen2-VL-7B; the vocabulary stays the bundled model's, since neither words nor `lm_head` are quantised
WIDTHS = {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4}
TOKENS = 6


def save_random_model(folder: Path) -> None:
    config = CTInstructConfig.from_pretrained(BUNDLED_MODEL)
    config.text_config.update({**WIDTHS, "num_hidden_layers": 2, "layer_types": ["full_attention"] * 2})
    config.text_config.initializer_range = 3584**-0.5  # products keep their size
    model = CTInstructForConditionalGeneration(config).float()
    model.save_pretrained(folder)
    load_processor(None).save_pretrained(folder)


def answers(volume: CTVolume, folder: Path, quantize: str | None) -> tuple[str, torch.Tensor, torch.Tensor]:
    """A report, the probabilities of all findings, and the logits [L, vocabulary] of a text."""
    load_model.cache_clear()  # one of them in memory at a time
    gc.collect()
    model, processor = load_model(str(folder), "cpu", None if quantize else "float32", quantize=quantize)
    if quantize:
        layers = [name for name, module in model.named_modules() if type(module).__name__ == "Linear8bitLt"]
        assert len(layers) == 14
    study = Study(volume, model, processor)
    with torch.inference_mode():
        logits = model(input_ids=torch.arange(64)[None] + 10).logits[0].float()
    return study.report(max_new_tokens=TOKENS), torch.tensor(list(study.diagnose("phantom").values())), logits


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_int8_at_full_width_stays_near_float32(tmp_path: Path) -> None:
    save_random_model(tmp_path)
    volume = make_phantom(3, shape=(32, 96, 96)).volume
    report, probabilities, logits = answers(volume, tmp_path, None)
    found = answers(volume, tmp_path, "int8")
    load_model.cache_clear()
    difference = float((found[1] - probabilities).abs().max())
    error = float((found[2] - logits).norm() / logits.norm())
    print(f"probabilities within {difference:.4f}, logits within {error:.4f}; {found[0]!r} for {report!r}")
    assert probabilities.std() > 0.01  # they are not all alike
    assert difference < 0.03
    assert error < 0.05
    assert (found[2].argmax(-1) == logits.argmax(-1)).float().mean() > 0.9
    assert found[0] == report
