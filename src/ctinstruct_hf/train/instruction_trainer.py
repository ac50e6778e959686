"""Both trainers of stage two: TRL's SFTTrainer and Transformers' Trainer over a mixture of instructions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather_object, send_to_device

from ..data.mixture import MixtureEntry
from .collator import InstructionCollator
from .held_out import HeldOut, measure, metrics_of
from .trainer import MixtureLoop, MixtureTrainer, base_of, prepare_arguments


def placeholder(entries: Sequence[MixtureEntry]) -> Any:
    """A `datasets.Dataset` of one row: TRL looks at it, batches come from the mixture."""
    from datasets import Dataset

    row = dict(next(iter(entries[0].rows)))
    return Dataset.from_list([{"images": [image["path"] for image in row["images"]], "id": row["id"]}])


class _Instructs(MixtureLoop):
    """What both trainers of stage two share."""

    held_out: HeldOut
    held_out_collator: InstructionCollator

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
        """Each loss, Dice, AUC and F1 on the held-out batches, shared out over the processes; all take all of them where weights are
        sharded, since batches of other tasks would ask for other weights."""
        model = self.model
        model.eval()
        found: list[Any] = []
        batches = [(part, items) for part, each in self.held_out for items in each]
        shared_out = self.args.world_size > 1 and not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        if shared_out:
            batches = batches[self.args.process_index :: self.args.world_size]
        for part, items in batches:
            batch = send_to_device(self.held_out_collator(items), self.args.device)
            with self.compute_loss_context_manager(), self.accelerator.autocast():
                outputs = model(**batch)
            found += measure(part, outputs, batch)
        model.train()
        metrics = metrics_of(gather_object(found) if shared_out else found, metric_key_prefix)
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

    class InstructionSFTTrainer(_Instructs, SFTTrainer):  # type: ignore[misc]  # TRL types its flag as None alone
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
