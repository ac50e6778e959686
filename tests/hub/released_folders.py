"""The authors' checkpoint at a small width, saved in each of the forms in which their scripts save it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from repository import shared
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
SPECIAL = {
    "<|endoftext|>": 140, "<|im_start|>": 141, "<|im_end|>": 142, "<binary_answer>": 143, "<multiple_choice>": 144,
    "<report_generation>": 145, "<segmentation>": 146, "<diagnosis>": 147, "<|image_pad|>": 150, "<|video_pad|>": 151,
    "<|vision_start|>": 152, "<|vision_end|>": 153, "<SEG>": 154, "<disease_confidence>": 155,
}  # fmt: skip
QWEN2_VL = {
    "<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645, "<|vision_start|>": 151652,
    "<|vision_end|>": 151653, "<|image_pad|>": 151655, "<|video_pad|>": 151656,
}  # fmt: skip


def released_tensors() -> Tensors:
    return load_file(shared("reference/released_tiny/model.safetensors"))


def write_config(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(shared("reference/released_tiny/config.json"), folder)


def write_tokenizer(folder: Path, ids: dict[str, int] = SPECIAL, size: int = 160) -> None:
    """A tokenizer of single characters with the ids that a checkpoint gives the special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [chr(code) for code in range(32, 127)] + ["Ġ", "Ċ", "<unk>"]
    words = {letter: number for number, letter in enumerate(letters)} | ids
    taken = set(words.values())
    words |= {f"<{number}>": number for number in range(size) if number not in taken}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token="<unk>",
        additional_special_tokens=[name for name in ids if name not in ("<|im_end|>", "<|endoftext|>")],
    )  # fmt: skip
    tokenizer.save_pretrained(folder)


def write_sharded(
    folder: Path, tensors: Tensors, save: Callable[[Tensors, Path], None], suffix: str, index: str
) -> None:
    """Three shards and their index."""
    write_config(folder)
    weight_map = {}
    for number in range(3):
        part = dict(list(tensors.items())[number::3])
        name = f"{'model' if suffix == 'safetensors' else 'pytorch_model'}-0000{number + 1}-of-00003.{suffix}"
        save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def safetensors_shards(folder: Path, tensors: Tensors) -> None:
    write_sharded(folder, tensors, save_file, "safetensors", "model.safetensors.index.json")


def bin_shards(folder: Path, tensors: Tensors) -> None:
    write_sharded(folder, tensors, torch.save, "bin", "pytorch_model.bin.index.json")


def whole_safetensors(folder: Path, tensors: Tensors) -> None:
    write_config(folder)
    save_file(tensors, folder / "model.safetensors")


def whole_pickle(folder: Path, tensors: Tensors) -> None:
    write_config(folder)
    torch.save(tensors, folder / "pytorch_model.bin")
    torch.save({"lr": 1.0}, folder / "training_args.bin")


def old_pickle(folder: Path, tensors: Tensors) -> None:
    """As torch wrote it before 1.6, which cannot be mapped into memory."""
    write_config(folder)
    torch.save(tensors, folder / "weights.pt", _use_new_zipfile_serialization=False)


def last_checkpoint_of_a_run(folder: Path, tensors: Tensors) -> None:
    for number in (900, 2500, 10000):
        changed = tensors if number == 10000 else {name: torch.zeros_like(one) for name, one in tensors.items()}
        safetensors_shards(folder / "ctinstruct" / f"checkpoint-{number}", changed)


def zero_2(folder: Path, tensors: Tensors) -> None:
    states = folder / "global_step100"
    write_config(states)
    module = {f"module.{name}": tensor for name, tensor in tensors.items()}
    rest = {"ds_version": "0.15", "param_shapes": [{"a": torch.Size([1])}], "optimizer": None, "lr_scheduler": None}
    torch.save({"module": module, **rest}, states / "mp_rank_00_model_states.pt")
    torch.save({"optimizer_state_dict": {}}, states / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")


def wrapped(folder: Path, tensors: Tensors) -> None:
    """Saved out of peft in a data-parallel wrapper, untouched layers under their wrapper's names."""
    renamed = {f"module.base_model.model.{name}": tensor for name, tensor in tensors.items()}
    inner = "module.base_model.model.model.layers.0.self_attn.q_proj."
    renamed[f"{inner}base_layer.weight"] = renamed.pop(f"{inner}weight")
    whole_safetensors(folder, renamed)


def newer_names(folder: Path, tensors: Tensors) -> None:
    """Under the names of newer versions of Transformers."""
    renamed = {
        name.replace("model.", "model.language_model.", 1) if name.startswith("model.")
        else f"model.{name}" if name.startswith("visual.") else name: tensor
        for name, tensor in tensors.items()
    }  # fmt: skip
    whole_safetensors(folder, renamed)


FORMS = (
    safetensors_shards, bin_shards, whole_safetensors, whole_pickle, old_pickle, last_checkpoint_of_a_run, zero_2, wrapped,
    newer_names,
)  # fmt: skip


def lora_and_base(folder: Path, tensors: Tensors) -> Tensors:
    """An adapter, what was trained beside it, and a base that knows no CT; returns the merged weights.

    As the authors' scripts save it: peft's files, and the other trained weights in trained_params.safetensors.
    """
    base, adapter = folder / "qwen", folder / "adapter"
    language = {name: one for name, one in tensors.items() if name.startswith("model.") or name == "lm_head.weight"}
    own_tower = {"visual.blocks.0.attn.qkv.weight": torch.zeros(2, 2), "visual.merger.mlp.0.bias": torch.zeros(2)}
    whole_safetensors(base, {**language, **own_tower})
    write_config(adapter)
    rest = {f"base_model.model.{name}": one for name, one in tensors.items() if name not in language}
    save_file(rest, adapter / "trained_params.safetensors")
    low, merged = {}, dict(tensors)
    for layer in range(2):
        for projection in ("q_proj", "v_proj"):
            name = f"model.layers.{layer}.self_attn.{projection}"
            rows, columns = tensors[f"{name}.weight"].shape
            down, up = torch.randn(4, columns) * 0.1, torch.randn(rows, 4) * 0.1
            low |= {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up}
            merged[f"{name}.weight"] = tensors[f"{name}.weight"] + 8.0 * (up @ down)
    save_file(low, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 32, "base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    return merged


def stage_one_file(file: Path, tensors: Tensors) -> None:
    """`vision_encoder.pth`: the state of the training engine, with what stage two does not use."""
    from ctinstruct_hf.inference.released.stage_one import _PARTS

    file.parent.mkdir(parents=True, exist_ok=True)
    renamed = {}
    for name, tensor in tensors.items():
        short = name.removeprefix("visual.")
        short = "visual_encoder." + short.removeprefix("encoder.") if short.startswith("encoder.") else short
        if name.startswith("visual.") and _PARTS.fullmatch(short):
            renamed[f"module.{short}"] = tensor
    renamed["module.cls_head.weight"] = torch.zeros(3, 3)
    torch.save(renamed, file)
