"""The smallest CTInstruct that has every part, for the suites."""

from __future__ import annotations

from ctinstruct_hf import CTInstructConfig

VOCABULARY = 99


def tiny_config(**overrides: object) -> CTInstructConfig:
    settings: dict[str, object] = {
        "vision_config": {
            "stem_channels": 4,
            "bottleneck_planes": [2, 4, 4, 8],
            "stage_depths": [1, 1, 1, 1],
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_patch_attention_layers": 1,
            "num_slice_attention_layers": 1,
        },
        "segmentation_config": {
            "feature_channels": [4, 8, 16, 16, 32],
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "mask_hidden_size": 8,
            "last_map_size": 1,
        },
        "text_config": {
            "model_type": "qwen2",
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 37,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "pad_token_id": 1,
        },
        "text_encoder_config": {
            "model_type": "bert",
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 37,
            "max_position_embeddings": 64,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
    }
    return CTInstructConfig(**{**settings, **overrides})
