"""`generate` with images encoded once, and masks and probabilities of the whole answers."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationMixin
from transformers.generation.utils import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from transformers.utils import logging

from .answers_ctinstruct import AnswerHeads
from .configuration_ctinstruct import CTInstructError
from .vision_blocks_ctinstruct import PatchGrid
from .vision_ctinstruct import CTInstructVisionOutput

logger = logging.get_logger(__name__)

# Transformers 5.24 renamed the argument; both names are understood, the library's is passed on.
CACHE_NAME = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)
ANSWER_TOKENS = 256


def with_names_of_generate(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a `forward` that ends in `**kwargs`: `generate` names two of its arguments otherwise.

    `mm_encoder_outputs={"image": ...}` is `vision_features`. `cache` is `past_key_values` since Transformers 5.24; before,
    it is the paged cache of continuous batching (`generate_batch`), which stays in `kwargs` on its way to the attention.
    """

    @functools.wraps(forward)
    def renamed(self: Any, *args: Any, mm_encoder_outputs: Any = None, cache: Any = None, **kwargs: Any) -> Any:
        if mm_encoder_outputs is not None and kwargs.get("vision_features") is None:
            kwargs["vision_features"] = mm_encoder_outputs.get("image")
        if cache is not None:
            kwargs["past_key_values" if CACHE_NAME == "cache" else "cache"] = cache
        return forward(self, *args, **kwargs)

    signature = inspect.signature(forward)
    names = list(signature.parameters.values())
    names[-1:-1] = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in ("mm_encoder_outputs", "cache")
    ]
    renamed.__signature__ = signature.replace(parameters=names)  # type: ignore[attr-defined]
    return renamed


@dataclass
class CTInstructGenerateOutput(GenerateDecoderOnlyOutput):
    """Output of `generate(..., return_dict_in_generate=True)`: mask logits [D, H, W] and disease logits [tokens] added."""

    mask_logits: list[torch.Tensor] | None = None
    disease_logits: torch.Tensor | None = None


@dataclass
class CTInstructGenerateBeamOutput(GenerateBeamDecoderOnlyOutput):
    """The same for beam search."""

    mask_logits: list[torch.Tensor] | None = None
    disease_logits: torch.Tensor | None = None


class CTInstructGenerationMixin(AnswerHeads, GenerationMixin):
    """`generate` of Transformers for the whole model."""

    model: Any  # a `CTInstructModel`, whose file imports this one
    get_image_features: Callable[..., Any]

    def _limit_answers(self) -> None:
        """Answers of up to `ANSWER_TOKENS` where the generation config has no limit; the library's default is 20 tokens."""
        if self.generation_config.max_new_tokens is None and self.generation_config.max_length is None:
            self.generation_config.max_new_tokens = ANSWER_TOKENS

    def adjust_generation_fn(self, *args: Any, **kwargs: Any) -> None:
        """As in Transformers: takes the generation config of a loaded folder, which may have no limit."""
        super().adjust_generation_fn(*args, **kwargs)  # type: ignore[misc]  # see `generate`
        self._limit_answers()

    def _prepare_position_ids_for_generation(
        self, inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """Positions [3, B, L] for language models with three axes; [B, L] for others."""
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
    def generate(  # type: ignore[override]  # images are third in order; what is third in Transformers is a keyword
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
            disease_ids: the diseases of the answer's `<disease_confidence>`, in their order.

        Raises:
            ValueError: for an `assistant_model`, which cannot see the images.
        """
        given = [kwargs.get("max_length"), getattr(generation_config, "max_length", None)]
        asked = [kwargs.get("max_new_tokens"), getattr(generation_config, "max_new_tokens", None)]
        if any(length is not None for length in given) and all(length is None for length in asked):
            kwargs["max_new_tokens"] = None  # the caller's length replaces that of the model's generation config
        if kwargs.get("assistant_model") is not None:
            raise CTInstructError("assistant_model is not supported: the assistant cannot see the images.")
        if vision_features is None and pixel_values is not None:
            vision_features = self.get_image_features(pixel_values, patch_grid, slice_mask, return_dict=True)
        if vision_features is not None:
            # a copy, since beams repeat the entries in place
            kwargs["mm_encoder_outputs"] = {"image": CTInstructVisionOutput(**vision_features)}
        input_ids = inputs if inputs is not None else kwargs.get("input_ids")
        mask = kwargs.get("attention_mask")
        # Transformers types `self` by a protocol that not even its models meet
        outputs = super().generate(inputs, generation_config, answer_heads=False, **kwargs)  # type: ignore[misc]
        if isinstance(outputs, torch.Tensor) or input_ids is None:
            return outputs
        masks, diseases = self.answers_of(outputs.sequences, input_ids, mask, vision_features, disease_ids)
        output_class = CTInstructGenerateBeamOutput if "beam_indices" in outputs else CTInstructGenerateOutput
        return output_class(**outputs, mask_logits=masks, disease_logits=diseases)

    def answers_of(
        self,
        sequences: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        vision_features: CTInstructVisionOutput | None,
        disease_ids: torch.Tensor | None,
    ) -> tuple[list[torch.Tensor] | None, torch.Tensor | None]:
        """Masks and disease logits of generated sequences [B * returned, L], in reading order.

        The language model reads the finished sequences once; the tower does not run again.
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
                logger.warning(f"The diseases of the answer's <disease_confidence> tokens are not known: {error}")
                scores = None
            seg_counts = (rows == self.config.seg_token_id).sum(-1).tolist() if vision_features is not None else []
            for sample, count in enumerate(seg_counts):
                masks[sample * returned + turn] = [next(found) for _ in range(count)]
            for sample, part in enumerate(scores.split(counts) if scores is not None else []):
                diseases[sample * returned + turn] = part
        all_masks = [mask for sample in masks for mask in sample]
        all_diseases = torch.cat([part.to(self.model.device) for part in diseases])
        return all_masks or None, all_diseases if len(all_diseases) else None
