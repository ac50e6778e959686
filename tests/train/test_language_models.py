"""Stage two on language models of Transformers as their own classes save them: causal ones, and text parts of vision-language models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsdp_on_cpu
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from trainings import check_same_run

from ctinstruct_hf import CTInstructError, CTInstructForConditionalGeneration
from ctinstruct_hf.phantoms.vocabulary import train_tokenizer
from ctinstruct_hf.train.building import build_model
from ctinstruct_hf.train.instruct import InstructSettings, instruct
from ctinstruct_hf.train.language_models import load_language_model
from ctinstruct_hf.train.recipe import INSTRUCT, parse_recipe, read_recipe

TEXT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
THREE_AXES = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
QWEN_EYES = {"depth": 1, "num_heads": 2, "patch_size": 4, "in_channels": 3}
CLIP_EYES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}  # fmt: skip
# name -> (type, of the text, of the vision, whether the head is tied to the embeddings)
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any], bool]] = {
    "Qwen2-VL": ("qwen2_vl", THREE_AXES, {**QWEN_EYES, "embed_dim": 16, "hidden_size": 32}, True),
    "Qwen2.5-VL": ("qwen2_5_vl", THREE_AXES, {**QWEN_EYES, "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 16}, False),
    "Qwen3-VL": ("qwen3_vl", THREE_AXES, {**QWEN_EYES, "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 16, "deepstack_visual_indexes": [0]}, True),
    "Llava": ("llava", {"model_type": "llama"}, {"model_type": "clip_vision_model", **CLIP_EYES}, False),
    "Gemma 3": ("gemma3", {"sliding_window": 16}, CLIP_EYES, True),
}  # fmt: skip


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny random model of each family with a tokenizer, saved by its own class; made when asked for."""
    home = tmp_path_factory.mktemp("families")

    def make(name: str) -> Path:
        from transformers import AutoConfig, AutoModelForImageTextToText

        folder = home / name
        if folder.exists():
            return folder
        kind, text, vision, tied = FAMILIES[name]
        tokenizer = train_tokenizer()
        text = {**TEXT, **text, "vocab_size": len(tokenizer), "tie_word_embeddings": tied}
        config = AutoConfig.for_model(kind, text_config=text, vision_config=vision, tie_word_embeddings=tied)
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
        for weight in model.parameters():
            weight.data.normal_(std=0.1)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize("name", FAMILIES)
def test_the_text_part_of_a_vision_language_model_speaks_alone(
    name: str,
    families: Any,
    stage_one: Path,
    tmp_path: Path,
) -> None:
    """Its logits on words are those of the whole model; its vision is neither there nor saved, and it loads again."""
    from transformers import AutoModelForImageTextToText

    folder = families(name)
    whole = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    settings = InstructSettings(
        vision=str(stage_one), language_model=str(folder), mixture=[{"phantoms": {"kind": "slice", "seeds": [0, 1]}}]
    )
    model, processor = build_model(settings)
    assert not [part for part in load_language_model(str(folder))[0].modules() if "Vision" in type(part).__name__]
    ids = torch.tensor([processor.tokenizer("The liver is normal.")["input_ids"]])
    asked = whole(input_ids=ids, mm_token_type_ids=torch.zeros_like(ids)) if "Gemma" in name else whole(input_ids=ids)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(input_ids=ids).logits[..., : asked.logits.shape[-1]], asked.logits)
    assert model.config.tie_word_embeddings == FAMILIES[name][3] == (model.lm_head.weight is model.get_input_embeddings().weight)  # fmt: skip
    assert model._no_split_modules <= {type(part).__name__ for part in model.modules()}
    assert model.config.uses_three_axis_rope == name.startswith("Qwen")
    model.save_pretrained(tmp_path / "model")
    again = CTInstructForConditionalGeneration.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert again.state_dict().keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_the_vision_of_a_language_model_is_never_read(families: Any, tmp_path: Path) -> None:
    """Tensors of the vision cut out of the file, as nobody could if they were loaded."""
    folder = families("Llava")
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        words = {
            name: file.get_tensor(name)
            for name in list(file.keys())
            if "vision" not in name and "projector" not in name
        }
    save_file(words, tmp_path / "model.safetensors", {"format": "pt"})
    model, _ = load_language_model(str(tmp_path))
    whole, _ = load_language_model(str(folder))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in whole.state_dict().items())
    save_file(dict(list(words.items())[1:]), tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CTInstructError, match="lacks 1 weights of its language model, as "):
        load_language_model(str(tmp_path))


def test_a_language_model_of_other_turns_learns_where_an_answer_ends(
    recipe: dict[str, Any],
    families: Any,
    tmp_path: Path,
) -> None:
    """The tokens around a turn are added where its tokenizer lacks them, and their rows are trained beside adapters."""
    folder = tmp_path / "lm"
    folder.mkdir()
    for path in families("Gemma 3").iterdir():
        text = path.read_bytes()
        (folder / path.name).write_bytes(text.replace(b"<|im_", b"<|of_") if path.suffix == ".json" else text)
    recipe |= {"language_model": str(folder), "lora": {"r": 2}, "max_steps": 2, "save_steps": 2, "learning_rate": 0.01}
    before, processor = build_model(parse_recipe({**recipe, "trainer": "transformers"}, InstructSettings)[0])
    ends = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert before.generation_config.eos_token_id == ends != processor.tokenizer.unk_token_id
    instruct(recipe)
    model = CTInstructForConditionalGeneration.from_pretrained(tmp_path / "run" / "model")
    rows = [one.get_input_embeddings().weight for one in (before.get_base_model(), model)]
    assert model.generation_config.eos_token_id == [ends]
    assert len(rows[1]) == len(processor.tokenizer)
    assert (rows[0] != rows[1]).any(1)[ends]
    assert model.lm_head.weight is rows[1]


@pytest.mark.parametrize("kind", ["bert", "t5", "clip", "blip-2", "phi"])
def test_what_is_no_causal_model_is_refused_before_the_first_step(
    kind: str,
    recipe: dict[str, Any],
    tmp_path: Path,
) -> None:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

    small = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 99,
    }
    changes: dict[str, dict[str, Any]] = {
        "t5": {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 99},
        "clip": {"text_config": small, "vision_config": CLIP_EYES},
        "blip-2": {
            "text_config": {"model_type": "t5", "d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 99},
            "vision_config": CLIP_EYES, "qformer_config": {**small, "encoder_hidden_size": 16},
        },
    }  # fmt: skip
    config = AutoConfig.for_model(kind, **changes.get(kind, small))
    auto = {"blip-2": AutoModelForImageTextToText, "phi": AutoModelForCausalLM}.get(kind, AutoModel)
    auto.from_config(config).save_pretrained(tmp_path / "lm")
    train_tokenizer().save_pretrained(tmp_path / "lm")
    words = "no linear layer" if kind == "phi" else f"holds a {kind} model, whose text part is no causal language model"
    with pytest.raises(CTInstructError, match=words):
        instruct({**recipe, "language_model": str(tmp_path / "lm")})
    assert not list(Path(recipe["output_dir"]).glob("checkpoint-*"))


def test_both_recipes_of_the_paper_begin_with_the_language_model_that_it_names() -> None:
    for name in ("paper", "paper-lora-1gpu"):
        assert read_recipe(name, [], INSTRUCT)["language_model"] == "Qwen/Qwen2-VL-7B-Instruct"


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("name", ["Qwen2-VL", "Llava"])
def test_adapters_train_under_fsdp_as_under_ddp_save_and_resume(
    name: str, recipe: dict[str, Any], families: Any, tmp_path: Path
) -> None:
    """Each process holds half of the weights, of adapters and of new tokens' rows among them, with a tied head and one of its own."""
    recipe |= {
        "optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.01, "max_grad_norm": 0.0, "max_steps": 2,
        "save_steps": 1, "lr_scheduler_type": "constant", "freeze": ["vision_tower"], "lora": {"r": 4, "lora_dropout": 0.0},
        "language_model": str(families(name)),
    }  # fmt: skip

    fsdp_on_cpu.train_both_ways(recipe, tmp_path, check_same_run)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("lora", [None, {"r": 2}])
def test_what_two_processes_train_is_float32_where_bfloat16_computes(
    sharded: bool, lora: dict[str, Any] | None, recipe: dict[str, Any], families: Any, tmp_path: Path
) -> None:
    """The language model's file holds bfloat16; `fsdp_on_cpu.launch` looks at the dtypes that the trainer has prepared. The best
    checkpoint is loaded at the end, as the recipe of the paper has it."""
    recipe |= {"language_model": str(families("Qwen2-VL")), "lora": lora, "bf16": True, "max_steps": 1, "save_steps": 1}
    recipe |= {
        "evaluation": {"phantoms": {"kind": "slice", "seeds": [50, 51]}, "batches": 2}, "eval_strategy": "steps",
        "eval_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False,
    }  # fmt: skip
    fsdp_on_cpu.launch(recipe, tmp_path / "run", sharded)
