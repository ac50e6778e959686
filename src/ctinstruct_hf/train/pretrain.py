"""Stage one from a recipe (section 3.2): Transformers' Trainer over a mixture, scored on held-out scans as it goes."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..data.mixture import MixtureEntry, first_rows, skips_allowed
from ..data.parts import GRAINS, check_part, load_part
from ..data.store import TINY_PATCH, PatchStore
from ..errors import CTInstructError
from ..evaluation.alignment import AlignmentScores, score_alignment
from ..files import write_whole
from ..inference.folders import require
from ..modeling.configuration_ctinstruct import CTInstructConfig
from ..modeling.pretraining_ctinstruct import CTInstructForPretraining
from ..processing.image_processing_ctinstruct import CTInstructImageProcessor
from .batch_norm import set_batch_norm
from .checkpoints import place_to_start, save_trained
from .collator import AlignmentCollator
from .recipe import parse_recipe
from .sharded import built_whole, whole_model
from .small_models.schedules import FreezeBatchNorm, LossSchedule
from .small_models.settings import SmallPretraining
from .small_models.stage_one import ALIGNED
from .small_models.texts import spread_texts
from .text_encoders import load_text_encoder
from .trainer import MixtureTrainer, check_rates, data_seed, make_mixture

logger = logging.getLogger(__name__)
PARTS = ("vision_tower", "segmentation_decoder", "text_encoder", "text_projection", "image_projection", "category_projection")  # fmt: skip


@dataclass
class PretrainSettings:
    """What a stage-one recipe has beside TrainingArguments.

    Attributes:
        preset: sizes, `tiny` or `paper`; with `model`, a folder of an earlier run to go on from, it is not used.
        vision, segmentation: fields of the two configs to set instead of the preset's.
        alignment: fields of `CTInstructConfig` for the contrastive loss: contrastive_temperature, learn_temperature,
            gather_features, queue_size, queue_momentum, queue_alpha.
        text_encoder: `biolord-2023`, `all-minilm-l6-v2`, a folder, or a name on the Hub.
        freeze: parts that are not trained, of `PARTS`; a frozen text encoder reads each text once.
        image_processor: settings of `CTInstructImageProcessor`.
        mixture: parts {dataset, tasks, weight …}, see `data.parts`.
        evaluation: one such part, with `masks` (how many scans are segmented) and `pool` (of retrieval).
        cache: folder of prepared patches; none prepares them every time.
        cache_limit: GB that it may take; the oldest files make room.
        batch_norm: `local`, `synchronised` over processes, or `frozen`.
        masks_per_image, absent_share: which structures a batch asks for, see `AlignmentCollator`.
        max_skipped: so many samples, or such a share of all rows, may be unreadable before training ends.
        loss_weights: {contrastive, category, segmentation: factor}, 1 by default as in equation 5, and `cells`, 0 by
            default, of `small_models_ctinstruct.cell_loss`.
        learning_rates: {prefix of weights: rate} where it is not `learning_rate`; attention diverges at rates that
            convolutions with batch norm like.
        early_stopping_patience: evaluations without a better `metric_for_best_model` before training ends.
        small_model: what is in neither the paper nor the release, see `SmallPretraining`.
    """

    preset: str = "tiny"
    model: str | None = None
    vision: dict[str, Any] = field(default_factory=dict)
    segmentation: dict[str, Any] = field(default_factory=dict)
    alignment: dict[str, Any] = field(default_factory=dict)
    text_encoder: str = "biolord-2023"
    freeze: list[str] = field(default_factory=lambda: ["text_encoder"])
    image_processor: dict[str, Any] = field(default_factory=dict)
    mixture: list[dict[str, Any]] = field(default_factory=list)
    evaluation: dict[str, Any] | None = None
    cache: str | None = None
    cache_limit: float | None = None
    masks_per_image: int = 6
    absent_share: float = 0.15
    max_text_length: int = 256
    max_skipped: float = 100
    batch_norm: str = "local"
    loss_weights: dict[str, float] = field(default_factory=dict)
    learning_rates: dict[str, float] = field(default_factory=dict)
    early_stopping_patience: int | None = None
    small_model: SmallPretraining = field(default_factory=SmallPretraining)

    def __post_init__(self) -> None:
        if not self.mixture:
            raise CTInstructError("The recipe has an empty mixture: name at least one part to train on.")
        for part in self.mixture:
            check_part(part, "alignment", GRAINS)
        if self.evaluation is not None:
            check_part(self.evaluation_part, "alignment", GRAINS)
        if self.early_stopping_patience is not None and self.evaluation is None:
            raise CTInstructError("early_stopping_patience needs an evaluation in the recipe.")
        losses = (*GRAINS, "cells")
        unknown = sorted(set(self.loss_weights) - set(losses))
        if unknown:
            raise CTInstructError(f"loss_weights names {', '.join(unknown)}: known are {', '.join(losses)}.")
        wrong = sorted(set(self.freeze) - set(PARTS))
        if wrong:
            raise CTInstructError(f"freeze names {', '.join(wrong)}: known parts are {', '.join(PARTS)}.")
        if self.model is not None and not Path(self.model).is_dir():
            raise CTInstructError(f"model: {self.model} does not exist.")
        if self.model is not None:
            require(Path(self.model), "stage one")

    @property
    def evaluation_part(self) -> dict[str, Any]:
        part = dict(self.evaluation or {})
        part.setdefault("split", "validation")
        return {name: value for name, value in part.items() if name not in ("masks", "pool")}


def build_model(settings: PretrainSettings) -> tuple[CTInstructForPretraining, Any]:
    """The model of a recipe with its pretrained text encoder, and the encoder's tokenizer."""
    if settings.model is not None:
        from transformers import AutoTokenizer

        model = CTInstructForPretraining.from_pretrained(
            settings.model, dtype=torch.float32, use_safetensors=True, **settings.alignment
        )
        tokenizer = AutoTokenizer.from_pretrained(settings.model)
    else:
        encoder, tokenizer = load_text_encoder(settings.text_encoder)
        config = CTInstructConfig.preset(settings.preset)  # type: ignore[arg-type]
        for part, changes in (
            (config.vision_config, settings.vision),
            (config.segmentation_config, settings.segmentation),
        ):
            _set_fields(part, changes)
        _set_fields(config, settings.alignment)
        config.segmentation_config.feature_channels = config.vision_config.feature_channels
        config.check_maps()
        config.text_encoder_config = encoder.config
        model = CTInstructForPretraining(config)
        model.text_encoder.load_state_dict(encoder.state_dict())
    if settings.loss_weights.get("cells") and model.config.vision_config.architecture != "hybrid":
        raise CTInstructError(
            "loss_weights.cells needs the hybrid tower: the others have no cells that tokens are means of."
        )
    model.loss_weights = {name: float(weight) for name, weight in settings.loss_weights.items()}
    set_batch_norm(model, settings.batch_norm)
    for name in settings.freeze:  # a frozen part keeps its running statistics too
        set_batch_norm(getattr(model, name).requires_grad_(False), "frozen")
    return model, tokenizer


def _set_fields(config: Any, changes: dict[str, Any]) -> None:
    for name, value in changes.items():
        if not hasattr(config, name):
            raise CTInstructError(f"{type(config).__name__} has no field '{name}'.")
        setattr(config, name, value)


def category_names(entries: Sequence[MixtureEntry], most: int = 200) -> list[str]:
    """What the category grain of a mixture is about, by the first rows of each part."""
    return list(dict.fromkeys(label["name"] for row in first_rows(entries, most) for label in row["labels"]))


class AlignmentTrainer(MixtureTrainer):
    """Stage one's Trainer: evaluation is retrieval, categories and masks on held-out rows."""

    def __init__(
        self, model: Any, args: Any, mixture: Any, collator: Any, held_out: Any = None, masks: int | None = None,
        pool: int | None = 200, **kwargs: Any,
    ) -> None:  # fmt: skip
        self.held_out, self.masks, self.pool = held_out, masks, pool
        super().__init__(model, args, mixture, collator, eval_dataset=held_out, **kwargs)

    def score(self, progress: Callable[[str], None] | None = None) -> AlignmentScores:
        """Scores of the held-out rows, shared out over the processes."""
        model: Any = whole_model(self, everywhere=True)
        if self.args.world_size > 1:  # running statistics are each process's own: those of the first are saved
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, src=0)
        collator: AlignmentCollator = self.data_collator  # type: ignore[assignment]
        share = (self.args.process_index, self.args.world_size)
        return score_alignment(
            model, collator.store, collator.words, self.held_out, self.masks, self.pool, share=share, progress=progress
        )

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:  # fmt: skip
        from .pictures import log_scores

        scores = self.score()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.metrics.items()}
        if self.is_world_process_zero():
            log_scores(self, scores)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def pretrain(
    recipe: dict[str, Any],
    resume: str | None = None,
    restart: bool = False,
    tell: Callable[[str], None] = lambda step: None,
) -> dict[str, float]:
    """Train stage one; a run that was interrupted goes on from its last whole checkpoint.

    Args:
        recipe: from `read_recipe`.
        resume: a checkpoint to go on from, instead of the last whole one in `output_dir`.
        restart: begin anew; what is in `output_dir` of an earlier run is removed.
        tell: called with a sentence on progress, in the main process.

    Returns:
        The scores of the trained model on the held-out rows; also in `output_dir/scores.json`. The model is in
        `output_dir/model`.

    Raises:
        CTInstructError: for a bad recipe, before anything is trained.
    """
    settings, args = parse_recipe(
        recipe, PretrainSettings, report_to="tensorboard", logging_steps=10, save_total_limit=2
    )
    if args.process_index:
        tell = lambda step: None  # noqa: E731
    small = settings.small_model
    folder = Path(args.output_dir)
    start = place_to_start(folder, recipe, resume, restart, args.should_save)
    from transformers import EarlyStoppingCallback, set_seed

    set_seed(args.seed)
    with built_whole(args):
        model, tokenizer = build_model(settings)
    processor = CTInstructImageProcessor(
        **{
            **({"patch_size": TINY_PATCH, "max_patches": 4} if settings.preset == "tiny" else {}),
            **settings.image_processor,
        }
    )
    store = PatchStore(processor, settings.cache, settings.cache_limit)
    with args.main_process_first(desc="data"):  # the first makes what the others find
        entries = [load_part(part, "alignment") for part in settings.mixture]
        held_out = None if settings.evaluation is None else load_part(settings.evaluation_part, "alignment").rows
    collator = AlignmentCollator(
        store,
        tokenizer,
        settings.masks_per_image,
        settings.absent_share,
        settings.max_text_length,
        data_seed(args),
        skips_allowed(settings.max_skipped, entries),
        small.balance_masks,
        small.join_masks,
    )
    if settings.model is None and start is None and small.spread_texts:
        spread_texts(model, collator.words, entries)
    if names := category_names(entries):
        model.config.disease_lists = {ALIGNED: names}
    mixture = make_mixture(entries, args, start)
    callbacks: list[Any] = [LossSchedule(small.positive_voxels, small.hard_names)]
    if small.freeze_batch_norm_from is not None:
        callbacks.append(FreezeBatchNorm(small.freeze_batch_norm_from))
    if settings.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(settings.early_stopping_patience))
    evaluation = settings.evaluation or {}
    trainer = AlignmentTrainer(
        model,
        args,
        mixture,
        collator,
        held_out,
        evaluation.get("masks"),
        evaluation.get("pool", 200),
        callbacks=callbacks,
    )
    trainer.learning_rates = check_rates(settings.learning_rates, model)
    tell("training" if start is None else f"going on from {Path(start).name}")
    trainer.train(resume_from_checkpoint=start)
    scores = trainer.score(tell) if held_out is not None else AlignmentScores()
    trained = whole_model(trainer)
    if trainer.is_world_process_zero():
        save_trained(folder / "model", trained, tokenizer, processor)
        write_scores(folder / "scores.json", scores)
    trainer.accelerator.wait_for_everyone()
    return scores.metrics


def write_scores(path: Path, scores: AlignmentScores) -> None:
    """Metrics and the Dice of each structure as JSON."""
    values = asdict(scores)
    for name in ("example", "similarity", "texts", "ids"):
        values.pop(name)
    write_whole(path, json.dumps(values, indent=1))
