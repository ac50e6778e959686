"""Stage two from a recipe (section 3.3): TRL's SFTTrainer, or Transformers' Trainer, over a mixture of instructions."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, send_to_device

from ..data.mixture import Item, Mixture, MixtureBatches, MixtureEntry
from ..data.names import Names, structure_names
from ..data.parts import check_part, load_part
from ..data.samples import TASKS, ImageRef, text_of
from ..data.store import PatchStore
from ..errors import CTInstructError
from ..files import write_whole
from ..inference.folders import require
from ..inference.models import check_weights, load_processor, resolve_model
from ..modeling.modeling_ctinstruct import SPECIAL_TOKENS, CTInstructForConditionalGeneration
from ..processing.image_processing_ctinstruct import CTInstructImageProcessor
from ..processing.processing_ctinstruct import CTInstructProcessor
from .batch_norm import set_batch_norm
from .checkpoints import place_to_start, save_trained
from .collator import InstructionCollator
from .language_models import FRESH, FirstReading, learn_to_read, load_language_model
from .recipe import parse_recipe
from .sharded import built_whole, whole_model
from .stage_one import load_stage_one, start_bridger
from .token_store import TokenStore
from .trainer import (
    LOSSES,
    MixtureLoop,
    MixtureTrainer,
    base_of,
    check_rates,
    check_voxels,
    data_seed,
    make_mixture,
    prepare_arguments,
)

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
        read_first: {steps, batch_size, turns, learning_rate}: the fresh language model learns to read from words alone,
            see `language_models.learn_to_read`; only of `tiny`. Not in the paper.
        model: a whole model to go on from instead of these two; `vision` then only gives `align_prompts` its texts.
        config: fields of `CTInstructConfig`: bridger, disease_head, segmentation_loss_weight, disease_loss_weight,
            disease_positive_weights …
        disease_lists: {name: diseases} beside the config's own; `only_these_lists` leaves the config's own out.
        freeze: parts that are not trained, of `PARTS`.
        lora: arguments of peft's `LoraConfig` for the language model; what is new in the model is trained whole.
        load_in_4bit: QLoRA: the language model in 4 bits by bitsandbytes; what is saved has plain weights.
        trainer: `trl` or `transformers`.
        mixture: parts {dataset, tasks, weight, batch_size …}, see `data.parts`.
        evaluation: one such part, with `batches` (how many are scored).
        cache: folder of prepared patches, and of tokens.
        keep_tokens: with a frozen tower: its tokens are computed once, for samples without masks.
        align_prompts: teach `<SEG>` to prompt the decoder as stage one's text encoder did, instead of by painting masks:
            each request for a mask then costs words only. Needs `vision` and a frozen decoder. Not in the paper.
        start_bridger: start the bridger with what stage one's category grain reads from a token, see
            `stage_one.start_bridger`. Needs `vision`, keep_tokens and no `model`. Not in the paper.
        group_by_length: batches of texts of like length.
        padding_side, max_length, max_skipped: see `InstructionCollator`; `max_tokens` is its max_length.
        batch_norm: `local`, `synchronised` over processes, or `frozen`.
        positive_voxels: {weight, steps, end, power}, see `PretrainSettings`.
        learning_rates: {prefix of weights: rate} where it is not `learning_rate`.
    """

    vision: str | None = None
    language_model: str = "tiny"
    read_first: dict[str, Any] = field(default_factory=dict)
    model: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    disease_lists: dict[str, list[str]] = field(default_factory=dict)
    only_these_lists: bool = False
    freeze: list[str] = field(default_factory=list)
    lora: dict[str, Any] | None = None
    load_in_4bit: bool = False
    trainer: str = "trl"
    mixture: list[dict[str, Any]] = field(default_factory=list)
    evaluation: dict[str, Any] | None = None
    cache: str | None = None
    keep_tokens: bool = False
    align_prompts: bool = False
    start_bridger: bool = False
    group_by_length: bool = False
    padding_side: str = "right"
    max_tokens: int = 4096
    max_skipped: int = 100
    batch_norm: str = "frozen"
    positive_voxels: dict[str, float] = field(default_factory=dict)
    learning_rates: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.mixture:
            raise CTInstructError("The recipe has an empty mixture: name at least one part to train on.")
        for part in [*self.mixture, *([self.evaluation_part] if self.evaluation else [])]:
            check_part(part, "instructions", TASKS)
        if self.vision is None and self.model is None:
            raise CTInstructError("The recipe needs vision (a stage-one folder) or model (a whole one).")
        if self.vision is not None and self.model is not None and not self.align_prompts:
            raise CTInstructError("The recipe has model and vision: beside model, vision only gives align_prompts its texts.")  # fmt: skip
        if self.model is not None and self.config:
            raise CTInstructError("The recipe has model and config: a model that is gone on from keeps its own.")
        for name, wanted in (("vision", ("stage one", "stage two", "tower")), ("model", ("stage two",))):
            value = getattr(self, name)
            if value is not None and Path(value).is_dir():
                require(Path(value), *wanted, argument=name)
            elif value is not None and (name == "vision" or "/" not in value):
                raise CTInstructError(f"{name}: {value} is no folder with a model.")
        check_voxels(self.positive_voxels)
        wrong = sorted(set(self.freeze) - set(PARTS))
        if wrong:
            raise CTInstructError(f"freeze names {', '.join(wrong)}: known parts are {', '.join(PARTS)}.")
        if self.trainer not in TRAINERS:
            raise CTInstructError(f"trainer is '{self.trainer}': use {' or '.join(TRAINERS)}.")
        if self.keep_tokens and "vision_tower" not in self.freeze:
            raise CTInstructError("keep_tokens needs a frozen tower: add vision_tower to freeze.")
        if self.align_prompts and (self.vision is None or "segmentation_decoder" not in self.freeze):
            raise CTInstructError("align_prompts needs vision (a stage-one folder) and segmentation_decoder in freeze.")
        if self.start_bridger and (self.vision is None or self.model is not None or not self.keep_tokens):
            raise CTInstructError("start_bridger needs vision (a stage-one folder), keep_tokens, and no model.")
        if self.read_first:
            if self.language_model != FRESH or self.model is not None:
                raise CTInstructError(
                    f"read_first is for the fresh language model '{FRESH}': another can read already."
                )
            FirstReading.of(self.read_first)
        if self.load_in_4bit and self.lora is None:
            raise CTInstructError("load_in_4bit needs lora: weights of 4 bits are not trained themselves.")

    @property
    def evaluation_part(self) -> dict[str, Any]:
        part = {"split": "validation", **(self.evaluation or {})}
        return {name: value for name, value in part.items() if name != "batches"}


def build_model(settings: InstructSettings) -> tuple[Any, CTInstructProcessor]:
    """The model of a recipe and its processor; frozen parts are frozen, adapters are on.

    Raises:
        CTInstructError: where the parts do not fit each other or the tokenizer.
    """
    loading: dict[str, Any] = {"quantization_config": _four_bits()} if settings.load_in_4bit else {}
    if settings.model is not None:
        processor = load_processor(settings.model, None)
        folder = resolve_model(settings.model).folder
        check_weights(folder)
        model = CTInstructForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, **loading
        )
    else:
        model, processor = _from_parts(settings, loading)
    set_batch_norm(model, settings.batch_norm)
    for name in settings.freeze:
        set_batch_norm(model.get_submodule(PARTS[name]).requires_grad_(False), "frozen")
    if "language_model" in settings.freeze:
        model.lm_head.requires_grad_(False)  # its own weight, where it is not tied to the embeddings
    return (model if settings.lora is None else _with_adapters(model, processor, settings)), processor


def _from_parts(settings: InstructSettings, loading: dict[str, Any]) -> tuple[Any, CTInstructProcessor]:
    assert settings.vision is not None
    language_model, tokenizer = load_language_model(settings.language_model, **loading)
    if getattr(tokenizer, "chat_template", None) is not None:
        tokenizer.chat_template = None  # the processor's own writes images
    from ..modeling.configuration_ctinstruct import CTInstructConfig

    own = {} if settings.only_these_lists else CTInstructConfig.preset("tiny").disease_lists
    lists = dict(sorted({**own, **settings.disease_lists}.items()))
    try:
        model = CTInstructForConditionalGeneration.from_parts(
            settings.vision, language_model, tokenizer, disease_lists=lists, **settings.config
        )
        image_processor = CTInstructImageProcessor.from_pretrained(settings.vision)
    except CTInstructError:
        raise
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise CTInstructError(f"The parts of the recipe do not fit: {str(error).strip().splitlines()[0]}") from error
    processor = CTInstructProcessor(image_processor, tokenizer, disease_lists=lists)
    ends = tokenizer.convert_tokens_to_ids("<|im_end|>")
    known = ends is not None and ends != tokenizer.unk_token_id
    model.generation_config.eos_token_id = ends if known else tokenizer.eos_token_id
    model.generation_config.pad_token_id = (
        tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    )
    return model, processor


def _with_adapters(model: Any, processor: CTInstructProcessor, settings: InstructSettings) -> Any:
    """LoRA on the language model. Bridger and heads start fresh and are trained whole, and so are the rows of the new
    tokens in the embeddings: adapters do not reach them, and what is not trained stays noise."""
    from peft import LoraConfig, get_peft_model

    new = [processor.tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS.values()]
    whole = [place for name, place in PARTS.items() if name not in ("language_model", *settings.freeze)]
    targets = settings.lora.get("target_modules", ["q_proj", "v_proj"])  # type: ignore[union-attr]
    if not isinstance(targets, str):
        targets = rf"model\.language_model\..*\.({'|'.join(targets)})"
    try:
        config = LoraConfig(**{
            "r": 8, "lora_alpha": 32, "lora_dropout": 0.1, **settings.lora,  # type: ignore[dict-item]
            "target_modules": targets,
            "modules_to_save": whole,
            "trainable_token_indices": {"embed_tokens": new},
        })  # fmt: skip
        return get_peft_model(model, config)
    except (TypeError, ValueError) as error:
        raise CTInstructError(f"lora does not fit: {str(error).strip().splitlines()[0]}") from error


def placeholder(entries: Sequence[MixtureEntry]) -> Any:
    """A `datasets.Dataset` of one row: TRL looks at it, batches come from the mixture."""
    from datasets import Dataset

    row = dict(next(iter(entries[0].rows)))
    return Dataset.from_list([{"images": [image["path"] for image in row["images"]], "id": row["id"]}])


class _Instructs(MixtureLoop):
    """What both trainers of stage two share."""

    held_out: list[list[Item]]

    def loss_of(self: Any, outputs: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """The loss whose gradients, averaged over the processes, are those of their batches in one: each part of it is a
        mean over its items (words, masks, known labels), of which processes have unequal numbers."""
        if self.args.world_size == 1:
            return outputs.loss
        words = (inputs["labels"][:, 1:] != -100).sum()
        masks = words.new_tensor(len(inputs.get("mask_labels") or ()))
        labels = inputs.get("disease_labels")
        known = words.new_zeros(()) if labels is None else (labels >= 0).sum().to(words)
        own = torch.stack([words, masks, known]).to(outputs.loss)
        shares = own / self.accelerator.reduce(own.clone(), reduction="mean").clamp(min=1e-6)
        parts = (outputs.lm_loss, outputs.segmentation_loss, outputs.disease_loss)
        scaled = [None if part is None else share * part for share, part in zip(shares, parts, strict=True)]
        return base_of(self.accelerator.unwrap_model(self.model)).total_loss(*scaled, outputs.query_loss)

    @torch.no_grad()
    def evaluate(self: Any, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:  # fmt: skip
        """Each loss on the held-out batches, shared out over the processes."""
        model = self.model
        model.eval()
        values: list[tuple[str, float]] = []
        for items in self.held_out[self.args.process_index :: self.args.world_size]:
            batch = send_to_device(self.data_collator(items), self.args.device)
            with self.compute_loss_context_manager():
                outputs = model(**batch)
            values += [(name, float(outputs[name])) for name in ("loss", *LOSSES) if outputs.get(name) is not None]
        model.train()
        by_loss: dict[str, list[float]] = defaultdict(list)
        for name, value in gather_object(values) if self.args.world_size > 1 else values:
            by_loss[f"{metric_key_prefix}_{name}"].append(value)
        metrics = {name: sum(each) / len(each) for name, each in by_loss.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class InstructionTrainer(_Instructs, MixtureTrainer):
    """Stage two with Transformers' Trainer."""


def sft_trainer(
    model: Any, args: Any, mixture: Any, collator: InstructionCollator, entries: Sequence[MixtureEntry], **kwargs: Any
) -> Any:
    """Stage two with TRL's SFTTrainer: its arguments, logs and callbacks; the loss is the model's own, since TRL's would
    leave masks and diagnoses out."""
    from trl import SFTTrainer

    class InstructionSFTTrainer(_Instructs, SFTTrainer):
        pass

    prepare_arguments(args)
    args.max_length = None  # nothing is cut: images would be torn apart
    args.dataset_kwargs = {"skip_prepare_dataset": True}
    trainer = InstructionSFTTrainer(
        model=model,
        args=args,
        train_dataset=placeholder(entries),
        data_collator=collator,
        processing_class=collator.processor,
        **kwargs,
    )
    trainer.begin(mixture)
    return trainer


def instruct(
    recipe: dict[str, Any],
    resume: str | None = None,
    restart: bool = False,
    tell: Callable[[str], None] = lambda step: None,
) -> dict[str, float]:
    """Tune on instructions; a run that was interrupted goes on from its last whole checkpoint.

    Args:
        recipe: from `read_recipe`.
        resume: a checkpoint to go on from, instead of the last whole one in `output_dir`.
        restart: begin anew; what is in `output_dir` of an earlier run is removed.
        tell: called with a sentence on progress.

    Returns:
        The losses on the held-out batches; empty without an evaluation. The model, adapters merged, and its processor are
        in `output_dir/model`, which every command takes as `--model`.

    Raises:
        CTInstructError: for a bad recipe, before anything is trained.
    """
    kind = recipe.get("trainer", "trl")
    arguments = None
    if kind == "trl":
        from trl import SFTConfig

        arguments = SFTConfig
    gpu = torch.cuda.is_available()  # TRL's own defaults are a GPU's
    settings, args = parse_recipe(
        recipe, InstructSettings, arguments, report_to="tensorboard", logging_steps=10, save_total_limit=2,
        bf16=gpu and torch.cuda.is_bf16_supported(), gradient_checkpointing=False,
    )  # fmt: skip
    folder = Path(args.output_dir)
    start = place_to_start(folder, recipe, resume, restart, args.should_save)
    from transformers import set_seed

    if settings.read_first and start is None:  # what is gone on from can read
        with args.main_process_first(desc="learning to read"):
            learn_to_read(folder / "language_model", FirstReading.of(settings.read_first), args, tell)
        settings = replace(settings, language_model=str(folder / "language_model"), read_first={})
    set_seed(args.seed)
    with built_whole(args):
        model, processor = build_model(settings)
    known = structure_names(base_of(model), processor)
    goes_on = settings.model is not None or base_of(model).config.structures is not None
    store = PatchStore(processor.image_processor, settings.cache)
    with args.main_process_first(desc="data"):
        entries = [load_part(part, "instructions") for part in settings.mixture]
        held_out = load_part(settings.evaluation_part, "instructions") if settings.evaluation else None
    for entry in entries if held_out is None else [*entries, held_out]:
        check_rows(entry)
    if settings.group_by_length:
        for entry in entries:
            if hasattr(entry.rows, "__len__"):
                entry.lengths = [sum(len(text_of(turn)) for turn in row["messages"]) for row in entry.rows]
    tokens = None
    if settings.keep_tokens:
        tower = base_of(model).model.vision_tower
        tokens = TokenStore(store, tower.to(args.device))
        with args.main_process_first(desc="tokens"):
            read = [*entries, *([held_out] if held_out else [])]
            tokens.fill(_images_to_read(read, with_masks=settings.align_prompts), tell)
    embed = None
    starts = settings.start_bridger and start is None
    if settings.align_prompts or starts:
        stage_one, embed = load_stage_one(str(settings.vision))
        if starts:
            assert tokens is not None
            start_bridger(base_of(model).model.bridger, stage_one, embed, tokens, entries)
    collator = InstructionCollator(
        store, processor, settings.max_tokens, settings.padding_side, data_seed(args), settings.max_skipped, tokens,
        embed if settings.align_prompts else None, base_of(model).config.names_masks,
    )  # fmt: skip
    mixture = make_mixture(entries, args, start)
    looked_at = None if held_out is None else placeholder(entries)  # `evaluate` reads the held-out batches
    if settings.trainer == "trl":
        trainer: Any = sft_trainer(model, args, mixture, collator, entries, eval_dataset=looked_at)
    else:
        trainer = InstructionTrainer(model, args, mixture, collator, eval_dataset=looked_at)
    if settings.lora is not None and trainer.is_fsdp_enabled:
        raise CTInstructError(
            "lora does not go with FSDP, which shards the embeddings of an adapted model twice: use DDP."
        )
    trainer.learning_rates = check_rates(settings.learning_rates, base_of(model))
    trainer.positive_voxels = settings.positive_voxels
    trainer.held_out = _held_out_batches(held_out, args, int((settings.evaluation or {}).get("batches", 8)))
    tell("training" if start is None else f"going on from {Path(start).name}")
    trainer.train(resume_from_checkpoint=start)
    metrics = trainer.evaluate() if trainer.held_out else {}
    if settings.lora is not None:
        trainer.make_anew = lambda: build_model(settings)[0]
    trained = whole_model(trainer)
    if trainer.is_world_process_zero():
        if settings.load_in_4bit:
            trained = _in_full(trained)
        if hasattr(trained, "merge_and_unload"):  # adapters go into the weights
            trained = trained.merge_and_unload()
        trained.config.structures = taught_structures(entries, known if goes_on else None)
        save_trained(folder / "model", trained, processor)
        write_whole(folder / "scores.json", json.dumps(metrics, indent=1))
    trainer.accelerator.wait_for_everyone()
    return metrics


def _four_bits() -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)


def _in_full(model: Any) -> Any:
    """Weights of 4 bits as the numbers that they stand for: adapters can go into them, and the model loads without
    bitsandbytes."""
    from transformers.integrations.bitsandbytes import dequantize_and_replace

    model = dequantize_and_replace(model, _four_bits(), torch.float32)
    config = base_of(model).config
    for one in (config, config.text_config):
        if hasattr(one, "quantization_config"):
            del one.quantization_config
    return model


def taught_structures(entries: Sequence[MixtureEntry], before: Names | None = None) -> list[str] | None:
    """The structures that a model was taught to mark, by name; None where that is not known: of streamed parts, and of a model
    without a list that training went on from (`before`)."""
    if (before is not None and not before.listed) or not all(hasattr(entry.rows, "__len__") for entry in entries):
        return None
    names = set(before.known) if before is not None else set()
    for rows in (entry.rows for entry in entries if entry.weight > 0):
        light = rows.select_columns(["masks"]) if hasattr(rows, "select_columns") else rows
        names |= {mask["name"] for row in light for mask in row["masks"]}
    return sorted(names)


def check_rows(entry: MixtureEntry) -> None:
    """Raises CTInstructError where a part has no rows, or its first one shows no image."""
    row = next(iter(entry.rows), None)
    if row is None:
        raise CTInstructError(f"'{entry.name}' has no rows of the tasks {', '.join(entry.tasks) or 'asked for'}.")
    if not row["images"]:
        raise CTInstructError(f"'{entry.name}': sample '{row['id']}' has no image; every instruction is about a scan.")


def _images_to_read(entries: Sequence[MixtureEntry], with_masks: bool) -> list[ImageRef]:
    """The images whose tokens are wanted: of rows without masks, or of all."""
    rows = (row for entry in entries for row in entry.rows if with_masks or not row["masks"])
    return [ImageRef(**image) for row in rows for image in row["images"]]


def _held_out_batches(entry: MixtureEntry | None, args: Any, count: int) -> list[list[Item]]:
    if entry is None:
        return []
    size = args.per_device_eval_batch_size
    mixture = Mixture([entry])
    # of one kind each, since samples with masks bring their voxels along
    places = MixtureBatches(mixture, size, count, seed=0)
    return [[mixture[place] for place in batch] for batch in places]
