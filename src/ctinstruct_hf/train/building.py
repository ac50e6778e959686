"""The model of a stage-two recipe: from its parts or a whole one, frozen, with adapters, in four bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..errors import CTInstructError, first_line
from ..inference.models import check_weights, load_processor, read_network, resolve_model
from ..modeling.configuration_ctinstruct import CTInstructConfig
from ..modeling.modeling_ctinstruct import SPECIAL_TOKENS, CTInstructForConditionalGeneration
from ..processing.image_processing_ctinstruct import CTInstructImageProcessor
from ..processing.processing_ctinstruct import CTInstructProcessor
from .batch_norm import set_batch_norm
from .instruct_settings import PARTS, InstructSettings
from .language_models import load_language_model, load_tokenizer
from .trainer import base_of

TURN_TOKENS = ("<|im_start|>", "<|im_end|>")  # around each turn in the processor's chat template


def build_model(settings: InstructSettings, bf16: bool = False) -> tuple[Any, CTInstructProcessor]:
    """The model of a recipe and its processor; frozen parts are frozen, adapters are on.

    What is trained is float32: bfloat16 is for what is computed with it, and loses most steps of an optimizer.

    Args:
        settings: of the recipe.
        bf16: the trainer computes in bfloat16: beside adapters, what is frozen takes half of the memory.

    Raises:
        CTInstructError: where the parts do not fit each other or the tokenizer.
    """
    loading: dict[str, Any] = {"dtype": torch.bfloat16 if bf16 and settings.lora is not None else torch.float32}
    if settings.load_in_4bit:
        loading["quantization_config"] = _four_bits()
    if settings.model is not None:
        processor = load_processor(settings.model, None)
        folder = resolve_model(settings.model).folder
        check_weights(folder)
        model = read_network(folder, **loading)
        added: list[str] = []
    else:
        model, processor, added = _from_parts(settings, loading)
    set_batch_norm(model, settings.batch_norm)
    for name in settings.freeze:
        set_batch_norm(model.get_submodule(PARTS[name]).requires_grad_(False), "frozen")
    if "language_model" in settings.freeze:
        model.lm_head.requires_grad_(False)  # its own weight, where it is not tied to the embeddings
    if settings.lora is not None:
        model = _with_adapters(model, processor, settings, added)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        kept = loading["dtype"] != torch.float32 and ("language_model." in name or "lm_head." in name)
        if tensor.is_floating_point() and (tensor.requires_grad or not kept):
            tensor.data = tensor.data.float()
    return model, processor


def build_processor(settings: InstructSettings) -> tuple[CTInstructProcessor, bool]:
    """The processor of a recipe without the model's weights, and whether answers name their structure.

    Raises:
        CTInstructError: where model, tower or tokenizer are not to be had.
    """
    if settings.model is not None:
        folder = resolve_model(settings.model).folder
        return load_processor(settings.model, None), CTInstructConfig.from_pretrained(folder).names_masks
    processor, _ = _processor_of(settings, load_tokenizer(settings.language_model))
    return processor, bool(settings.config.get("names_masks", False))


def _processor_of(settings: InstructSettings, tokenizer: Any) -> tuple[CTInstructProcessor, list[str]]:
    """The processor around a language model's tokenizer, and the tokens that the tokenizer lacked."""
    missing = [token for token in (*SPECIAL_TOKENS.values(), *TURN_TOKENS) if token not in tokenizer.get_vocab()]
    tokenizer.add_tokens(missing, special_tokens=True)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or TURN_TOKENS[1]
    tokenizer.eos_token = TURN_TOKENS[1]  # what answers end with; trainers write it into the model
    if getattr(tokenizer, "chat_template", None) is not None:
        tokenizer.chat_template = None  # the processor's own writes images
    try:
        image_processor = CTInstructImageProcessor.from_pretrained(str(settings.vision))
    except (OSError, ValueError, TypeError) as error:
        raise CTInstructError(f"vision: {settings.vision} has no image processor: {first_line(error)}") from error
    return CTInstructProcessor(image_processor, tokenizer, disease_lists=_disease_lists(settings)), missing


def _disease_lists(settings: InstructSettings) -> dict[str, list[str]]:
    known = {} if settings.only_these_lists else CTInstructConfig.preset("tiny").disease_lists
    return dict(sorted({**known, **settings.disease_lists}.items()))


def _from_parts(settings: InstructSettings, loading: dict[str, Any]) -> tuple[Any, CTInstructProcessor, list[str]]:
    assert settings.vision is not None
    language_model, tokenizer = load_language_model(settings.language_model, **loading)
    processor, added = _processor_of(settings, tokenizer)
    try:
        model = CTInstructForConditionalGeneration.from_parts(
            settings.vision, language_model, tokenizer, disease_lists=_disease_lists(settings), **settings.config
        )
    except CTInstructError:
        raise
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise CTInstructError(f"The parts of the recipe do not fit: {first_line(error)}") from error
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, processor, added


def _with_adapters(model: Any, processor: CTInstructProcessor, settings: InstructSettings, added: list[str]) -> Any:
    """LoRA on the language model. Bridger and heads start fresh and are trained whole, and so are the rows of the new
    tokens in the embeddings and, where it is not tied to them, in the head: adapters do not reach them, and what is not trained
    stays noise."""
    from peft import LoraConfig, get_peft_model

    tied = model.config.get_text_config().tie_word_embeddings
    new = processor.tokenizer.convert_tokens_to_ids(list(dict.fromkeys([*SPECIAL_TOKENS.values(), *added])))
    whole = [place for name, place in PARTS.items() if name not in ("language_model", *settings.freeze)]
    targets = settings.lora.get("target_modules", ["q_proj", "v_proj"])  # type: ignore[union-attr]
    if not isinstance(targets, str):
        targets = rf"model\.language_model\..*\.({'|'.join(targets)})"
    try:
        config = LoraConfig(**{
            "r": 8, "lora_alpha": 32, "lora_dropout": 0.1, **settings.lora,  # type: ignore[dict-item]
            "target_modules": targets,
            "modules_to_save": whole,
            "trainable_token_indices": dict.fromkeys(("embed_tokens",) if tied else ("embed_tokens", "lm_head"), new),
        })  # fmt: skip
        adapted = get_peft_model(model, config)
    except (TypeError, ValueError) as error:
        raise CTInstructError(f"lora does not fit: {str(error).strip().splitlines()[0]}") from error
    for part in adapted.modules():
        # the head's rows are the embeddings': sharding takes them once
        if getattr(part, "tied_adapter", None) is not None:
            part.__dict__ |= {
                name: part._modules.pop(name) for name in ("trainable_tokens_delta", "trainable_tokens_original")
            }
    if settings.model is not None:  # by its name, not where its files happen to be
        path = Path(settings.model)
        adapted.peft_config["default"].base_model_name_or_path = (
            str(path.resolve()) if path.is_dir() else settings.model
        )
    return adapted


def _four_bits() -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def in_full(model: Any) -> Any:
    """Weights of 4 bits as the numbers that they stand for: adapters can go into them, and the model loads without
    bitsandbytes."""
    from transformers.integrations.bitsandbytes import dequantize_and_replace

    model = dequantize_and_replace(model, _four_bits(), torch.float32)
    config = base_of(model).config
    for one in (config, config.text_config):
        if hasattr(one, "quantization_config"):
            del one.quantization_config
    return model
