"""Sizes and choices of a CTInstruct network, each field explained where it is declared."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar, Literal, get_args, get_origin

from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.models.auto import modeling_auto

try:
    from ctinstruct_hf.errors import CTInstructError
except ImportError:  # in a saved folder, on a machine without the package

    class CTInstructError(ValueError):  # type: ignore[no-redef]
        """Bad input; the message is one sentence."""


# `transformers serve` looks up the class of a model here, before it loads its code
for _table in ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES"):
    getattr(modeling_auto, _table, {})["ctinstruct"] = "CTInstructForConditionalGeneration"

# The diseases of the paper's two diagnosis benchmarks, in the order of their label files.
CT_RATE_DISEASES: list[str] = [
    "medical material",
    "arterial wall calcification",
    "cardiomegaly",
    "pericardial effusion",
    "coronary artery wall calcification",
    "hiatal hernia",
    "lymphadenopathy",
    "emphysema",
    "atelectasis",
    "lung nodule",
    "lung opacity",
    "pulmonary fibrotic sequela",
    "pleural effusion",
    "mosaic attenuation pattern",
    "peribronchial thickening",
    "consolidation",
    "bronchiectasis",
    "interlobular septal thickening",
]
RAD_CHESTCT_DISEASES: list[str] = [
    "medical material",
    "calcification",
    "cardiomegaly",
    "pericardial effusion",
    "hiatal hernia",
    "lymphadenopathy",
    "emphysema",
    "atelectasis",
    "lung nodule",
    "lung opacity",
    "pulmonary fibrotic sequela",
    "pleural effusion",
    "peribronchial thickening",
    "consolidation",
    "bronchiectasis",
    "interlobular septal thickening",
]


def check_choices(config: PreTrainedConfig) -> None:
    """Raises CTInstructError for a field with a fixed set of values that has another."""
    for name, annotation in inspect.get_annotations(type(config), eval_str=True).items():
        if get_origin(annotation) is Literal and getattr(config, name) not in get_args(annotation):
            raise CTInstructError(
                f"{config.model_type}: {name} is {getattr(config, name)!r}: use one of "
                f"{', '.join(repr(value) for value in get_args(annotation))}."
            )


class CTInstructVisionConfig(PreTrainedConfig):
    """The vision tower (section 3.2). The defaults are the paper's: ResNet-50, 2048 wide, 4 + 4 attention layers."""

    model_type = "ctinstruct_vision"
    base_config_key = "vision_config"

    architecture: Literal["hybrid", "resnet3d", "vit3d"] = "hybrid"
    """The paper's tower, or another of its table 4."""
    attention_layout: Literal["paper", "released"] = "paper"
    """`paper`: attend on the spatial grid of the last map, then pool. `released`: pool, then attend."""
    stem_channels: int = 64
    """Channels of the 7 x 7 stem convolution, the first of the five feature maps."""
    stem_windows: list[list[float]] | tuple[tuple[float, float], ...] = ()
    """Ranges [low, high] of `pixel_values` that the hybrid tower's stem reads as a channel each, clipped and stretched to
    −1…1, such as a soft-tissue and a lung window; (), as in the paper, for the slice as it is."""
    bottleneck_planes: list[int] | tuple[int, ...] = (64, 128, 256, 512)
    """Inner width of the bottlenecks of each stage; a stage gives `bottleneck_expansion` times as many channels."""
    bottleneck_expansion: int = 4
    stage_depths: list[int] | tuple[int, ...] = (3, 4, 6, 3)
    """Bottlenecks in each of the four stages."""
    num_attention_heads: int = 8
    attention_head_dim: int = 64
    attention_scale: float = 8.0
    """Factor on the cosine similarity of queries and keys."""
    num_patch_attention_layers: int = 4
    num_slice_attention_layers: int = 4
    feed_forward_multiple: float = 4.0
    """The GEGLU's inner width is floor(width x this x 2 / 3)."""
    resnet3d_planes: list[int] | tuple[int, ...] = (144, 288, 576, 1152)
    """Channels of the stages of the `resnet3d` tower, with `stage_depths` blocks each."""
    vit_hidden_size: int = 1152
    """Width of the `vit3d` tower before its last projection."""
    vit_depths: list[int] | tuple[int, ...] = (5, 5, 5, 5)
    """Transformer layers of `vit3d` in the four groups whose ends give the maps."""
    vit_patch_size: list[int] | tuple[int, ...] = (4, 32, 32)
    """Voxels (depth, height, width) of a `vit3d` token."""
    keeps_slices: bool = False
    """Whether the hybrid tower returns the slices, as its stem reads them, before the five feature maps: for
    `CTInstructSegmentationConfig.detail_channels`."""
    slice_chunk_size: int = 8
    """Slices that go through the slice encoder at once in inference; bounds the memory, changes no result."""
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        check_choices(self)

    @property
    def stage_channels(self) -> list[int]:
        return [planes * self.bottleneck_expansion for planes in self.bottleneck_planes]

    @property
    def feature_channels(self) -> list[int]:
        """Channels of the five maps, from half resolution to a thirty-second; of the slices before them, if kept."""
        slices = [max(len(self.stem_windows), 1)] if self.keeps_slices else []
        return [*slices, self.stem_channels, *self.stage_channels]

    @property
    def hidden_size(self) -> int:
        """Width D of a slice token."""
        return self.stage_channels[-1]

    @property
    def num_hidden_layers(self) -> int:
        return self.num_patch_attention_layers + self.num_slice_attention_layers


class CTInstructSegmentationConfig(PreTrainedConfig):
    """U-Net and text-prompted transformer decoder (section 3.2, figure 4)."""

    model_type = "ctinstruct_segmentation"
    base_config_key = "segmentation_config"

    feature_channels: list[int] | tuple[int, ...] = (64, 256, 512, 1024, 2048)
    """Channels of the tower's five maps; the last is also the width of its tokens."""
    hidden_size: int = 768
    """Width D_text of the queries, keys and values."""
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    intermediate_size: int = 2048
    last_map_size: int = 8
    """Side of the tower's last map, a thirty-second of the patch side, to which a token is first upsampled."""
    mask_hidden_size: int = 256
    """Inner width of the MLP from a decoded query to its mask embedding."""
    mask_activation: bool = True
    """Whether that MLP ends in a GELU, as released. Without it an embedding may be negative, and learning is faster."""
    detail_channels: int = 0
    """Channels of a map at full resolution from the slices and the U-Net, beside the U-Net's map, whose edges have half the
    resolution. Needs `CTInstructVisionConfig.keeps_slices`; 0, as in the paper, for none."""
    slice_chunk_size: int = 8
    """Slices decoded at once in inference; bounds the memory, changes no result."""
    initializer_range: float = 0.02


class CTInstructConfig(PreTrainedConfig):
    """A whole CTInstruct: tower, segmentation decoder, bridger, language model and diagnosis heads.

    `CTInstructConfig.preset("tiny")` trains on a CPU; `CTInstructConfig.preset("paper")` has the paper's sizes.

    Raises:
        ValueError: where the parts do not fit each other.
    """

    model_type = "ctinstruct"
    # an evaluation of Trainer gathers only `logits` of `CTInstructOutput`: masks differ in shape and number
    keys_to_ignore_at_inference = [
        *("past_key_values", "cache", "hidden_states", "attentions", "image_hidden_states"),
        *("lm_loss", "segmentation_loss", "disease_loss", "query_loss", "mask_logits", "disease_logits"),
    ]
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "vision_config": CTInstructVisionConfig,
        "segmentation_config": CTInstructSegmentationConfig,
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen2"),
        "text_encoder_config": SubConfigSpec(config_class=AutoConfig, model_type="mpnet", optional=True),
    }

    vision_config: Any = None
    """`CTInstructVisionConfig`, or a dict of its fields."""
    segmentation_config: Any = None
    """`CTInstructSegmentationConfig`, or a dict of its fields."""
    text_config: Any = None
    """Any causal language model of Transformers."""
    text_encoder_config: Any = None
    """Any text encoder of Transformers, for stage one only; the paper's BioLORD-2023 is an MPNet."""
    contrastive_temperature: float = 0.07
    """Of the contrastive loss in stage one."""
    learn_temperature: bool = True
    gather_features: bool = False
    """Stage one: contrast with the samples of all processes, with gradient."""
    queue_size: int = 0
    """Stage one: features of past samples to contrast with (512 in the release); 0 for none."""
    queue_momentum: float = 0.995
    queue_alpha: float = 0.4
    """Stage one: share of the momentum model's similarities in the targets, where there is a queue."""
    category_pooling: Literal["mean", "smooth_max"] = "mean"
    """Stage one, equation 4: the cosine of a class with the mean of the slice tokens, or the log-mean-exp over slices of
    the scaled cosine of each token, so that a finding of a few slices counts."""
    contrastive_pooling: Literal["mean", "smooth_max"] = "mean"
    """Stage one, contrastive loss: the projected mean of the slice tokens, or the log-mean-exp over slices of each channel of the
    projected tokens, for the same reason."""
    bridger: Literal["linear", "mlp"] = "linear"
    """`linear`: the paper's. `mlp`: Linear, GELU, Linear, GELU, as released."""
    image_token_order: Literal["patches", "slices"] = "patches"
    """Order in which the language model sees the tokens of a volume: patch by patch (the order of `pixel_values`),
    or slice by slice over the whole grid (as released)."""
    answer_positions: Literal["three_axis", "sequential"] = "three_axis"
    """Matters with three-axis rope only. `sequential`: a sequence with `<SEG>` or `<disease_confidence>` in it counts
    its image tokens like words, as the release does in those two tasks."""
    image_token_id: int = 5
    vision_start_token_id: int = 3
    vision_end_token_id: int = 4
    seg_token_id: int = 6
    disease_token_id: int = 7
    """Id of `<disease_confidence>`."""
    disease_head: Literal["per_disease", "shared"] = "per_disease"
    disease_lists: Any = None
    """{name: [diseases]}: named lists, a linear head each; `ct_rate` and `rad_chestct` by default. Always in the order of
    their names, as in a saved config."""
    disease_positive_weights: dict[str, list[float]] | None = None
    """Per list, the weight of positive cases in the binary cross entropy."""
    disease_loss_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision in which the disease loss is computed; the release casts to bfloat16."""
    segmentation_loss_weight: float = 1.0
    disease_loss_weight: float = 1.0
    names_masks: bool = False
    """True: the answer to a request for a single mask repeats its name before `<SEG>`, which small language models learn
    sooner; the paper's "Sure, it is `<SEG>`." does not."""
    structures: list[str] | None = None
    """Names of the structures that it is trained to mark, written by training; None where they are not known."""
    trained: bool = True
    """False for a checkpoint with random weights; every output says so."""
    note: str | None = None
    """A sentence on the checkpoint, such as its training data, shown with every output."""
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.disease_lists is None:
            self.disease_lists = {"ct_rate": list(CT_RATE_DISEASES), "rad_chestct": list(RAD_CHESTCT_DISEASES)}
        self.disease_lists = dict(sorted(self.disease_lists.items()))
        check_choices(self)
        if getattr(self.text_config, "tie_word_embeddings", False):
            self.tie_word_embeddings = True
        self.check_maps()
        for name, weights in (self.disease_positive_weights or {}).items():
            if len(weights) != len(self.disease_lists.get(name, [])):
                raise CTInstructError(
                    f"disease_positive_weights['{name}'] has {len(weights)} numbers for "
                    f"{len(self.disease_lists.get(name, []))} diseases."
                )

    def check_maps(self) -> None:
        """Check that the decoder reads the maps that the tower gives; to be called again after a change of either config.

        Raises:
            ValueError: where it does not.
        """
        vision: Any = self.vision_config
        segmentation: Any = self.segmentation_config
        if bool(segmentation.detail_channels) != vision.keeps_slices:
            raise CTInstructError(
                f"segmentation_config.detail_channels is {segmentation.detail_channels} and vision_config.keeps_slices "
                f"{vision.keeps_slices}: set both or none."
            )
        if vision.keeps_slices and vision.architecture != "hybrid":
            raise CTInstructError("vision_config.keeps_slices needs the hybrid tower.")
        if list(segmentation.feature_channels) != list(vision.feature_channels):
            raise CTInstructError(
                f"segmentation_config.feature_channels is {list(segmentation.feature_channels)}, but the vision tower "
                f"gives {list(vision.feature_channels)}: make them equal."
            )

    @property
    def disease_names(self) -> list[str]:
        """All diseases of all lists, flattened in order; `disease_ids` are indices of it."""
        return [name for names in (self.disease_lists or {}).values() for name in names]

    @property
    def uses_three_axis_rope(self) -> bool:
        """Whether the language model takes a position per depth, height and width (Qwen2-VL's)."""
        rope = getattr(self.text_config, "rope_parameters", None) or {}
        return "mrope_section" in rope

    @classmethod
    def preset(cls, name: Literal["tiny", "paper"], **overrides: Any) -> CTInstructConfig:
        """Sizes by name.

        Args:
            name: `tiny` (about 5 M parameters, trains on a CPU) or `paper` (ResNet-50, 2048 wide, the language model of Qwen2-VL-7B).
            overrides: fields of `CTInstructConfig` to set instead of the preset's.

        Raises:
            ValueError: for another name.
        """
        if name == "paper":
            settings: dict[str, Any] = {
                "text_config": dict(_QWEN2_VL_7B),
                "text_encoder_config": {"model_type": "mpnet"},
                **_QWEN2_TOKENS,
            }
        elif name == "tiny":
            vision = CTInstructVisionConfig(**_TINY_VISION)
            settings = {
                "vision_config": dict(_TINY_VISION),
                "segmentation_config": {**_TINY_SEGMENTATION, "feature_channels": vision.feature_channels},
                "text_config": dict(_TINY_TEXT),
                "text_encoder_config": dict(_TINY_TEXT_ENCODER),
            }
        else:
            raise CTInstructError(f"preset '{name}' is not known: use 'tiny' or 'paper'.")
        return cls(**{**settings, **overrides})


# The language model of Qwen2-VL-7B-Instruct, with the ids that its tokenizer gives the vision tokens and, appended, ours.
_QWEN2_VL_7B: dict[str, Any] = {
    "model_type": "qwen2_vl_text",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]},
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "pad_token_id": 151643,
}
_QWEN2_TOKENS: dict[str, int] = {
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "image_token_id": 151655,
    "seg_token_id": 151657,
    "disease_token_id": 151658,
}
_TINY_VISION: dict[str, Any] = {
    "stem_channels": 16,
    "bottleneck_planes": [8, 16, 32, 64],
    "stage_depths": [1, 1, 2, 1],
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "num_patch_attention_layers": 1,
    "num_slice_attention_layers": 2,
    "feed_forward_multiple": 2.0,
    "resnet3d_planes": [28, 56, 80, 112],
    "vit_hidden_size": 144,
    "vit_depths": [1, 1, 2, 1],
    "vit_patch_size": [4, 16, 16],
}
_TINY_SEGMENTATION: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "mask_hidden_size": 64,
    "last_map_size": 4,
}
_TINY_TEXT: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 2048,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

_TINY_TEXT_ENCODER: dict[str, Any] = {
    "model_type": "bert",
    "vocab_size": 2048,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "max_position_embeddings": 512,
}

__all__ = ["CTInstructConfig", "CTInstructError", "CTInstructSegmentationConfig", "CTInstructVisionConfig"]
