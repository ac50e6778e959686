"""Stage one (section 3.2): the tower learns from reports, category labels and masks, through one text encoder.

`L = L_seg + L_cls + L_CLIP` (equation 5), each over whichever labels the batch has.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from .configuration_ctinstruct import CTInstructConfig, CTInstructError
from .losses_ctinstruct import label_loss, masks_loss
from .modeling_ctinstruct import CTInstructPreTrainedModel
from .segmentation_ctinstruct import CTInstructSegmentationDecoder
from .small_models_ctinstruct import SHARPNESS, cell_loss, hard_label_loss, smooth_max
from .training_ctinstruct import needs_labels
from .vision_blocks_ctinstruct import PatchGrid, grid_rows
from .vision_ctinstruct import CTInstructVisionModel, CTInstructVisionOutput


@dataclass
class CTInstructPretrainingOutput(ModelOutput):
    """Answer of stage one.

    Attributes:
        loss: the sum of the three below, where labels were given.
        contrastive_loss: L_CLIP over the image-text pairs of the batch.
        category_loss: L_cls over the known category labels.
        segmentation_loss: L_seg over the masks.
        cell_loss: see `small_models_ctinstruct.cell_loss`; only where `loss_weights` names it.
        image_features: [images, D_text], normalised.
        text_features: [texts, D_text], normalised.
        category_logits: [images, categories], scaled cosines.
        mask_logits: list with one [D, H, W] on the canvas per mask text.
        hidden_states, attentions: of the vision tower, if asked for.
    """

    loss: torch.Tensor | None = None
    contrastive_loss: torch.Tensor | None = None
    category_loss: torch.Tensor | None = None
    segmentation_loss: torch.Tensor | None = None
    cell_loss: torch.Tensor | None = None
    image_features: torch.Tensor | None = None
    text_features: torch.Tensor | None = None
    category_logits: torch.Tensor | None = None
    mask_logits: list[torch.Tensor] | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor | tuple[torch.Tensor, ...], ...] | None = None


class GatherWithGradient(torch.autograd.Function):
    """Features of all processes, concatenated; the gradient of each part, summed over processes, returns to its process."""

    @staticmethod
    def forward(ctx: Any, features: torch.Tensor) -> torch.Tensor:
        counts = [torch.zeros(1, dtype=torch.long, device=features.device) for _ in range(dist.get_world_size())]
        dist.all_gather(counts, torch.tensor([len(features)], device=features.device))
        ctx.counts = [int(count) for count in counts]
        most = max(ctx.counts)
        padded = F.pad(features, (0, 0, 0, most - len(features))).contiguous()
        parts = [torch.zeros_like(padded) for _ in ctx.counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, ctx.counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        start = sum(ctx.counts[: dist.get_rank()])
        return gradient[start : start + ctx.counts[dist.get_rank()]]


def contrastive_loss(
    image_scores: torch.Tensor, text_scores: torch.Tensor, targets: tuple[torch.Tensor, torch.Tensor] | None = None
) -> torch.Tensor:
    """L_CLIP: minus the mean over pairs of the log-probabilities of the right text and of the right image, summed.

    Args:
        image_scores: [N, texts] similarities over the temperature; text i belongs to image i, further ones to none.
        text_scores: [N, images], likewise.
        targets: soft targets of the same shapes instead of that pairing.
    """
    if targets is None:
        labels = torch.arange(len(image_scores), device=image_scores.device)
        return F.cross_entropy(image_scores, labels) + F.cross_entropy(text_scores, labels)
    return F.cross_entropy(image_scores, targets[0]) + F.cross_entropy(text_scores, targets[1])


class FeatureQueue(nn.Module):
    """The latest `size` image and text features of the momentum model."""

    images: torch.Tensor
    texts: torch.Tensor
    filled: torch.Tensor
    place: torch.Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("images", torch.zeros(size, width))
        self.register_buffer("texts", torch.zeros(size, width))
        self.register_buffer("filled", torch.zeros((), dtype=torch.long))
        self.register_buffer("place", torch.zeros((), dtype=torch.long))

    def contents(self) -> tuple[torch.Tensor, torch.Tensor]:
        count = int(self.filled)
        return self.images[:count].clone(), self.texts[:count].clone()

    @torch.no_grad()
    def push(self, images: torch.Tensor, texts: torch.Tensor) -> None:
        count = min(len(images), self.size)
        rows = (int(self.place) + torch.arange(count, device=self.images.device)) % self.size
        self.images[rows] = images[:count].to(self.images.dtype)
        self.texts[rows] = texts[:count].to(self.texts.dtype)
        self.place.copy_((self.place + count) % self.size)
        self.filled.copy_((self.filled + count).clamp(max=self.size))


def mean_of_words(states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """[texts, L, D] -> [texts, D] over words that are not padding."""
    kept = attention_mask[..., None].to(states.dtype)
    return (states * kept).sum(1) / kept.sum(1).clamp(min=1)


class CTInstructForPretraining(CTInstructPreTrainedModel):
    """Vision tower, segmentation decoder and a text encoder, aligned at three grains."""

    main_input_name = "pixel_values"
    _tp_plan = {"text_projection": "colwise_gather_output"}

    def __init__(self, config: CTInstructConfig) -> None:
        super().__init__(config)
        if config.text_encoder_config is None:
            raise CTInstructError("config.text_encoder_config is missing: stage one needs a text encoder.")
        width = config.segmentation_config.hidden_size
        self.vision_tower = CTInstructVisionModel._from_config(config.vision_config)
        self.segmentation_decoder = CTInstructSegmentationDecoder._from_config(config.segmentation_config)
        try:  # the first token's pooler, where an encoder has one, is not used
            self.text_encoder = AutoModel.from_config(config.text_encoder_config, add_pooling_layer=False)
        except TypeError:
            self.text_encoder = AutoModel.from_config(config.text_encoder_config)
        text_width = config.text_encoder_config.hidden_size
        # one shared text embedding; a projection head per modality and task on the image's side (equation 4)
        self.text_projection = nn.Linear(text_width, width)
        self.image_projection = nn.Linear(config.vision_config.hidden_size, width)
        self.category_projection = nn.Linear(config.vision_config.hidden_size, width)
        self.logit_scale = nn.Parameter(
            torch.zeros(1), requires_grad=config.learn_temperature
        )  # FSDP shards no scalars
        self.category_scale = nn.Parameter(torch.zeros(1))
        self.category_bias = nn.Parameter(torch.zeros(1))
        if config.queue_size:
            self.queue = FeatureQueue(config.queue_size, width)
            self.momentum_tower = copy.deepcopy(self.vision_tower).requires_grad_(False)
            self.momentum_image_projection = copy.deepcopy(self.image_projection).requires_grad_(False)
            self.momentum_text_projection = copy.deepcopy(self.text_projection).requires_grad_(False)
        # a trainer may change these: the weight of voxels inside, while masks are still empty, and of each loss in the sum
        self.positive_voxel_weight = 1.0
        self.positive_voxel_power: float | None = None
        self.loss_weights: dict[str, float] = {}
        self.hard_names = 0.0  # see `hard_weights`; of names in the category and the cell loss
        self._text_cache: dict[tuple[int, ...], torch.Tensor] = {}
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, CTInstructForPretraining):
            init.constant_(module.logit_scale, math.log(1 / self.config.contrastive_temperature))
            init.constant_(module.category_scale, math.log(1 / self.config.contrastive_temperature))
            init.zeros_(module.category_bias)

    def train(self, mode: bool = True) -> CTInstructForPretraining:
        """As in torch; a text encoder without trained parameters keeps reading as in inference, without dropout."""
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.text_encoder.parameters()):
            self.text_encoder.eval()
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.text_encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_encoder.set_input_embeddings(value)

    @staticmethod
    def pool(features: CTInstructVisionOutput, slice_mask: torch.Tensor | None) -> torch.Tensor:
        tokens = features.last_hidden_state
        sizes = [z * y * x * s for z, y, x, s in grid_rows(features.patch_grid)]
        kept = torch.ones(len(tokens), device=tokens.device) if slice_mask is None else slice_mask.to(tokens.device)
        pooled = []
        for part, keep in zip(tokens.split(sizes), kept.to(tokens.dtype).split(sizes), strict=True):
            pooled.append((part * keep[:, None]).sum(0) / keep.sum().clamp(min=1))
        return torch.stack(pooled)

    def embed_images(
        self, features: CTInstructVisionOutput, slice_mask: torch.Tensor | None, projection: nn.Module
    ) -> torch.Tensor:
        """Normalised image embeddings [images, D_text] for retrieval.

        With `contrastive_pooling="mean"` the mean token is projected; with `"smooth_max"` every token is, and each channel
        is pooled by log-mean-exp, so that what only a few slices show is not averaged away.
        """
        if self.config.contrastive_pooling == "mean":
            return F.normalize(projection(self.pool(features, slice_mask)), dim=-1)
        scores = projection(features.last_hidden_state) * SHARPNESS
        return F.normalize(smooth_max(scores, features.patch_grid, slice_mask) / SHARPNESS, dim=-1)

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        patch_grid: PatchGrid | None = None,
        slice_mask: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CTInstructVisionOutput | tuple:
        """The tower's output with `pooler_output` [images, D_text], normalised, for retrieval against texts."""
        features = self.vision_tower(
            pixel_values,
            patch_grid,
            slice_mask,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        features.pooler_output = self.embed_images(features, slice_mask, self.image_projection)
        use_dict = return_dict if return_dict is not None else self.config.return_dict
        return features if use_dict else features.to_tuple()

    def embed_texts(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """The shared text embedding T [texts, D_text], before any normalisation.

        A frozen encoder reads each text once; its output is kept.
        """
        return self.text_projection(self.encode_texts(input_ids, attention_mask))

    def encode_texts(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        frozen = not any(parameter.requires_grad for parameter in self.text_encoder.parameters())
        if not frozen:
            return self._read(input_ids, attention_mask)
        keys = [tuple(row[mask.bool()].tolist()) for row, mask in zip(input_ids, attention_mask, strict=True)]
        for row, mask, key in zip(input_ids, attention_mask, keys, strict=True):
            if key not in self._text_cache:  # read alone, so that it does not depend on its batch
                with torch.no_grad():
                    words = row[mask.bool()][None]
                    self._text_cache[key] = self._read(words, torch.ones_like(words))[0]
        return torch.stack([self._text_cache[key].to(input_ids.device) for key in keys])

    def _read(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        encoded = self.text_encoder(input_ids=input_ids, attention_mask=attention_mask, return_dict=True)
        return mean_of_words(encoded.last_hidden_state, attention_mask)

    def get_text_features(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling | tuple:
        """The text encoder's output with `pooler_output` [texts, D_text], normalised."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        wanted = {name: kwargs[name] for name in ("output_hidden_states", "output_attentions") if name in kwargs}
        encoded = self.text_encoder(input_ids=input_ids, attention_mask=mask, return_dict=True, **wanted)
        pooled = self.text_projection(mean_of_words(encoded.last_hidden_state, mask))
        output = BaseModelOutputWithPooling(
            last_hidden_state=encoded.last_hidden_state,
            pooler_output=F.normalize(pooled, dim=-1),
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )
        use_dict = return_dict if return_dict is not None else self.config.return_dict
        return output if use_dict else output.to_tuple()

    @needs_labels()
    def forward(
        self,
        pixel_values: torch.Tensor,
        patch_grid: PatchGrid | None = None,
        slice_mask: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        text_images: torch.Tensor | None = None,
        class_input_ids: torch.Tensor | None = None,
        class_attention_mask: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
        mask_input_ids: torch.Tensor | None = None,
        mask_attention_mask: torch.Tensor | None = None,
        mask_images: torch.Tensor | None = None,
        mask_labels: Sequence[torch.Tensor] | None = None,
        mask_weights: torch.Tensor | None = None,
        mask_groups: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CTInstructPretrainingOutput | tuple:
        """A step of stage one.

        Args:
            pixel_values, patch_grid, slice_mask: see `CTInstructVisionModel.forward`.
            input_ids, attention_mask: [texts, L], descriptions of images.
            text_images: [texts], the image that each describes; the first image for the first text by default.
            class_input_ids, class_attention_mask: [categories, L], a sentence each.
            class_labels: [images, categories], 1, 0, or −1 for unknown.
            mask_input_ids, mask_attention_mask: [masks, L], names of structures.
            mask_images: [masks], the image in which each is looked for; 0 by default.
            mask_labels: one int8 [D, H, W] on the canvas per mask; −1 is padding.
            mask_weights: [masks], of the mean; equal by default, as in the paper.
            mask_groups: [masks], masks of small images that are scored together, see `masks_loss`.

        Raises:
            ValueError: for labels without the texts that they belong to.
        """
        for name, labels, texts in (("class", class_labels, class_input_ids), ("mask", mask_labels, mask_input_ids)):
            if labels is not None and len(labels) and texts is None:
                raise CTInstructError(f"{name}_labels need {name}_input_ids, the texts that they belong to.")
        wants_cells = bool(self.loss_weights.get("cells")) and mask_labels is not None
        features = cast(
            CTInstructVisionOutput,
            self.get_image_features(
                pixel_values,
                patch_grid,
                slice_mask,
                output_hidden_states=True if wants_cells else output_hidden_states,
                output_attentions=output_attentions,
                return_dict=True,
            ),
        )
        images = cast(torch.Tensor, features.pooler_output)
        output = CTInstructPretrainingOutput(image_features=images, hidden_states=features.hidden_states)
        output.attentions = features.attentions
        if input_ids is not None:
            texts = F.normalize(self.embed_texts(input_ids, attention_mask), dim=-1)
            output.text_features = texts
            owners = torch.arange(len(texts), device=texts.device) if text_images is None else text_images
            batch = (pixel_values, features.patch_grid, slice_mask)
            words = (input_ids, attention_mask)
            output.contrastive_loss = self.contrast(images[owners], texts, batch, words, owners)
        if class_input_ids is not None:
            classes = F.normalize(self.embed_texts(class_input_ids, class_attention_mask), dim=-1)
            output.category_logits = self.categorise(features, slice_mask, classes)
            if class_labels is not None:
                output.category_loss = self.category_loss(output.category_logits, class_labels)
        if mask_input_ids is not None:
            queries = self.embed_texts(mask_input_ids, mask_attention_mask)
            output.mask_logits = self.segment(features, queries, mask_images)
            if mask_labels is not None:
                output.segmentation_loss = masks_loss(
                    output.mask_logits,
                    mask_labels,
                    self.positive_voxel_weight,
                    mask_weights,
                    self.positive_voxel_power,
                    mask_groups,
                )
                if wants_cells:
                    output.cell_loss = cell_loss(
                        features,
                        self.category_projection,
                        lambda cosines: cosines * self.category_scale.exp() + self.category_bias,
                        queries,
                        mask_labels,
                        mask_images,
                        mask_weights,
                        self.hard_names,
                    )
        output.loss = self.sum_of_losses(output)
        use_dict = return_dict if return_dict is not None else self.config.return_dict
        return output if use_dict else output.to_tuple()

    def sum_of_losses(self, output: CTInstructPretrainingOutput) -> torch.Tensor | None:
        """Equation 5 over the losses that a batch has; each counts once unless `loss_weights` says otherwise."""
        parts = {
            "contrastive": output.contrastive_loss,
            "category": output.category_loss,
            "segmentation": output.segmentation_loss,
            "cells": output.cell_loss,
        }
        losses = [loss * self.loss_weights.get(name, 1.0) for name, loss in parts.items() if loss is not None]
        return sum(losses[1:], losses[0]) if losses else None

    def categorise(
        self, features: CTInstructVisionOutput, slice_mask: torch.Tensor | None, classes: torch.Tensor
    ) -> torch.Tensor:
        """Logits [images, categories] from scaled cosines (equation 4); `classes` [categories, D_text], normalised."""
        scale = self.category_scale.exp()
        if self.config.category_pooling == "mean":
            images = F.normalize(self.category_projection(self.pool(features, slice_mask)), dim=-1)
            return images @ classes.T * scale + self.category_bias
        tokens = F.normalize(self.category_projection(features.last_hidden_state), dim=-1)
        scores = tokens @ classes.T * scale  # [N, categories]
        return smooth_max(scores, features.patch_grid, slice_mask) + self.category_bias

    def category_loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """L_cls of [images, categories], −1 unknown (equation 4); with `hard_names`, categories count by `hard_weights`."""
        return hard_label_loss(logits, labels, self.hard_names) if self.hard_names else label_loss(logits, labels)

    def segment(
        self, features: CTInstructVisionOutput, queries: torch.Tensor, owners: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """Mask logits [D, H, W] of each query in its image."""
        grids = grid_rows(features.patch_grid)
        owner_list = [0] * len(queries) if owners is None else owners.tolist()
        return self.segmentation_decoder.paint_owned(
            queries, owner_list, features.feature_maps, features.last_hidden_state, grids
        )

    def contrast(
        self,
        images: torch.Tensor,
        texts: torch.Tensor,
        batch: tuple[torch.Tensor, PatchGrid, torch.Tensor | None],
        words: tuple[torch.Tensor, torch.Tensor | None],
        owners: torch.Tensor,
    ) -> torch.Tensor:
        """L_CLIP of the batch, over all processes and past samples where the config asks for them."""
        scale = self.logit_scale.exp().clamp(max=100.0)
        # not while scoring, where processes may have different numbers of images
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if self.config.gather_features and several and torch.is_grad_enabled():
            images, texts = GatherWithGradient.apply(images), GatherWithGradient.apply(texts)
        if not self.config.queue_size:
            scores = images @ texts.T * scale
            return contrastive_loss(scores, scores.T)
        with torch.no_grad():
            if self.training:
                self.follow()
            tower = self.momentum_tower(*batch, return_dict=True)
            past_images, past_texts = self.queue.contents()
            slow_images = self.embed_images(tower, batch[2], self.momentum_image_projection)[owners]
            slow_texts = F.normalize(self.momentum_text_projection(self.encode_texts(*words)), dim=-1)
            if len(slow_images) != len(images):
                slow_images, slow_texts = GatherWithGradient.apply(slow_images), GatherWithGradient.apply(slow_texts)
            all_images, all_texts = torch.cat([slow_images, past_images]), torch.cat([slow_texts, past_texts])
            alpha = self.config.queue_alpha
            targets = []
            for queries, keys in ((slow_images, all_texts), (slow_texts, all_images)):
                hard = torch.zeros(len(queries), len(keys), device=keys.device).fill_diagonal_(1.0)
                targets.append(alpha * (queries @ keys.T * scale).softmax(-1) + (1 - alpha) * hard)
        loss = contrastive_loss(images @ all_texts.T * scale, texts @ all_images.T * scale, (targets[0], targets[1]))
        if self.training:
            self.queue.push(slow_images, slow_texts)
        return loss

    @torch.no_grad()
    def follow(self) -> None:
        """The momentum copies move a little toward the model; before the first step they are made equal to it."""
        momentum = self.config.queue_momentum if int(self.queue.filled) else 0.0
        for fast, slow in (
            (self.vision_tower, self.momentum_tower),
            (self.image_projection, self.momentum_image_projection),
            (self.text_projection, self.momentum_text_projection),
        ):
            for new, old in zip(fast.parameters(), slow.parameters(), strict=True):
                whole = new.full_tensor() if hasattr(new, "full_tensor") else new  # FSDP holds a part of it
                old.mul_(momentum).add_(whole.detach().to(old.dtype), alpha=1 - momentum)


__all__ = ["CTInstructForPretraining"]
