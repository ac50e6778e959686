"""A language model in 8 or 4 bits: what is quantised, how near its answers are, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from ctinstruct_hf import CTInstructError, CTInstructForConditionalGeneration, Study
from ctinstruct_hf.cli import app
from ctinstruct_hf.data.phantoms import make_phantom
from ctinstruct_hf.hub.released import convert_released
from ctinstruct_hf.inference import precision
from ctinstruct_hf.inference.folders import BUNDLED_MODEL
from ctinstruct_hf.inference.models import load_model, load_processor
from ctinstruct_hf.inference.packing import packer_of, quantize_folder
from ctinstruct_hf.modeling.quantization_ctinstruct import multiply_int8
from tests.hub import released_folders as forms

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
LAYERS = {"int8": "Linear8bitLt", "int4": "Linear4bit"}
# against float32: of a probability, of probabilities in the mean, of the share of voxels that differ
BOUNDS = {"int8": (0.02, 0.002, 1e-4), "int4": (0.15, 0.03, 5e-4)}


def study(quantize: str | None) -> Study:
    volume = make_phantom(3, shape=(32, 96, 96)).volume
    return Study(volume, *load_model(None, "cpu", quantize=quantize))


def quantised(model: torch.nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if type(module).__name__ in LAYERS.values()}


@pytest.fixture(scope="module")
def full() -> tuple[str, dict[str, float], torch.Tensor]:
    opened = study(None)
    return opened.report(max_new_tokens=24), opened.diagnose("phantom"), opened.mask_logits(["liver"])


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_answers_of_the_bundled_model_stay_near(
    quantize: str, full: tuple[str, dict[str, float], torch.Tensor]
) -> None:
    opened = study(quantize)
    report, probabilities, mask = full
    found = opened.diagnose("phantom")
    assert found.keys() == probabilities.keys()
    differences = torch.tensor([abs(found[name] - probabilities[name]) for name in probabilities])
    largest, mean, voxels = BOUNDS[quantize]
    assert differences.max() < largest
    assert differences.mean() < mean
    assert ((opened.mask_logits(["liver"]) > 0) != (mask > 0)).float().mean() < voxels
    answer = opened.report(max_new_tokens=24)
    assert answer if quantize == "int4" else answer == report
    layers = quantised(opened.model)
    assert len(layers) == 7 * len(opened.model.model.language_model.layers)
    assert all(name.startswith("model.language_model.layers.") for name in layers)
    assert opened.model.model.vision_tower.dtype == torch.float32


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_a_quantised_folder_answers_as_one_quantised_on_loading(quantize: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app, ["convert", "model", "-i", str(BUNDLED_MODEL), "-o", str(tmp_path / "small"), "--quantize", quantize]
    )
    assert done.exit_code == 0, (done.exception, done.output)
    again: Any = CTInstructForConditionalGeneration.from_pretrained(tmp_path / "small")
    assert quantised(again) == quantised(load_model(None, "cpu", quantize=quantize)[0])
    ids = torch.arange(20)[None] + 10
    loaded = load_model(str(tmp_path / "small"), "cpu", "float32")[0]
    expected = load_model(None, "cpu", quantize=quantize)[0]
    with torch.inference_mode():
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected(input_ids=ids).logits, atol=0.05, rtol=0.02)
    assert sum(path.stat().st_size for path in (tmp_path / "small").glob("*.safetensors")) < 2e7
    with pytest.raises(CTInstructError, match=r"quantised already \(by bitsandbytes\): leave --quantize out"):
        load_model(str(tmp_path / "small"), "cpu", quantize="int8")
    with pytest.raises(CTInstructError, match="quantised already: give the model that it was made from"):
        quantize_folder(tmp_path / "small", tmp_path / "smaller", quantize)


def test_the_authors_checkpoint_is_quantised_on_conversion(tmp_path: Path) -> None:
    forms.whole_safetensors(tmp_path / "release", forms.released_tensors())
    forms.write_tokenizer(tmp_path / "release")
    convert_released(tmp_path / "release", tmp_path / "full")
    convert_released(tmp_path / "release", tmp_path / "small", packer=lambda config: packer_of(config, "int4"))
    small, full = (CTInstructForConditionalGeneration.from_pretrained(tmp_path / name) for name in ("small", "full"))
    assert len(quantised(small)) == 14
    for (name, left), right in zip(small.named_parameters(), full.parameters(), strict=True):
        if left.shape == right.shape:
            assert torch.equal(left, right), name
    with torch.inference_mode():
        logits, expected = (model(input_ids=torch.arange(20)[None]).logits for model in (small, full))
    assert (logits - expected).norm() < 0.4 * expected.norm()  # random weights have no structure that 4 bits could keep


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_the_quick_product_with_int8_equals_the_plain_one(rows: int, dtype: torch.dtype) -> None:
    weight = torch.randint(-127, 128, (3000, 64), dtype=torch.int8)
    scale, bias, states = torch.rand(3000), torch.randn(3000), torch.randn(2, rows, 64, dtype=dtype)
    expected = states.float() @ (weight.float() * scale[:, None]).T + bias
    found = multiply_int8(weight, scale, bias, states)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, atol=0.02 * float(expected.abs().max()), rtol=0.01)


@pytest.mark.parametrize("as_dict", [False, True])
def test_a_users_own_settings_leave_out_the_same_parts(as_dict: bool) -> None:
    from transformers import BitsAndBytesConfig

    own = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["model.language_model.layers.0"])
    settings = CTInstructForConditionalGeneration.leave_out(own.to_dict() if as_dict else own)
    skipped = settings["llm_int8_skip_modules"] if as_dict else settings.llm_int8_skip_modules
    assert {"model.language_model.layers.0", *CTInstructForConditionalGeneration.modules_not_quantized} <= set(skipped)
    assert own.llm_int8_skip_modules == ["model.language_model.layers.0"]
    model = CTInstructForConditionalGeneration.from_pretrained(BUNDLED_MODEL, quantization_config=own)
    assert {name.split(".")[3] for name in quantised(model)} == {"1", "2", "3"}
    other = CTInstructForConditionalGeneration.leave_out({"quant_method": "torchao", "quant_type": "int8"})
    assert "model.vision_tower" in other["modules_to_not_convert"]


@pytest.mark.parametrize("verb", ["predict", "app", "evaluate"])
@pytest.mark.parametrize(
    ("option", "words"),
    [
        (["--quantize", "int3"], "quantize is 'int3': use int8 or int4"),
        (["--dtype", "int8"], "dtype is 'int8': use float32, bfloat16, float16 or auto"),
    ],
)
def test_what_is_no_quantisation_is_refused(
    verb: str, option: list[str], words: str, small_scan: Path, tmp_path: Path
) -> None:
    arguments = {
        "predict": ["-i", str(small_scan), "-o", str(tmp_path / "out"), "--device", "cpu"],
        "evaluate": ["--data", "phantoms:slice:0-2", "-o", str(tmp_path / "out")],
        "app": ["--no-browser"],
    }[verb]
    done = CliRunner().invoke(app, [verb, *arguments, *option])
    assert isinstance(done.exception, CTInstructError), (done.exception, done.output)
    assert words in str(done.exception)


def test_a_device_that_the_library_does_not_know_is_refused() -> None:
    with pytest.raises(CTInstructError, match="cannot compute int8 on vulkan"):
        precision.quantization_of("int8", torch.device("vulkan"))


# a model of the release's size: 6.5 billion parameters in layers of the language model, 1.9 in the rest
SIZES = {
    "model.language_model.layers.0.mlp.up_proj.weight": (6_500_000, 1000),
    "model.vision_tower.x": (1_900_000, 1000),
}


@pytest.mark.parametrize(
    ("free", "words"),
    [
        (15.9e9, r"needs 18\.3 GB, but the memory has 15\.9 GB free: --quantize int8 would take 11\.9 GB"),
        (9.5e9, r"9\.5 GB free: --quantize int4 would take 9\.0 GB"),
        (6e9, r"even --quantize int4 would take 9\.0 GB, use a machine with more"),
    ],
)
def test_a_model_that_does_not_fit_says_what_would(free: float, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "free_memory", lambda device: free)
    with pytest.raises(CTInstructError, match=words):
        precision.choose_precision("the model", SIZES, "cpu", None)


def test_a_full_gpu_becomes_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "free_memory", lambda device: 12e9)
    device = torch.device("cuda", 1)
    with (
        pytest.raises(CTInstructError, match=r"cuda:1 has 12\.0 GB free: --quantize int8 would take"),
        precision.explaining_memory("the model", SIZES, device, torch.bfloat16, None),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_large_models_are_not_loaded_in_float32_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "free_memory", lambda device: None)
    small = {"model.language_model.layers.0.mlp.up_proj.weight": (1000, 1000)}
    for amx in (False, True):
        monkeypatch.setattr(precision, "has_amx", lambda found=amx: found)
        assert precision.choose_precision("m", SIZES, "cpu", None).dtype == torch.bfloat16
        assert precision.choose_precision("m", SIZES, "cpu", "float32").dtype == torch.float32
        assert precision.choose_precision("m", small, "cpu", None).dtype == torch.float32
        assert precision.choose_precision("m", small, "cpu", "auto").dtype == (torch.bfloat16 if amx else torch.float32)
    chosen = precision.choose_precision("m", SIZES, "meta", None)
    assert chosen.loading() == {"dtype": torch.bfloat16, "device_map": {"": torch.device("meta")}}
    assert "is loaded in bfloat16, 16.8 GB" in str(chosen.note)


def test_parts_may_be_in_other_numbers() -> None:
    """Tower in float32, the rest in bfloat16, and the other way round."""
    volume = make_phantom(3, shape=(32, 96, 96)).volume
    for whole, tower in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        model = CTInstructForConditionalGeneration.from_pretrained(BUNDLED_MODEL, dtype=whole).eval()
        model.model.vision_tower.to(tower)
        model.optimize_for_inference()
        opened = Study(volume, model, load_processor(None))
        assert len(opened.report(max_new_tokens=3).split()) > 0
        assert opened.segment("liver").any()
        assert set(opened.diagnose("phantom").values())


def test_predict_takes_the_length_and_beams_of_answers(small_scan: Path, tmp_path: Path) -> None:
    arguments = ["predict", "-i", str(small_scan), "-o", str(tmp_path / "out"), "--report"]
    options = ["--device", "cpu", "--quantize", "int8", "--max-new-tokens", "3", "--num-beams", "2"]
    done = CliRunner().invoke(app, [*arguments, *options])
    assert done.exit_code == 0, (done.exception, done.output)
    found = json.loads((tmp_path / "out" / "findings.json").read_text())
    assert found["asked"]["generation"] == {"max_new_tokens": 3, "num_beams": 2}
    assert found["asked"]["quantize"] == "int8"
    assert 0 < len(found["report"].split()) < 4
