"""The answer heads: `<SEG>` becomes a mask, `<disease_confidence>` a logit; checks of labels, and the sum of the losses."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import nn

from .configuration_ctinstruct import CTInstructConfig, CTInstructError
from .segmentation_ctinstruct import CTInstructSegmentationDecoder
from .vision_blocks_ctinstruct import grid_rows
from .vision_ctinstruct import CTInstructVisionOutput

# fields of the config that hold token ids, and the tokens
SPECIAL_TOKENS = {
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "image_token_id": "<|image_pad|>",
    "seg_token_id": "<SEG>",
    "disease_token_id": "<disease_confidence>",
}


class AnswerHeads:
    """Mixin for the whole model: masks and disease logits from the states of answer tokens."""

    config: CTInstructConfig
    segmentation_query: nn.Linear
    segmentation_decoder: CTInstructSegmentationDecoder
    disease_head: nn.Linear

    def check_labels(self, input_ids: torch.Tensor | None, **labels: Any) -> None:
        """Raises CTInstructError where masks or diseases have more or fewer labels than tokens."""
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
        """`labels` [B, L] with −100 at image and vision tokens, which are never written."""
        names = ("image_token_id", "vision_start_token_id", "vision_end_token_id")
        ids = torch.tensor([getattr(self.config, name) for name in names], device=labels.device)
        seen = torch.isin(labels, ids)
        if input_ids is not None:
            seen |= torch.isin(input_ids.to(labels.device), ids)
        return labels.masked_fill(seen, -100)

    def share_of_words(self, labels: torch.Tensor | None, num_items_in_batch: Any) -> torch.Tensor | float:
        """The share of a step's words (`num_items_in_batch`) that `labels` [B, L] hold; 1 where that number is None."""
        if labels is None or num_items_in_batch is None:
            return 1.0
        return (labels[:, 1:] != -100).sum() / num_items_in_batch

    def total_loss(
        self,
        lm_loss: torch.Tensor | None,
        segmentation_loss: torch.Tensor | None,
        disease_loss: torch.Tensor | None,
        query_loss: torch.Tensor | None = None,
        share: torch.Tensor | float = 1.0,
    ) -> torch.Tensor | None:
        """The weighted sum of the losses that are not None. `lm_loss` is already divided by the words of all batches of a
        step; `share` does the same for the others."""
        parts = [
            (1.0, lm_loss),
            (self.config.segmentation_loss_weight * share, segmentation_loss),
            (self.config.disease_loss_weight * share, disease_loss),
            (self.config.segmentation_loss_weight * share, query_loss),
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
        """Mask logits [D, H, W] of each `<SEG>`, on the canvas of the last image before it in its sample, or of the sample's
        first image where there is none before; [0, 0, 0] in samples without images.

        `seen_before` counts the image tokens before `input_ids`, where these continue a cached prompt.
        """
        asked = input_ids == self.config.seg_token_id
        if vision_features is None or vision_features.feature_maps is None or not bool(asked.any()):
            return None
        grids = grid_rows(vision_features.patch_grid)
        ends = torch.tensor(list(accumulate(z * y * x * s for z, y, x, s in grids)), device=input_ids.device)
        shown = input_ids == self.config.image_token_id  # [B, L]
        seen = shown.flatten().cumsum(0).view_as(shown) + seen_before
        earlier = shown.sum(-1, keepdim=True).cumsum(0) - shown.sum(-1, keepdim=True)  # tokens of the samples before
        seen = seen.maximum(earlier + 1)  # never the image of another sample
        sees = (shown.any(-1, keepdim=True) | (seen_before > 0)).expand_as(asked)[asked]
        owners = torch.searchsorted(ends, seen[asked][sees])  # the image whose last token came at or after this count
        queries = self.segmentation_query(states[asked][sees.to(states.device)])
        masks = iter(
            self.segmentation_decoder.paint_owned(
                queries, owners.tolist(), vision_features.feature_maps, vision_features.last_hidden_state, grids
            )
            if len(queries)
            else []
        )
        return [next(masks) if seeing else queries.new_zeros(0, 0, 0) for seeing in sees.tolist()]

    def disease_rows(self, input_ids: torch.Tensor, disease_ids: torch.Tensor | None) -> torch.Tensor | None:
        """Row of the disease head for each `<disease_confidence>`: int64 [tokens]; all 0 with a shared head."""
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
        """A logit per `<disease_confidence>`, in reading order: [tokens]."""
        if rows is None:
            return None
        scores = self.disease_head(states[input_ids == self.config.disease_token_id])  # [tokens, heads]
        return scores.gather(1, rows.to(scores.device)[:, None])[:, 0]

    def positive_weights(self, rows: torch.Tensor | None) -> torch.Tensor | None:
        """`config.disease_positive_weights` [tokens] of the given rows; 1 where a list has none."""
        weights = self.config.disease_positive_weights
        if not weights or rows is None or self.config.disease_head == "shared":
            return None
        flat = [
            weight
            for name, diseases in self.config.disease_lists.items()
            for weight in weights.get(name, [1.0] * len(diseases))
        ]
        return torch.tensor(flat, device=rows.device)[rows]
