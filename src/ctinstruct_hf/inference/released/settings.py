"""The config of the authors' checkpoint: from the shapes of its tensors, the rest from its config.json."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch

from ...errors import CTInstructError
from ...modeling.configuration_ctinstruct import CT_RATE_DISEASES, RAD_CHESTCT_DISEASES, CTInstructConfig
from ...modeling.modeling_ctinstruct import CTInstructForConditionalGeneration
from ...processing.image_processing_ctinstruct import CTInstructImageProcessor
from ..folders import some
from .checkpoint import Entry
from .rules import HEAD, our_names, released_name

# the release's lists in the order of its heads, and their positive weights
HEADS = {"ctrate": "ct_rate", "rad": "rad_chestct"}
POSITIVE_WEIGHTS: dict[str, list[float]] = {
    "ct_rate": [
        7.36, 2.60, 8.33, 13.17, 3.03, 6.04, 2.94, 4.15, 2.90, 1.19, 1.72, 2.74, 7.44, 12.44, 8.6, 4.69, 9.00, 11.68,
    ],
    "rad_chestct": [0.93, 0.42, 7.92, 5.31, 7.78, 5.15, 2.69, 2.39, 0.26, 0.86, 6.71, 4.01, 11.03, 6.19, 5.31, 13.23],
}  # fmt: skip
# added to Qwen2-VL's tokenizer, in this order, from id 151657 on
ADDED_TOKENS = (
    "<SEG>",
    "<binary_answer>",
    "<multiple_choice>",
    "<report_generation>",
    "<segmentation>",
    "<diagnosis>",
    "<disease_confidence>",
)
# Qwen2-VL-7B-Instruct's, where neither the tensors' shapes nor the folder's config state them
HEAD_DIM = 128
_QWEN2_VL: dict[str, Any] = {
    "rope_theta": 1000000.0,
    "mrope_section": [16, 24, 24],
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
}
_TOKEN_IDS = {
    "image_token_id": 151655,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "seg_token_id": 151657,
    "disease_token_id": 151663,
}


def image_processor_of_release() -> CTInstructImageProcessor:
    """The release's preparation of a scan."""
    return CTInstructImageProcessor(fit="released", axes="file", intensity="zscore", max_patches=6)


def _shape(entries: dict[str, Entry], name: str) -> tuple[int, ...]:
    if name not in entries:
        raise CTInstructError(f"The released checkpoint lacks '{name}'.")
    return entries[name].shape


def _count(entries: dict[str, Entry], pattern: str) -> int:
    """How many layers: the largest number that the pattern finds, plus 1."""
    return max((int(match[1]) + 1 for name in entries if (match := re.match(pattern, name))), default=0)


def vision_of(
    entries: dict[str, Entry], settings: dict[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configs of the tower and of the segmentation decoder."""
    shape, count = partial(_shape, entries), partial(_count, entries)
    resnet, tower = "visual.encoder.resnet2D.", "visual.encoder.enc_spatial_transformer.layers.0."
    planes = [shape(f"{resnet}layer{stage}.0.conv1.weight")[0] for stage in range(1, 5)]
    expansion = shape(f"{resnet}layer1.0.conv3.weight")[0] // planes[0]
    head_dim = shape(tower + "1.q_scale")[0]
    width = shape(tower + "1.to_q.weight")[1]
    inner = shape(tower + "2.4.weight")[1]
    vision = {
        "attention_layout": "released",
        "stem_channels": shape(resnet + "conv1.weight")[0],
        "bottleneck_planes": planes,
        "bottleneck_expansion": expansion,
        "stage_depths": [count(rf"visual\.encoder\.resnet2D\.layer{stage}\.(\d+)\.") for stage in range(1, 5)],
        "num_attention_heads": shape(tower + "1.to_q.weight")[0] // head_dim,
        "attention_head_dim": head_dim,
        "num_patch_attention_layers": count(r"visual\.encoder\.enc_spatial_transformer\.layers\.(\d+)\."),
        "num_slice_attention_layers": count(r"visual\.encoder\.enc_temporal_transformer\.layers\.(\d+)\."),
        # the inner width is floor(width x multiple x 2 / 3); half a step more keeps rounding from losing a unit
        "feed_forward_multiple": 4.0 if inner == int(4 * width * 2 / 3) else (inner + 0.5) * 3 / (2 * width),
    }
    segmentation = (settings or {}).get("segmentation", {})
    text_width = shape("visual.projection_layer.0.weight")[0]
    decoder = {
        "feature_channels": [vision["stem_channels"], *(plane * expansion for plane in planes)],
        "hidden_size": text_width,
        "num_hidden_layers": count(r"visual\.transformer_decoder\.layers\.(\d+)\."),
        "num_attention_heads": segmentation.get("decoder_heads", 8),
        "intermediate_size": shape("visual.transformer_decoder.layers.0.linear1.weight")[0],
        "mask_hidden_size": shape("visual.mask_embed_proj.0.weight")[0],
        "last_map_size": shape("visual.decoder.decoder_vit.transp_conv.conv.weight")[-1],
    }
    return vision, decoder


def config_of(entries: dict[str, Entry], settings: dict[str, Any]) -> CTInstructConfig:
    """The config from the tensors' shapes, the rest from the folder's config `settings`."""
    vision, decoder = vision_of(entries, settings)
    lists = {}
    for released, ours, diseases in (
        ("ctrate", "ct_rate", CT_RATE_DISEASES),
        ("rad", "rad_chestct", RAD_CHESTCT_DISEASES),
    ):
        heads = _count(entries, rf"{released}_class_heads\.(\d+)\.")
        if heads != len(diseases):
            raise CTInstructError(
                f"The checkpoint has {heads} {released}_class_heads, the release has {len(diseases)}."
            )
        lists[ours] = list(diseases)
    tokens = {name: settings.get(name, default) for name, default in _TOKEN_IDS.items()}
    tokens["disease_token_id"] = settings.get("disease_confidence_token_id", tokens["disease_token_id"])
    text = {**settings, **(settings.get("text_config") or {})}
    return CTInstructConfig(
        vision_config=vision,
        segmentation_config=decoder,
        text_config=_text_config(entries, text),
        bridger="mlp",
        image_token_order="slices",
        answer_positions="sequential",
        disease_lists=lists,
        disease_positive_weights=POSITIVE_WEIGHTS,
        disease_loss_dtype="bfloat16",
        **tokens,
    )


def _text_config(entries: dict[str, Entry], text: dict[str, Any]) -> dict[str, Any]:
    """Qwen2-VL's language model: sizes from the tensors, rope and heads from the config."""
    shape = partial(_shape, entries)
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    queries = shape("model.layers.0.self_attn.q_proj.weight")[0]
    keys = shape("model.layers.0.self_attn.k_proj.weight")[0]
    heads = int(text.get("num_attention_heads") or queries // HEAD_DIM)
    vocabulary, width = shape("model.embed_tokens.weight")
    end = text.get("eos_token_id", 151645)
    pad = text.get("pad_token_id", 151643)
    return {
        "model_type": "qwen2_vl_text",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shape("model.layers.0.mlp.gate_proj.weight")[0],
        "num_hidden_layers": _count(entries, r"model\.layers\.(\d+)\."),
        "num_attention_heads": heads,
        "num_key_value_heads": keys * heads // queries,
        "rms_norm_eps": text.get("rms_norm_eps", _QWEN2_VL["rms_norm_eps"]),
        "max_position_embeddings": text.get("max_position_embeddings", _QWEN2_VL["max_position_embeddings"]),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": rope.get("rope_theta", text.get("rope_theta", _QWEN2_VL["rope_theta"])),
            "mrope_section": rope.get("mrope_section", _QWEN2_VL["mrope_section"]),
        },
        "tie_word_embeddings": "lm_head.weight" not in entries,
        "bos_token_id": text.get("bos_token_id") if (text.get("bos_token_id") or 0) < vocabulary else None,
        "eos_token_id": end if not isinstance(end, int) or end < vocabulary else None,
        "pad_token_id": pad if pad is None or pad < vocabulary else None,
    }


def check_names(entries: dict[str, Entry], config: CTInstructConfig) -> None:
    """Check that every tensor has a rule, and each of our parameters a tensor.

    Raises:
        CTInstructError: listing the names that are unknown or missing.
    """
    unknown, filled = [], set()
    for name in entries:
        if HEAD.fullmatch(name):
            continue
        try:
            filled.update(our_names(name))
        except CTInstructError:
            unknown.append(name)
    with torch.device("meta"):
        expected = {
            name: tensor.shape for name, tensor in CTInstructForConditionalGeneration(config).state_dict().items()
        }
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
    heads = [
        f"{released}_class_heads.{index}.{part}"
        for released, ours in HEADS.items()
        for index in range(len((config.disease_lists or {})[ours]))
        for part in ("weight", "bias")
    ]
    missing = [released_name(name) for name in expected if name not in filled and not name.startswith("disease_head.")]
    missing = sorted({*missing, *(name for name in heads if name not in entries)})
    if unknown or missing:
        parts = []
        if unknown:
            parts.append(f"{len(unknown)} unknown: {some(sorted(unknown))}")
        if missing:
            parts.append(f"{len(missing)} missing: {some(missing)}")
        raise CTInstructError("The checkpoint is not the released one; of its tensors " + "; ".join(parts) + ".")


__all__ = ["ADDED_TOKENS", "HEADS", "check_names", "config_of", "image_processor_of_release", "vision_of"]
