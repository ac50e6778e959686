"""CTInstruct: slices become tokens, tokens join the words, `<SEG>` becomes a mask, `<disease_confidence>` a number.

Read top to bottom: encode (tower, bridger) -> place the image tokens -> language model -> answer heads.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForPreTraining, GenerationMixin
from transformers.generation.utils import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from .configuration_ctinstruct import CTInstructConfig, CTInstructError, CTInstructSegmentationConfig
from .losses_ctinstruct import label_loss, masks_loss
from .saving_ctinstruct import SavesItsCode
from .segmentation_ctinstruct import CTInstructSegmentationDecoder
from .small_models_ctinstruct import prompt_loss
from .training_ctinstruct import needs_labels
from .vision_attention_ctinstruct import CosineAttention
from .vision_blocks_ctinstruct import PatchGrid, grid_rows, init_weights
from .vision_ctinstruct import CTInstructVisionModel, CTInstructVisionOutput

logger = logging.get_logger(__name__)

# Transformers 5.24 renamed the argument; both names are understood here, the library's own is passed on.
CACHE_NAME = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)


def cache_arguments(past_key_values: Any, cache: Any) -> dict[str, Any]:
    """What the language model takes its cache by. Before 5.24, `cache` is the paged cache of continuous batching
    (`generate_batch`), which goes on to the attention as it is."""
    if CACHE_NAME == "cache":
        return {"cache": past_key_values if cache is None else cache}
    return {"past_key_values": past_key_values} | ({} if cache is None else {"cache": cache})


ANSWER_TOKENS = 256
# fields of the config that hold token ids, and the tokens
SPECIAL_TOKENS = {
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "image_token_id": "<|image_pad|>",
    "seg_token_id": "<SEG>",
    "disease_token_id": "<disease_confidence>",
}


@dataclass
class CTInstructModelOutput(BaseModelOutputWithPast):
    """`last_hidden_state` [B, L, D_text], `past_key_values`, `hidden_states`, `attentions`, and
    `image_hidden_states`: a list with one [tokens, D_text] per image, as the language model saw it."""

    image_hidden_states: list[torch.Tensor] | None = None


@dataclass
class CTInstructOutput(CausalLMOutputWithPast):
    """Answer of a whole CTInstruct.

    Attributes:
        loss: the weighted sum of the three below, where labels were given.
        lm_loss: next-token loss (equation 6).
        segmentation_loss: L_seg over the masks of the batch.
        disease_loss: L_cls over the known disease labels of the batch.
        logits: [B, L, vocabulary].
        mask_logits: list with one [D, H, W] on the canvas per `<SEG>`, in reading order.
        disease_logits: [number of `<disease_confidence>`], in reading order.
        past_key_values, hidden_states, attentions: as everywhere in Transformers.
        image_hidden_states: list with one [tokens, D_text] per image.
    """

    lm_loss: torch.Tensor | None = None
    segmentation_loss: torch.Tensor | None = None
    disease_loss: torch.Tensor | None = None
    query_loss: torch.Tensor | None = None
    mask_logits: list[torch.Tensor] | None = None
    disease_logits: torch.Tensor | None = None
    image_hidden_states: list[torch.Tensor] | None = None


@dataclass
class CTInstructGenerateOutput(GenerateDecoderOnlyOutput):
    """What `generate(..., return_dict_in_generate=True)` returns, with the answers' masks and disease logits."""

    mask_logits: list[torch.Tensor] | None = None
    disease_logits: torch.Tensor | None = None


@dataclass
class CTInstructGenerateBeamOutput(GenerateBeamDecoderOnlyOutput):
    """The same for beam search."""

    mask_logits: list[torch.Tensor] | None = None
    disease_logits: torch.Tensor | None = None


class CTInstructPreTrainedModel(SavesItsCode, PreTrainedModel):
    config_class = CTInstructConfig
    config: CTInstructConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = False
    _supports_attention_backend = True
    _can_compile_fullgraph = False
    accepts_loss_kwargs = False  # every loss is a mean over the batch: Trainer divides it by the accumulation steps
    _skip_keys_device_placement = ["past_key_values", "cache", "vision_features", "mm_encoder_outputs"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        init_weights(module, self.config.initializer_range)
        if isinstance(module, CosineAttention):
            module.reset_scales()

    def optimize_for_inference(self) -> CTInstructPreTrainedModel:
        """Make the network quick and small for answers, equal up to rounding; it can no longer be trained or saved."""
        from .inference_ctinstruct import optimize_for_inference

        return optimize_for_inference(self)  # type: ignore[return-value]


def make_bridger(config: CTInstructConfig) -> nn.Module:
    """From the tower's width to the language model's: one linear layer (paper) or two with GELU (release)."""
    width, text_width = config.vision_config.hidden_size, config.text_config.hidden_size
    if config.bridger == "linear":
        return nn.Linear(width, text_width)
    return nn.Sequential(nn.Linear(width, text_width), nn.GELU(), nn.Linear(text_width, text_width), nn.GELU())


def grid_coordinates(grid: tuple[int, int, int, int], order: str, device: torch.device) -> torch.Tensor:
    """Where each image token of one image lies: [3, tokens], (slice in the grid, patch row, patch column)."""
    z, y, x, s = grid
    plane, row, column, place = torch.meshgrid(
        *[torch.arange(size, device=device) for size in (z, y, x, s)], indexing="ij"
    )
    coordinates = torch.stack([plane * s + place, row, column])  # [3, Z, Y, X, S]
    if order == "slices":
        coordinates = coordinates.permute(0, 1, 4, 2, 3)
    return coordinates.flatten(1)


def to_token_order(rows: torch.Tensor, grid: tuple[int, int, int, int], order: str) -> torch.Tensor:
    """Rows of one image from the order of `pixel_values` to the order in which the language model reads them."""
    if order == "patches":
        return rows
    z, y, x, s = grid
    return rows.view(z, y, x, s, -1).permute(0, 3, 1, 2, 4).reshape(z * s * y * x, -1)


class CTInstructModel(CTInstructPreTrainedModel):
    """Vision tower, bridger and language model, without heads."""

    _keys_to_ignore_on_load_unexpected = [r"^segmentation_", r"^disease_head", r"^lm_head"]

    def __init__(self, config: CTInstructConfig) -> None:
        super().__init__(config)
        self.vision_tower = CTInstructVisionModel._from_config(config.vision_config)
        self.bridger = make_bridger(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        patch_grid: PatchGrid | None = None,
        slice_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CTInstructVisionOutput | tuple:
        """Run the tower and the bridger once; pass the result as `vision_features` as often as wanted.

        Args:
            pixel_values, patch_grid, slice_mask: of the batch, see `CTInstructVisionModel.forward`.
            kwargs: `output_hidden_states`, `output_attentions` (of the tower) and `return_dict`. They have no names here,
                since `generate` keeps arguments that this method names from the language model.

        Returns:
            The tower's output, with `pooler_output` the image tokens [tokens, D_text] of each image, in the order in
            which the language model reads them.
        """
        return_dict = kwargs.pop("return_dict", None)
        features = self.vision_tower(pixel_values, patch_grid, slice_mask, return_dict=True, **kwargs)
        features.pooler_output = self.bridge(features)
        use_dict = return_dict if return_dict is not None else self.config.return_dict
        return features if use_dict else features.to_tuple()

    def bridge(self, features: CTInstructVisionOutput) -> list[torch.Tensor]:
        """Image tokens [tokens, D_text] of each image from the tower's, in the order in which they are read."""
        grids = grid_rows(features.patch_grid)
        parts = self.bridger(features.last_hidden_state).split([z * y * x * s for z, y, x, s in grids])
        order = self.config.image_token_order
        return [to_token_order(part, grid, order) for part, grid in zip(parts, grids, strict=True)]

    def embed(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, images: list[torch.Tensor] | None
    ) -> torch.Tensor:
        """Word embeddings [B, L, D_text] with the image tokens in the places of `<|image_pad|>`."""
        words = self.get_input_embeddings()
        if inputs_embeds is None:
            inputs_embeds = words(input_ids)
        if images is None:
            return inputs_embeds
        places = self.image_places(input_ids, inputs_embeds)
        tokens = torch.cat(images).to(inputs_embeds.device, inputs_embeds.dtype)
        if int(places.sum()) != tokens.shape[0]:
            raise CTInstructError(
                f"Image features and image tokens do not match: the text has {int(places.sum())} <|image_pad|> tokens, "
                f"the images have {tokens.shape[0]} slices."
            )
        return inputs_embeds.masked_scatter(places[..., None], tokens)

    def image_places(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """bool [B, L], True at the image tokens."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        image_id = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(image_id)).all(-1)

    def get_rope_index(
        self,
        input_ids: torch.Tensor,
        patch_grid: PatchGrid | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions of Qwen2-VL's three-axis rope: words count on, an image's tokens take their place in its grid
        (slice, patch row, patch column), and the word after an image follows its largest position.

        Returns:
            positions [3, B, L] and, per sample, what to add to a plain count for the words that follow [B, 1]. A plain
            count [B, L] and zeros for language models whose rope has one axis.
        """
        if not self.config.uses_three_axis_rope:
            kept = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
            return (kept.cumsum(-1) - 1).clamp(min=0), torch.zeros_like(input_ids[:, :1])
        is_image = input_ids == self.config.image_token_id
        grids = iter(grid_rows(patch_grid) if patch_grid is not None else [])
        positions = torch.ones((3, *input_ids.shape), dtype=torch.long, device=input_ids.device)
        deltas = torch.zeros((input_ids.shape[0], 1), dtype=torch.long, device=input_ids.device)
        for sample in range(input_ids.shape[0]):
            kept = torch.ones_like(is_image[sample])
            if attention_mask is not None:
                kept = attention_mask[sample].bool()
            places = is_image[sample, kept]
            parts: list[torch.Tensor] = []
            done, next_position = 0, 0
            while done < len(places):
                rest = places[done:]
                if bool(rest[0]):
                    part = grid_coordinates(next(grids), self.config.image_token_order, places.device)
                else:
                    run = int(rest.int().argmax()) if bool(rest.any()) else len(rest)
                    part = torch.arange(run, device=places.device).expand(3, -1)
                parts.append(part + next_position)
                done += part.shape[1]
                next_position = int(parts[-1].max()) + 1
            if parts:
                positions[:, sample, kept] = torch.cat(parts, dim=1)
            deltas[sample] = next_position - len(places)
        return positions, deltas

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        patch_grid: PatchGrid | None = None,
        slice_mask: torch.Tensor | None = None,
        vision_features: CTInstructVisionOutput | None = None,
        mm_encoder_outputs: dict[str, CTInstructVisionOutput] | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> CTInstructModelOutput | tuple:
        """Hidden states of text with images in it.

        Args:
            input_ids: [B, L] with one `<|image_pad|>` per row of `pixel_values`.
            pixel_values, patch_grid, slice_mask: see `CTInstructVisionModel.forward`; or instead
            vision_features: what `get_image_features` returned (`mm_encoder_outputs={"image": ...}` is the same, the
                name under which `generate` passes it). Without a `pooler_output` the tower's tokens go through the
                bridger here: a frozen tower needs to run once only, however long the training.
            attention_mask, position_ids, past_key_values (or `cache`), inputs_embeds, use_cache: as in Transformers.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise CTInstructError("You must specify exactly one of input_ids or inputs_embeds.")
        if vision_features is None and mm_encoder_outputs is not None:
            vision_features = mm_encoder_outputs.get("image")
        if vision_features is None and pixel_values is not None:
            vision_features = self.get_image_features(pixel_values, patch_grid, slice_mask, return_dict=True)
        images = None
        if vision_features is not None:
            images = vision_features.pooler_output
            images = self.bridge(vision_features) if images is None else images
        if position_ids is None and self.config.uses_three_axis_rope:
            done = cache if cache is not None else past_key_values
            position_ids = self.positions(input_ids, inputs_embeds, attention_mask, vision_features, done)
        outputs = self.language_model(
            inputs_embeds=self.embed(input_ids, inputs_embeds, images),
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            output_attentions=self.config.output_attentions if output_attentions is None else output_attentions,
            output_hidden_states=(
                self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
            ),
            return_dict=True,
            **cache_arguments(past_key_values, cache),
            **kwargs,
        )
        output = CTInstructModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=images,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )
        use_dict = return_dict if return_dict is not None else self.config.return_dict
        return output if use_dict else output.to_tuple()

    def positions(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        vision_features: CTInstructVisionOutput | None,
        cache: Any,
    ) -> torch.Tensor | None:
        """Three-axis positions where nobody gave any. While decoding from a cache the caller has to."""
        if inputs_embeds is not None or (cache is not None and cache.get_seq_length() > 0):
            if vision_features is None:
                return None
            raise CTInstructError(
                "Pass position_ids with inputs_embeds, or when a prompt with images continues a cache."
            )
        grid = vision_features.patch_grid if vision_features is not None else None
        positions, _ = self.get_rope_index(input_ids, grid, attention_mask)
        if self.config.answer_positions == "sequential":
            answers = (input_ids == self.config.seg_token_id) | (input_ids == self.config.disease_token_id)
            kept = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
            plain = (kept.cumsum(-1) - 1).clamp(min=0)
            positions = torch.where(answers.any(-1, keepdim=True), plain, positions)
        return positions


class CTInstructForConditionalGeneration(CTInstructPreTrainedModel, GenerationMixin):
    """The whole network: text, masks and disease probabilities for questions about scans."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    main_input_name = "input_ids"

    def __init__(self, config: CTInstructConfig) -> None:
        super().__init__(config)
        text_width = config.text_config.hidden_size
        self.model = CTInstructModel(config)
        self.lm_head = nn.Linear(text_width, config.text_config.vocab_size, bias=False)
        self.segmentation_query = nn.Linear(text_width, config.segmentation_config.hidden_size)
        self.segmentation_decoder = CTInstructSegmentationDecoder._from_config(config.segmentation_config)
        heads = len(config.disease_names) if config.disease_head == "per_disease" else 1
        self.disease_head = nn.Linear(text_width, heads)
        self.positive_voxel_weight = 1.0  # a trainer may raise it, see `masks_loss`
        self.positive_voxel_power: float | None = None
        self.post_init()
        self._limit_answers()

    def _limit_answers(self) -> None:
        """Answers of up to `ANSWER_TOKENS` where the generation config has no limit; the library's default is 20 tokens."""
        if self.generation_config.max_new_tokens is None and self.generation_config.max_length is None:
            self.generation_config.max_new_tokens = ANSWER_TOKENS

    def adjust_generation_fn(self, *args: Any, **kwargs: Any) -> None:
        """As in Transformers: takes the generation config of a loaded folder, which may have no limit."""
        super().adjust_generation_fn(*args, **kwargs)
        self._limit_answers()

    @classmethod
    def from_parts(
        cls,
        vision: Any,
        language_model: Any,
        tokenizer: Any = None,
        **overrides: Any,
    ) -> CTInstructForConditionalGeneration:
        """A model from a trained tower and a pretrained language model; bridger and heads start fresh.

        Args:
            vision: a stage-one model or its folder (tower and segmentation decoder are taken), or a
                `CTInstructVisionModel` or its folder (the decoder starts fresh).
            language_model: any causal language model of Transformers, or its folder or name.
            tokenizer: its tokenizer. Missing special tokens are added to it, and the embeddings grow to hold them.
                Without it the token ids must be given in `overrides`.
            overrides: fields of `CTInstructConfig`.

        Raises:
            ValueError: where token ids lie outside the language model's vocabulary.
        """
        if isinstance(language_model, str):
            language_model = AutoModelForCausalLM.from_pretrained(language_model, use_safetensors=True)
        if isinstance(vision, str):
            known = AutoConfig.from_pretrained(vision).model_type
            loader = AutoModel if known == "ctinstruct_vision" else AutoModelForPreTraining
            vision = loader.from_pretrained(vision, use_safetensors=True)
        tower = getattr(vision, "vision_tower", vision)
        decoder = getattr(vision, "segmentation_decoder", None)
        if tokenizer is not None:
            missing = [token for token in SPECIAL_TOKENS.values() if token not in tokenizer.get_vocab()]
            tokenizer.add_tokens(missing, special_tokens=True)
            ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in SPECIAL_TOKENS.items()}
            overrides = {**ids, **overrides}
            if len(tokenizer) > language_model.get_input_embeddings().num_embeddings:
                language_model.resize_token_embeddings(len(tokenizer))
        segmentation = (
            decoder.config
            if decoder is not None
            else CTInstructSegmentationConfig(feature_channels=tower.config.feature_channels)
        )
        config = CTInstructConfig(
            vision_config=tower.config,
            segmentation_config=overrides.pop("segmentation_config", segmentation),
            text_config=language_model.config.get_text_config(decoder=True),
            **overrides,
        )
        vocabulary = language_model.get_input_embeddings().num_embeddings
        outside = [name for name in SPECIAL_TOKENS if getattr(config, name) >= vocabulary]
        if outside:
            raise CTInstructError(
                f"{', '.join(outside)} lie outside the language model's {vocabulary} tokens: pass its tokenizer."
            )
        with torch.device("meta"):  # nothing of the parts' size is made twice
            model = cls(config)
        model.model.vision_tower = tower
        model.model.language_model = language_model.base_model
        model.lm_head = language_model.get_output_embeddings()
        fresh = [model.model.bridger, model.segmentation_query, model.disease_head]
        if decoder is not None:
            model.segmentation_decoder = decoder
        else:
            fresh.append(model.segmentation_decoder)
        for module in fresh:
            module.to_empty(device=language_model.device).to(language_model.dtype)
            module.apply(model._init_weights)
        model.tie_weights()
        return model.eval()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        patch_grid: PatchGrid | None = None,
        slice_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CTInstructVisionOutput | tuple:
        """See `CTInstructModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, patch_grid, slice_mask, **kwargs)

    @needs_labels("labels")
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        patch_grid: PatchGrid | None = None,
        slice_mask: torch.Tensor | None = None,
        mask_labels: Sequence[torch.Tensor] | None = None,
        disease_labels: torch.Tensor | None = None,
        disease_ids: torch.LongTensor | None = None,
        prompt_labels: torch.Tensor | None = None,
        vision_features: CTInstructVisionOutput | None = None,
        mm_encoder_outputs: dict[str, CTInstructVisionOutput] | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        answer_heads: bool = True,
        cache: Any = None,
        mm_token_type_ids: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> CTInstructOutput | tuple:
        """Text logits, and a mask per `<SEG>` and a logit per `<disease_confidence>` in `input_ids`.

        Args:
            input_ids ... inputs_embeds, patch_grid, slice_mask, vision_features: see `CTInstructModel.forward`.
            labels: [B, L], −100 where no loss is wanted. Those at image and vision tokens never count.
            mask_labels: one int8 [D, H, W] on the canvas per `<SEG>` of `input_ids`; −1 is padding. A `<SEG>` speaks of
                the image last shown before it.
            disease_labels: float, one per `<disease_confidence>` of `input_ids`; −1 is unknown.
            disease_ids: int64, which of `config.disease_names` each `<disease_confidence>` stands for. Without it: the
                list whose length is the sample's number of these tokens.
            prompt_labels: [n, D_text], what the decoder's prompt of each `<SEG>` should be: stage one's embedding of the
                structure's name. Not in the paper; it teaches `<SEG>` without painting a mask.
            logits_to_keep: as in Transformers.
            answer_heads: False leaves out masks and disease logits without labels, as `generate` does for its single steps.
            mm_token_type_ids: not used; image tokens are known by their id.

        Raises:
            ValueError: where labels, ids and tokens do not fit each other.
        """
        self.check_labels(
            input_ids, mask_labels=mask_labels, prompt_labels=prompt_labels, disease_labels=disease_labels
        )
        if vision_features is None and mm_encoder_outputs is not None:
            vision_features = mm_encoder_outputs.get("image")
        if vision_features is None and pixel_values is not None:
            vision_features = self.get_image_features(pixel_values, patch_grid, slice_mask, return_dict=True)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            cache=cache,
            inputs_embeds=inputs_embeds,
            vision_features=vision_features,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        states = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(states[:, kept])

        lm_loss = segmentation_loss = disease_loss = query_loss = mask_logits = disease_logits = None
        if labels is not None:
            labels = self.word_labels(labels, input_ids)
            lm_loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        if cache is not None and CACHE_NAME != "cache":  # many prompts in one row
            answer_heads = False
        if input_ids is not None and (answer_heads or mask_labels is not None or disease_labels is not None):
            mask_logits = self.answer_masks(input_ids, states, vision_features)
            names = self.disease_rows(input_ids, disease_ids)
            disease_logits = self.answer_diseases(input_ids, states, names)
        if mask_labels is not None and len(mask_labels):
            if mask_logits is None:
                raise CTInstructError(
                    "mask_labels need images: pass pixel_values, or vision_features with feature_maps."
                )
            segmentation_loss = masks_loss(
                mask_logits, mask_labels, self.positive_voxel_weight, positive_power=self.positive_voxel_power
            )
        if disease_labels is not None and disease_logits is not None:
            dtype = getattr(torch, self.config.disease_loss_dtype)
            disease_loss = label_loss(disease_logits, disease_labels, self.positive_weights(names), dtype)
        if prompt_labels is not None and len(prompt_labels):
            query_loss = prompt_loss(
                self.segmentation_query(states[input_ids == self.config.seg_token_id]), prompt_labels
            )
        output = CTInstructOutput(
            loss=self.total_loss(lm_loss, segmentation_loss, disease_loss, query_loss),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            lm_loss=lm_loss,
            segmentation_loss=segmentation_loss,
            disease_loss=disease_loss,
            query_loss=query_loss,
            mask_logits=mask_logits,
            disease_logits=disease_logits,
            image_hidden_states=outputs.image_hidden_states,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )
        use_dict = return_dict if return_dict is not None else self.config.return_dict
        return output if use_dict else output.to_tuple()

    def check_labels(self, input_ids: torch.Tensor | None, **labels: Any) -> None:
        """Raises CTInstructError where labels of masks or diseases are not as many as the tokens that they belong to."""
        for name, given in labels.items():
            if given is None:
                continue
            field = "disease_token_id" if name == "disease_labels" else "seg_token_id"
            token = SPECIAL_TOKENS[field]
            if input_ids is None:
                raise CTInstructError(f"{name} need input_ids: in inputs_embeds no {token} can be found.")
            count = int((input_ids == getattr(self.config, field)).sum())
            if len(given) != count:
                raise CTInstructError(
                    f"{name} has {len(given)} entries for {count} {token} in input_ids: give one each (was the text cut?)."
                )

    def word_labels(self, labels: torch.Tensor, input_ids: torch.Tensor | None) -> torch.Tensor:
        """`labels` [B, L] without those at image and vision tokens, whoever made them: nobody writes these tokens."""
        names = ("image_token_id", "vision_start_token_id", "vision_end_token_id")
        ids = torch.tensor([getattr(self.config, name) for name in names], device=labels.device)
        seen = torch.isin(labels, ids)
        if input_ids is not None:
            seen |= torch.isin(input_ids.to(labels.device), ids)
        return labels.masked_fill(seen, -100)

    def total_loss(
        self,
        lm_loss: torch.Tensor | None,
        segmentation_loss: torch.Tensor | None,
        disease_loss: torch.Tensor | None,
        query_loss: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """The weighted sum of the losses there are."""
        parts = [
            (1.0, lm_loss),
            (self.config.segmentation_loss_weight, segmentation_loss),
            (self.config.disease_loss_weight, disease_loss),
            (self.config.segmentation_loss_weight, query_loss),
        ]
        weighted = [weight * loss for weight, loss in parts if loss is not None]
        return sum(weighted[1:], weighted[0]) if weighted else None

    def answer_masks(
        self,
        input_ids: torch.Tensor,
        states: torch.Tensor,
        vision_features: CTInstructVisionOutput | None,
        seen_before: int = 0,
    ) -> list[torch.Tensor] | None:
        """Mask logits [D, H, W] of each `<SEG>`, on the canvas of the image last shown before it.

        `seen_before` counts the image tokens before `input_ids`, where these continue a cached prompt.
        """
        asked = input_ids == self.config.seg_token_id
        if vision_features is None or vision_features.feature_maps is None or not bool(asked.any()):
            return None
        grids = grid_rows(vision_features.patch_grid)
        ends = torch.tensor(list(accumulate(z * y * x * s for z, y, x, s in grids)), device=input_ids.device)
        seen = (input_ids == self.config.image_token_id).flatten().cumsum(0).view_as(input_ids)
        seen = seen + seen_before
        owners = torch.searchsorted(ends, seen[asked])  # the image whose last token came at or after this count
        queries = self.segmentation_query(states[asked])
        return self.segmentation_decoder.paint_owned(
            queries, owners.tolist(), vision_features.feature_maps, vision_features.last_hidden_state, grids
        )

    def disease_rows(self, input_ids: torch.Tensor, disease_ids: torch.Tensor | None) -> torch.Tensor | None:
        """Which row of the disease head answers each `<disease_confidence>`; all 0 with a shared head."""
        counts = (input_ids == self.config.disease_token_id).sum(-1).tolist()
        total = sum(counts)
        if total == 0:
            return None
        if disease_ids is not None and len(disease_ids) != total:
            raise CTInstructError(
                f"disease_ids has {len(disease_ids)} entries for {total} <disease_confidence> tokens."
            )
        if self.config.disease_head == "shared":
            return torch.zeros(total, dtype=torch.long, device=input_ids.device)
        if disease_ids is not None:
            return disease_ids.to(input_ids.device)
        starts: dict[str, int] = {}
        start = 0
        for name, diseases in self.config.disease_lists.items():
            starts[name] = start
            start += len(diseases)
        rows: list[int] = []
        for count in counts:
            fitting = [name for name, diseases in self.config.disease_lists.items() if len(diseases) == count]
            if count and len(fitting) != 1:
                raise CTInstructError(
                    f"{count} <disease_confidence> tokens in a sample fit "
                    f"{'no list' if not fitting else 'several lists (' + ', '.join(fitting) + ')'} of "
                    "config.disease_lists: pass disease_ids."
                )
            if count:
                rows.extend(range(starts[fitting[0]], starts[fitting[0]] + count))
        return torch.tensor(rows, device=input_ids.device)

    def answer_diseases(
        self, input_ids: torch.Tensor, states: torch.Tensor, rows: torch.Tensor | None
    ) -> torch.Tensor | None:
        """One logit per `<disease_confidence>`, in reading order."""
        if rows is None:
            return None
        scores = self.disease_head(states[input_ids == self.config.disease_token_id])  # [tokens, heads]
        return scores.gather(1, rows.to(scores.device)[:, None])[:, 0]

    def positive_weights(self, rows: torch.Tensor | None) -> torch.Tensor | None:
        """`config.disease_positive_weights` of the given rows; 1 where a list has none."""
        weights = self.config.disease_positive_weights
        if not weights or rows is None or self.config.disease_head == "shared":
            return None
        flat = [
            weight
            for name, diseases in self.config.disease_lists.items()
            for weight in weights.get(name, [1.0] * len(diseases))
        ]
        return torch.tensor(flat, device=rows.device)[rows]

    def _prepare_position_ids_for_generation(
        self, inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """Positions on three axes for language models that have them; the words' own for the rest."""
        positions = super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        features = (model_kwargs.get("mm_encoder_outputs") or {}).get("image")
        if not self.config.uses_three_axis_rope:
            return positions
        cache = model_kwargs.get(CACHE_NAME)
        if features is None or (cache is not None and cache.get_seq_length() > 0):
            return positions[None].expand(3, -1, -1)
        input_ids = model_kwargs.get("input_ids")
        input_ids = inputs_tensor if input_ids is None or input_ids.shape[1] == 0 else input_ids
        return self.model.get_rope_index(input_ids, features.patch_grid, model_kwargs.get("attention_mask"))[0]

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: Any = None,
        pixel_values: torch.Tensor | None = None,
        patch_grid: PatchGrid | None = None,
        slice_mask: torch.Tensor | None = None,
        vision_features: CTInstructVisionOutput | None = None,
        disease_ids: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """`generate` of Transformers, with the images encoded once and, if `return_dict_in_generate`, the masks and
        disease logits of the whole sequences: equal to those of a forward pass over them.

        Args:
            inputs, generation_config, kwargs: as in Transformers.
            pixel_values, patch_grid, slice_mask, or vision_features: as in `forward`.
            disease_ids: which diseases the answer's `<disease_confidence>` stand for, one after the other.

        Raises:
            ValueError: for an `assistant_model`, which cannot see the images.
        """
        given = [kwargs.get("max_length"), getattr(generation_config, "max_length", None)]
        asked = [kwargs.get("max_new_tokens"), getattr(generation_config, "max_new_tokens", None)]
        if any(length is not None for length in given) and all(length is None for length in asked):
            kwargs["max_new_tokens"] = (
                None  # a length of the caller's counts before that of the model's generation config
            )
        if kwargs.get("assistant_model") is not None:
            raise CTInstructError("assistant_model is not supported: the assistant cannot see the images.")
        if vision_features is None and pixel_values is not None:
            vision_features = self.get_image_features(pixel_values, patch_grid, slice_mask, return_dict=True)
        if vision_features is not None:
            # a copy, since beams repeat the entries in place
            kwargs["mm_encoder_outputs"] = {"image": CTInstructVisionOutput(**vision_features)}
        input_ids = inputs if inputs is not None else kwargs.get("input_ids")
        mask = kwargs.get("attention_mask")
        outputs = super().generate(inputs, generation_config, answer_heads=False, **kwargs)
        if isinstance(outputs, torch.Tensor) or input_ids is None:
            return outputs
        masks, diseases = self.answers_of(outputs.sequences, input_ids, mask, vision_features, disease_ids)
        kind = CTInstructGenerateBeamOutput if "beam_indices" in outputs else CTInstructGenerateOutput
        return kind(**outputs, mask_logits=masks, disease_logits=diseases)

    def answers_of(
        self,
        sequences: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        vision_features: CTInstructVisionOutput | None,
        disease_ids: torch.Tensor | None,
    ) -> tuple[list[torch.Tensor] | None, torch.Tensor | None]:
        """Masks and disease logits of generated sequences [B * returned, L], in reading order.

        One pass of the language model over the finished sequences; the tower does not run again.
        """
        asks_masks = bool((sequences == self.config.seg_token_id).any())
        disease_counts = (sequences == self.config.disease_token_id).sum(-1)
        if not asks_masks and not bool(disease_counts.any()):
            return None, None
        returned = sequences.shape[0] // input_ids.shape[0]
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        masks: list[list[torch.Tensor]] = [[] for _ in sequences]
        diseases: list[torch.Tensor] = [sequences.new_zeros(0, dtype=torch.float) for _ in sequences]
        for turn in range(returned):
            rows = sequences[turn::returned]
            new = torch.ones_like(rows[:, input_ids.shape[1] :])
            states = self.model(
                input_ids=rows,
                attention_mask=torch.cat([attention_mask, new], dim=1),
                vision_features=vision_features,
                use_cache=False,
                return_dict=True,
            ).last_hidden_state
            found = iter(self.answer_masks(rows, states, vision_features) or [])
            counts = disease_counts[turn::returned].tolist()
            try:
                scores = self.answer_diseases(rows, states, self.disease_rows(rows, disease_ids))
            except CTInstructError as error:
                logger.warning(f"The answer's <disease_confidence> tokens cannot be told apart: {error}")
                scores = None
            seg_counts = (rows == self.config.seg_token_id).sum(-1).tolist() if vision_features is not None else []
            for sample, count in enumerate(seg_counts):
                masks[sample * returned + turn] = [next(found) for _ in range(count)]
            for sample, part in enumerate(scores.split(counts) if scores is not None else []):
                diseases[sample * returned + turn] = part
        all_masks = [mask for sample in masks for mask in sample]
        all_diseases = torch.cat([part.to(self.device) for part in diseases])
        return all_masks or None, all_diseases if len(all_diseases) else None


__all__ = ["CTInstructForConditionalGeneration", "CTInstructModel"]
