"""The block `small_model` of a recipe: what a tiny network needs to learn on a CPU. All of it is off by default, and off in the
recipes of the paper's size."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ...errors import CTInstructError
from ..language_models import FRESH
from .first_reading import FirstReading

VOXELS = ("weight", "end", "steps", "power")


@dataclass
class SmallModel:
    """What both stages know.

    Attributes:
        positive_voxels: {weight, steps, end, power}: voxels inside a mask weigh so much in the cross entropy at first and
            `end` (1, as in the paper) after so many steps (all by default): small structures would else be left empty.
            With `power` that is the most, and large structures get less, see `masks_loss`.
    """

    positive_voxels: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_keys("positive_voxels", self.positive_voxels, VOXELS)


@dataclass
class SmallPretraining(SmallModel):
    """Of stage one.

    Attributes:
        spread_texts: start the text projection so that the mixture's texts lie far apart, see `texts.spread_texts`.
        balance_masks, join_masks: how masks of a batch count, see `AlignmentCollator`.
        hard_names: {power, from}: from this share of the steps on, a name counts in the category and the cell loss by its
            own loss to this power, see `small_models_ctinstruct.hard_weights`.
        freeze_batch_norm_from: share of the steps from which on batch norms keep their running statistics, as in inference.
    """

    spread_texts: bool = False
    balance_masks: bool = False
    join_masks: bool = False
    hard_names: dict[str, float] = field(default_factory=dict)
    freeze_batch_norm_from: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_keys("hard_names", self.hard_names, ("power", "from"))
        if self.freeze_batch_norm_from is not None and not 0 <= self.freeze_batch_norm_from <= 1:
            raise CTInstructError(f"freeze_batch_norm_from is {self.freeze_batch_norm_from}: give a share from 0 to 1.")


@dataclass
class SmallInstruction(SmallModel):
    """Of stage two.

    Attributes:
        keep_tokens: with a frozen tower: its tokens are computed once, for samples without masks, see `TokenStore`.
        align_prompts: teach `<SEG>` to prompt the decoder as stage one's text encoder did, instead of by painting masks:
            each request for a mask then costs words only. Needs `vision` and a frozen decoder.
        start_bridger: start the bridger with what stage one's category grain reads from a token, see
            `stage_one.start_bridger`. Needs `vision`, keep_tokens and no `model`.
        read_first: {steps, batch_size, turns, learning_rate}: the fresh language model learns to read from words alone,
            see `first_reading.learn_to_read`; only of `tiny`.
    """

    keep_tokens: bool = False
    align_prompts: bool = False
    start_bridger: bool = False
    read_first: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.read_first:
            FirstReading.of(self.read_first)

    def check_parts(self, vision: str | None, model: str | None, language_model: str, freeze: list[str]) -> None:
        """Raises CTInstructError where the rest of the recipe lacks what this block needs."""
        if self.keep_tokens and "vision_tower" not in freeze:
            raise CTInstructError("keep_tokens needs a frozen tower: add vision_tower to freeze.")
        if self.align_prompts and (vision is None or "segmentation_decoder" not in freeze):
            raise CTInstructError("align_prompts needs vision (a stage-one folder) and segmentation_decoder in freeze.")
        if self.start_bridger and (vision is None or model is not None or not self.keep_tokens):
            raise CTInstructError("start_bridger needs vision (a stage-one folder), keep_tokens, and no model.")
        if self.read_first and (language_model != FRESH or model is not None):
            raise CTInstructError(f"read_first is for the fresh language model '{FRESH}': another can read already.")


def _check_keys(name: str, settings: dict[str, float], known: tuple[str, ...]) -> None:
    if not isinstance(settings, dict):
        raise CTInstructError(f"{name} is {settings!r}: give {{{known[0]}: …}}.")
    if wrong := sorted(set(settings) - set(known)):
        raise CTInstructError(f"{name} has unknown {', '.join(wrong)}: known are {', '.join(known)}.")
