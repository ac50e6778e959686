"""Features of Transformers and peft that a user expects of any model: each gives here what it gives elsewhere."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    GenerationConfig,
    Trainer,
    TrainingArguments,
)
from transformers.generation import ContinuousBatchingConfig
from transformers.models.auto import modeling_auto

from ctinstruct_hf import (
    CTInstructConfig,
    CTInstructError,
    CTInstructForConditionalGeneration,
    CTInstructImageProcessor,
    CTInstructSegmentationConfig,
    CTInstructVisionConfig,
    read_volume,
)
from ctinstruct_hf.inference.study import BUNDLED_MODEL
from ctinstruct_hf.modeling.vision_attention_ctinstruct import RelativePositionBias
from ctinstruct_hf.processing import volume as volume_module
from ctinstruct_hf.processing.volume import is_volume
from tests.hub.stand_in import running


def batch(config: CTInstructConfig) -> dict[str, torch.Tensor]:
    image = [config.vision_start_token_id, *[config.image_token_id] * 4, config.vision_end_token_id]
    generator = torch.Generator().manual_seed(3)
    return {
        "input_ids": torch.tensor([[10, *image, 11]]),
        "pixel_values": torch.randn(4, 64, 64, generator=generator),
        "patch_grid": torch.tensor([[2, 1, 1, 2]]),
    }


@pytest.fixture(scope="module")
def model(tiny_config) -> CTInstructForConditionalGeneration:
    torch.manual_seed(0)
    return CTInstructForConditionalGeneration(tiny_config()).eval()


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True}], ids=str)
@torch.no_grad()
def test_generation_gives_hidden_states_and_attentions(tiny_config, options: dict[str, Any]) -> None:
    model = CTInstructForConditionalGeneration(tiny_config()).eval()
    model.set_attn_implementation("eager")
    outputs = model.generate(
        **batch(model.config), max_new_tokens=3, min_new_tokens=3, return_dict_in_generate=True,
        output_hidden_states=True, output_attentions=True, **options,
    )  # fmt: skip
    rows = options.get("num_beams", 1)
    assert len(outputs.hidden_states) == len(outputs.attentions) == 3  # steps
    assert [tuple(state.shape) for state in outputs.hidden_states[0]] == [(rows, 8, 32)] * 3  # layers and embeddings
    assert [tuple(weights.shape) for weights in outputs.attentions[1]] == [(rows, 4, 1, 9)] * 2
    whole = model(**batch(model.config), output_hidden_states=True, output_attentions=True)
    for ours, theirs in zip(outputs.hidden_states[0], whole.hidden_states, strict=True):
        torch.testing.assert_close(ours[:1], theirs, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(outputs.attentions[0], whole.attentions, strict=True):
        torch.testing.assert_close(ours[:1], theirs, atol=1e-5, rtol=1e-5)


def test_continuous_batching_answers_like_generate(model) -> None:
    prompts = [[10, 11, 12, 13], [14, 15], [16, model.config.disease_token_id, 17]]
    greedy = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1)
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64, page_size=16)
    together = model.generate_batch(prompts, greedy, continuous_batching_config=small)
    answers = [answer.generated_tokens for _, answer in sorted(together.items())]
    for prompt, answer in zip(prompts, answers, strict=True):
        alone = model.generate(torch.tensor([prompt]), max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert alone[0, len(prompt) :].tolist() == answer
    assert model.config._attn_implementation == "sdpa"


def test_an_answer_may_have_256_tokens_unless_somebody_says_another_length(tiny_config, tmp_path: Path) -> None:
    model = CTInstructForConditionalGeneration(tiny_config()).eval()
    model.generation_config.eos_token_id = None
    ids = torch.tensor([[10, 11]])
    assert model.generation_config.max_new_tokens == 256
    model.generation_config.max_new_tokens = 4
    assert model.generate(ids).shape[1] == 6
    assert model.generate(ids, max_new_tokens=3).shape[1] == 5
    assert model.generate(ids, max_length=7).shape[1] == 7
    assert model.generate(ids, generation_config=GenerationConfig(max_length=6)).shape[1] == 6
    CTInstructForConditionalGeneration(tiny_config()).save_pretrained(tmp_path)
    file = tmp_path / "generation_config.json"
    settings = json.loads(file.read_text())
    assert settings.pop("max_new_tokens") == 256
    file.write_text(json.dumps(settings))  # a folder saved before
    assert CTInstructForConditionalGeneration.from_pretrained(tmp_path).generation_config.max_new_tokens == 256
    file.write_text(json.dumps({**settings, "max_new_tokens": 30}))
    assert CTInstructForConditionalGeneration.from_pretrained(tmp_path).generation_config.max_new_tokens == 30


@pytest.mark.parametrize(
    ("config", "name", "value"),
    [
        (CTInstructConfig, "bridger", "foo"),
        (CTInstructConfig, "image_token_order", "rows"),
        (CTInstructConfig, "answer_positions", None),
        (CTInstructConfig, "disease_head", "both"),
        (CTInstructConfig, "disease_loss_dtype", "float64"),
        (CTInstructConfig, "category_pooling", "max"),
        (CTInstructConfig, "contrastive_pooling", "max"),
        (CTInstructVisionConfig, "architecture", "resnet2d"),
        (CTInstructVisionConfig, "attention_layout", "none"),
    ],
    ids=str,
)
def test_fields_with_a_fixed_set_of_values_refuse_others(config: Any, name: str, value: Any) -> None:
    with pytest.raises(CTInstructError, match=f"{name} is {value!r}: use one of"):
        config(**{name: value})


def test_a_wrong_choice_in_a_part_is_refused_with_the_whole() -> None:
    with pytest.raises(CTInstructError, match="architecture"):
        CTInstructConfig(vision_config={"architecture": "foo"})
    assert CTInstructSegmentationConfig().model_type == "ctinstruct_segmentation"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_position_bias_has_the_device_and_dtype_of_its_input(dtype: torch.dtype) -> None:
    bias = RelativePositionBias(8, 2, axes=3).to(dtype)
    bias.out.weight.requires_grad_(False)
    like = torch.zeros(1, dtype=dtype)
    assert bias((2, 1, 3), like).dtype == dtype
    bias.to("meta")
    assert bias((2, 1, 3), like.to("meta")).device.type == "meta"


@torch.no_grad()
def test_all_weights_may_lie_on_disk(model, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    offloaded = AutoModelForImageTextToText.from_pretrained(
        tmp_path, device_map={"": "disk"}, offload_folder=str(tmp_path / "offload")
    ).eval()
    inputs = batch(model.config)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[model.config.seg_token_id]])], dim=1)
    ours, theirs = offloaded(**inputs), model(**inputs)
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.mask_logits[0], theirs.mask_logits[0], atol=1e-5, rtol=1e-5)


def test_an_added_adapter_is_saved_alone_and_in_checkpoints(tiny_config, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(0)
    model = CTInstructForConditionalGeneration(tiny_config())
    model.save_pretrained(tmp_path / "base")
    model = CTInstructForConditionalGeneration.from_pretrained(tmp_path / "base")
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    row = {"input_ids": torch.tensor([10, 11, 12]), "labels": torch.tensor([10, 11, 12])}
    arguments = TrainingArguments(str(tmp_path / "run"), max_steps=1, save_steps=1, report_to="none", use_cpu=True)
    Trainer(model, arguments, train_dataset=[row]).train()
    model.save_pretrained(tmp_path / "adapter")
    model.eval()
    ids = row["input_ids"][None]
    for folder in (tmp_path / "adapter", tmp_path / "run" / "checkpoint-1"):
        assert not (folder / "config.json").exists()
        again = CTInstructForConditionalGeneration.from_pretrained(tmp_path / "base").eval()
        without = again(ids).logits
        again.load_adapter(str(folder))
        torch.testing.assert_close(again(ids).logits, model(ids).logits)
        assert not torch.equal(again(ids).logits, without)


PUSH = """
import sys
from ctinstruct_hf import CTInstructForConditionalGeneration, CTInstructProcessor
model, processor, out = sys.argv[1:]
model = CTInstructForConditionalGeneration.from_pretrained(model)
model.save_pretrained(out, push_to_hub=True, repo_id="me/ct")
CTInstructProcessor.from_pretrained(processor).save_pretrained(out, push_to_hub=True, repo_id="me/ct")
model.push_to_hub("me/again")
"""


def test_pushing_to_the_hub_sends_the_code(model, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "model"
    model.save_pretrained(source)
    with running() as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_TOKEN": "hf_test", "HF_HOME": str(tmp_path / "home"),
                       "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}  # fmt: skip
        command = [sys.executable, "-c", PUSH, str(source), str(BUNDLED_MODEL), str(out)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, (done.stderr[-3000:], hub.asked)
        sent, again = hub.repositories["me/ct"]["files"], hub.repositories["me/again"]["files"]
    saved = {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()}
    assert {name: sent[name] for name in saved if name != "README.md"} == {
        name: content for name, content in saved.items() if name != "README.md"
    }
    for files in (sent, again):
        assert "AutoModelForImageTextToText" in json.loads(files["config.json"])["auto_map"]
        assert {"modeling_ctinstruct.py", "saving_ctinstruct.py", "training_ctinstruct.py"} <= set(files)
    assert {"processing_ctinstruct.py", "image_fetching.py", "arguments_ctinstruct.py"} <= set(sent)
    assert b"is_local" not in sent["tokenizer_config.json"]


def test_transformers_serve_finds_the_model(model, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    assert type(AutoModelForMultimodalLM.from_pretrained(tmp_path)) is CTInstructForConditionalGeneration
    assert "AutoModelForMultimodalLM" in json.loads((tmp_path / "config.json").read_text())["auto_map"]
    for table in ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES"):
        assert getattr(modeling_auto, table)["ctinstruct"] == "CTInstructForConditionalGeneration"
    pytest.importorskip("openai", reason="transformers[serving] is not installed")
    from transformers.cli.serving.model_manager import ModelManager

    assert ModelManager.get_model_modality(model).name == "MULTIMODAL"


def test_a_volume_of_another_copy_of_the_code_is_a_volume() -> None:
    spec = importlib.util.spec_from_file_location("volume_of_a_saved_folder", volume_module.__file__)
    assert spec is not None
    assert spec.loader is not None
    text = Path(volume_module.__file__).read_text()
    copy = importlib.util.module_from_spec(spec)
    copy.__package__ = volume_module.__package__
    sys.modules[spec.name] = copy
    exec(compile(text, "volume.py", "exec"), copy.__dict__)
    ours = read_volume(np.zeros((4, 32, 32), np.int16), spacing=(1.0, 1.0, 1.0))
    theirs = copy.CTVolume(ours.hu, ours.affine, ours.source)
    del sys.modules[spec.name]
    assert not isinstance(theirs, type(ours))
    assert is_volume(theirs)
    assert read_volume(theirs) is theirs
    processor = CTInstructImageProcessor(patch_size={"depth": 4, "height": 32, "width": 32}, max_patches=1)
    assert torch.equal(
        processor(theirs, return_tensors="pt")["pixel_values"], processor(ours, return_tensors="pt")["pixel_values"]
    )
    assert processor.mask_from_canvas(torch.ones(4, 32, 32), theirs).all()
