"""What a stage-two recipe says beside the trainer's arguments, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.parts import check_part, part_name
from ..data.prepare import is_made
from ..data.sources import MADE
from ..data.tasks import TASKS
from ..errors import CTInstructError
from ..inference.folders import BUNDLED, require
from .augmentation import Augmentation
from .small_models.settings import SmallInstruction

# part of a recipe -> where its weights are
PARTS: dict[str, str] = {
    "vision_tower": "model.vision_tower",
    "bridger": "model.bridger",
    "language_model": "model.language_model",
    "segmentation_query": "segmentation_query",
    "segmentation_decoder": "segmentation_decoder",
    "disease_head": "disease_head",
}
TRAINERS = ("trl", "transformers")


@dataclass
class InstructSettings:
    """What a stage-two recipe has beside SFTConfig or TrainingArguments.

    Attributes:
        vision: folder of a stage-one model (its `model` folder); tower, decoder and image processor come from it.
        language_model: `tiny`, `smollm2`, a folder or a name on the Hub, see `load_language_model`.
        model: a whole model to go on from instead of these two, `bundled` for the bundled one; `vision` then only gives `align_prompts` its texts.
        config: fields of `CTInstructConfig`: bridger, disease_head, segmentation_loss_weight, disease_loss_weight,
            disease_positive_weights …
        disease_lists: {name: diseases} beside the config's own; `only_these_lists` leaves the config's own out.
        freeze: parts that are not trained, of `PARTS`.
        lora: arguments of peft's `LoraConfig` for the language model; what is new in the model is trained whole.
        save: `merged`, a whole model with the adapters in its weights, or `adapter`, the adapters alone (and what else is trained)
            with config and processor beside them; they are loaded with `model`, by its name, wherever a model is named.
        load_in_4bit: QLoRA: the language model in 4 bits by bitsandbytes; what is saved has plain weights.
        trainer: `trl` or `transformers`.
        mixture: parts {dataset, tasks, weight, batch_size …}, see `data.parts`.
        evaluation: one such part, or a list of them, with `batches` (how many are scored), see `evaluation_parts`: each loss,
            the Dice of masks, F1 and AUC of diseases, of each part and their mean.
        early_stopping_patience: evaluations without a better `metric_for_best_model` before training ends.
        augmentation: `true`, or a mapping: scans and masks are changed together, see `Augmentation`. Not in the paper.
        cache: folder of prepared patches, and of tokens.
        cache_limit: GB that it may take; the oldest files make room.
        group_by_length: batches of texts of like length.
        padding_side, max_length: see `InstructionCollator`; `max_tokens` is its max_length.
        max_skipped: so many samples, or such a share of all rows, may be unreadable before training ends.
        batch_norm: `local`, `synchronised` over processes, or `frozen`.
        learning_rates: {prefix of weights: rate} where it is not `learning_rate`.
        small_model: what is in neither the paper nor the release, see `SmallInstruction`.
    """

    vision: str | None = None
    language_model: str = "tiny"
    model: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    disease_lists: dict[str, list[str]] = field(default_factory=dict)
    only_these_lists: bool = False
    freeze: list[str] = field(default_factory=list)
    lora: dict[str, Any] | None = None
    save: str = "merged"
    load_in_4bit: bool = False
    trainer: str = "trl"
    mixture: list[dict[str, Any]] = field(default_factory=list)
    evaluation: dict[str, Any] | list[dict[str, Any]] | None = None
    early_stopping_patience: int | None = None
    augmentation: dict[str, Any] | bool | None = None
    cache: str | None = None
    cache_limit: float | None = None
    group_by_length: bool = False
    padding_side: str = "right"
    max_tokens: int = 4096
    max_skipped: float = 100
    batch_norm: str = "frozen"
    learning_rates: dict[str, float] = field(default_factory=dict)
    small_model: SmallInstruction = field(default_factory=SmallInstruction)

    def __post_init__(self) -> None:
        if not self.mixture:
            raise CTInstructError("The recipe has an empty mixture: name at least one part to train on.")
        for part in [*self.mixture, *self.evaluation_parts]:
            check_part(part, "instructions", tuple(TASKS))
        if self.vision is None and self.model is None:
            raise CTInstructError("The recipe needs vision (a stage-one folder) or model (a whole one).")
        if self.vision is not None and self.model is not None and not self.small_model.align_prompts:
            raise CTInstructError("The recipe has model and vision: beside model, vision only gives align_prompts its texts.")  # fmt: skip
        if self.model is not None and self.config:
            raise CTInstructError("The recipe has model and config: a model that is gone on from keeps its own.")
        for name, wanted in (("vision", ("stage one", "stage two", "tower")), ("model", ("stage two",))):
            value = getattr(self, name)
            if value is not None and Path(value).is_dir():
                require(Path(value), *wanted, argument=name)
            elif value is not None and (name == "vision" or "/" not in value) and (name, value) != ("model", BUNDLED):
                raise CTInstructError(f"{name}: {value} is no folder with a model.")
        wrong = sorted(set(self.freeze) - set(PARTS))
        if wrong:
            raise CTInstructError(f"freeze names {', '.join(wrong)}: known parts are {', '.join(PARTS)}.")
        if self.trainer not in TRAINERS:
            raise CTInstructError(f"trainer is '{self.trainer}': use {' or '.join(TRAINERS)}.")
        if self.early_stopping_patience is not None and not self.evaluation:
            raise CTInstructError("early_stopping_patience needs an evaluation in the recipe.")
        if self.augmentation:
            Augmentation.of(self.augmentation)
            if self.small_model.keep_tokens:
                raise CTInstructError("augmentation changes scans, of which keep_tokens keeps the tokens: choose one.")
        self.small_model.check_parts(self.vision, self.model, self.language_model, self.freeze)
        if self.save not in ("merged", "adapter"):
            raise CTInstructError(f"save is '{self.save}': use merged or adapter.")
        if self.save == "adapter" and (self.lora is None or self.model is None):
            raise CTInstructError("save: adapter needs lora, and model: a whole model that the adapters belong to.")
        if self.load_in_4bit and self.lora is None:
            raise CTInstructError("load_in_4bit needs lora: weights of 4 bits are not trained themselves.")

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The parts that are scored on the way, with their `batches`."""
        return [self.evaluation] if isinstance(self.evaluation, dict) else list(self.evaluation or [])

    @property
    def evaluation_parts(self) -> list[dict[str, Any]]:
        """The same as `data.parts` takes them. One that names a part of the mixture takes from it what it leaves out itself; a data
        set without the split that it is scored on, as one of a few scans, is scored on what it has for training."""
        taught = {part_name(part): part for part in self.mixture if isinstance(part, dict)}
        parts = []
        for scored in self.evaluations:
            part = {name: value for name, value in scored.items() if name != "batches"}
            source = {} if {"dataset", *MADE} & set(part) else taught.get(str(part.get("name")), {})
            part = {**{name: value for name, value in source.items() if name not in ("weight", "split")}, **part}
            part.setdefault("split", "validation" if _has_split(part, "validation") else "train")
            parts.append(part)
        return parts


def _has_split(part: dict[str, Any], split: str) -> bool:
    """Whether a part has rows of a split; a made set has any."""
    data = str(part.get("dataset", ""))
    return not data or is_made(data) or bool(list((Path(data) / "instructions").glob(f"{split}-*.parquet")))
