"""CTInstruct: slices become tokens, tokens join the words, `<SEG>` becomes a mask, `<disease_confidence>` a number.

Read top to bottom: encode (tower, bridger) -> place the image tokens -> language model -> answer heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForPreTraining
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from .answers_ctinstruct import SPECIAL_TOKENS
from .configuration_ctinstruct import CTInstructConfig, CTInstructError, CTInstructSegmentationConfig
from .generation_ctinstruct import CACHE_NAME, CTInstructGenerationMixin, with_names_of_generate
from .language_model_ctinstruct import language_parts, load_language_model
from .losses_ctinstruct import label_loss, masks_loss
from .positions_ctinstruct import TokenPositions, to_token_order
from .quantization_ctinstruct import QuantizesItsLanguageModel
from .saving_ctinstruct import SavesItsCode
from .segmentation_ctinstruct import CTInstructSegmentationDecoder
from .small_models_ctinstruct import prompt_loss
from .training_ctinstruct import CountsBatchesOnce, needs_labels
from .vision_attention_ctinstruct import CosineAttention
from .vision_blocks_ctinstruct import PatchGrid, grid_rows, init_weights
from .vision_ctinstruct import CTInstructVisionModel, CTInstructVisionOutput


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


class CTInstructPreTrainedModel(QuantizesItsLanguageModel, SavesItsCode, CountsBatchesOnce, PreTrainedModel):
    config_class = CTInstructConfig
    config: CTInstructConfig
    calibration: Any  # what inference knows about this model's probabilities; set by those who load it
    base_model_prefix = "model"
    input_modalities = ("image", "text")  # type: ignore[assignment]  # a tuple in Transformers' own models too
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = False
    _supports_attention_backend = True
    _can_compile_fullgraph = False
    accepts_loss_kwargs = False  # every loss is a mean over the batch: Trainer divides it by the accumulation steps
    _skip_keys_device_placement = ["past_key_values", "cache", "vision_features", "mm_encoder_outputs"]

    def post_init(self) -> None:
        super().post_init()
        there = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = set(self._no_split_modules or ()) & there  # FSDP refuses a block that is not there

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        init_weights(module, self.config.initializer_range)
        if isinstance(module, CosineAttention):
            module.reset_scales()

    def optimize_for_inference(self) -> CTInstructPreTrainedModel:
        """Make the network quick and small for answers, equal up to rounding; it can no longer be trained or saved."""
        from .inference_ctinstruct import optimize_for_inference

        return optimize_for_inference(self)


def make_bridger(config: CTInstructConfig) -> nn.Module:
    """From the tower's width to the language model's: one linear layer (paper) or two with GELU (release)."""
    width, text_width = config.vision_config.hidden_size, config.text_config.hidden_size
    if config.bridger == "linear":
        return nn.Linear(width, text_width)
    return nn.Sequential(nn.Linear(width, text_width), nn.GELU(), nn.Linear(text_width, text_width), nn.GELU())


class CTInstructModel(CTInstructPreTrainedModel, TokenPositions):
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
        tokens = features.last_hidden_state.to(next(self.bridger.parameters()).dtype)  # the tower may be in another
        parts = self.bridger(tokens).split([z * y * x * s for z, y, x, s in grids])
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

    def image_places(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """bool [B, L], True at the image tokens."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        image_id = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(image_id)).all(-1)

    @with_names_of_generate
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        patch_grid: PatchGrid | None = None,
        slice_mask: torch.Tensor | None = None,
        vision_features: CTInstructVisionOutput | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CTInstructModelOutput | tuple:
        """Hidden states of text with images in it.

        Args:
            input_ids: [B, L] with one `<|image_pad|>` per row of `pixel_values`.
            pixel_values, patch_grid, slice_mask: see `CTInstructVisionModel.forward`; or instead
            vision_features: what `get_image_features` returned (`generate` passes it as
                `mm_encoder_outputs={"image": ...}`). Without a `pooler_output` the tower's tokens go through the
                bridger here: a frozen tower needs to run once only, however long the training.
            attention_mask, position_ids, past_key_values (or `cache`), inputs_embeds, use_cache: as in Transformers.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise CTInstructError("You must specify exactly one of input_ids or inputs_embeds.")
        if vision_features is None and pixel_values is not None:
            features = self.get_image_features(pixel_values, patch_grid, slice_mask, return_dict=True)
            vision_features = cast(CTInstructVisionOutput, features)
        images = None
        if vision_features is not None:
            images = cast("list[torch.Tensor] | None", vision_features.pooler_output)
            images = self.bridge(vision_features) if images is None else images
        if position_ids is None and self.config.uses_three_axis_rope:
            cache = kwargs.get("cache", past_key_values)
            position_ids = self.positions(input_ids, attention_mask, vision_features, cache)
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
            **{CACHE_NAME: past_key_values},
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


class CTInstructForConditionalGeneration(CTInstructPreTrainedModel, CTInstructGenerationMixin):
    """The whole network: text, masks and disease probabilities for questions about scans."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    main_input_name = "input_ids"
    model: CTInstructModel

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
            language_model: any causal language model of Transformers, or a vision-language model, of which the text part is
                taken; or its folder or name.
            tokenizer: its tokenizer. Missing special tokens are added to it, and the embeddings grow to hold them.
                Without it the token ids must be given in `overrides`.
            overrides: fields of `CTInstructConfig`.

        Raises:
            ValueError: where token ids lie outside the language model's vocabulary, or its text part is no causal model.
        """
        if isinstance(language_model, str):
            language_model = load_language_model(language_model)
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
        words = language_parts(language_model)
        segmentation = (
            decoder.config
            if decoder is not None
            else CTInstructSegmentationConfig(feature_channels=tower.config.feature_channels)
        )
        config = CTInstructConfig(
            vision_config=tower.config,
            segmentation_config=overrides.pop("segmentation_config", segmentation),
            text_config=words.config,
            tie_word_embeddings=words.config.tie_word_embeddings,
            **overrides,
        )
        vocabulary = words.head.out_features
        outside = [name for name in SPECIAL_TOKENS if getattr(config, name) >= vocabulary]
        if outside:
            raise CTInstructError(
                f"{', '.join(outside)} lie outside the language model's {vocabulary} tokens: pass its tokenizer."
            )
        with torch.device("meta"):  # nothing of the parts' size is made twice
            model = cls(config)
        model.model.vision_tower = tower
        model.model.language_model = words.body
        model.lm_head = words.head
        fresh = [model.model.bridger, model.segmentation_query, model.disease_head]
        if decoder is not None:
            model.segmentation_decoder = decoder
        else:
            fresh.append(model.segmentation_decoder)
        for module in fresh:
            module.to_empty(device=words.body.device).to(words.body.dtype)
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
    @with_names_of_generate
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        patch_grid: PatchGrid | None = None,
        slice_mask: torch.Tensor | None = None,
        mask_labels: Sequence[torch.Tensor] | None = None,
        disease_labels: torch.Tensor | None = None,
        disease_ids: torch.LongTensor | None = None,
        prompt_labels: torch.Tensor | None = None,
        vision_features: CTInstructVisionOutput | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        answer_heads: bool = True,
        mm_token_type_ids: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> CTInstructOutput | tuple:
        """Text logits, and a mask per `<SEG>` and a logit per `<disease_confidence>` in `input_ids`.

        Args:
            input_ids ... inputs_embeds, patch_grid, slice_mask, vision_features: see `CTInstructModel.forward`.
            labels: [B, L], −100 where no loss is wanted. Those at image and vision tokens never count. With
                `num_items_in_batch` (words of all batches of a step) their loss is a sum divided by it.
            mask_labels: one int8 [D, H, W] on the canvas per `<SEG>` of `input_ids`; −1 is padding. A `<SEG>` speaks of
                the image last shown before it in its sample.
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
        if vision_features is None and pixel_values is not None:
            features = self.get_image_features(pixel_values, patch_grid, slice_mask, return_dict=True)
            vision_features = cast(CTInstructVisionOutput, features)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
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
        share = self.share_of_words(labels, kwargs.get("num_items_in_batch"))
        if labels is not None:
            labels = self.word_labels(labels, input_ids)
            lm_loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
            if not bool((labels[:, 1:] != -100).any()):  # masks or diagnoses alone
                lm_loss = logits.sum() * 0.0
        if kwargs.get("cache") is not None:  # a paged cache: many prompts in one row
            answer_heads = False
        if input_ids is not None and (answer_heads or mask_labels is not None or disease_labels is not None):
            mask_logits = self.answer_masks(input_ids, states, vision_features)
            names = self.disease_rows(input_ids, disease_ids)
            disease_logits = self.answer_diseases(input_ids, states, names)
        if mask_labels is not None and len(mask_labels):
            if mask_logits is None or any(mask.numel() == 0 for mask in mask_logits):
                raise CTInstructError(
                    "mask_labels need images: pass pixel_values, or vision_features with feature_maps, and show an image "
                    "in each sample with <SEG>."
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
            loss=self.total_loss(lm_loss, segmentation_loss, disease_loss, query_loss, share),
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


__all__ = ["CTInstructForConditionalGeneration", "CTInstructModel"]
