"""Teach words, masks and probabilities by Transformers' own Trainer, whose loss is the model's: three lines more than for words.

python examples/trainer.py ROWS OUTPUT [MODEL]

ROWS: JSONL of instructions, as `ctinstruct data import` takes it (docs/data.md): conversations, a mask for each <SEG>, a label for
each <disease_confidence>. MODEL: a folder or a name on the Hub, the bundled model by default.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

from ctinstruct_hf.data.samples import read_jsonl, to_row
from ctinstruct_hf.data.store import PatchStore
from ctinstruct_hf.inference.models import resolve_model
from ctinstruct_hf.train.batch_norm import set_batch_norm
from ctinstruct_hf.train.collator import InstructionCollator


def train(rows: str, output: str, model: str = "bundled", **settings: Any) -> Trainer:
    """The trainer after training; model and processor are in `output`. `settings` are those of TrainingArguments."""
    folder = resolve_model(model).folder
    network = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    set_batch_norm(network, "frozen").model.vision_tower.requires_grad_(False)  # a batch is a scan or two
    processor = AutoProcessor.from_pretrained(folder)
    store = PatchStore(processor.image_processor, Path(output) / "cache")
    collator = InstructionCollator(store, processor, names_masks=network.config.names_masks)
    gpu = torch.cuda.is_available()
    arguments = TrainingArguments(
        output,
        **{
            "remove_unused_columns": False,  # the collator reads all of a row
            "per_device_train_batch_size": 1,
            "bf16": gpu,
            "report_to": "none",
            **settings,
        },
    )
    data = Dataset.from_list([to_row(sample) for sample in read_jsonl(Path(rows))])
    trainer = Trainer(network, arguments, data_collator=collator, train_dataset=data)
    trainer.train()
    trainer.save_model(output)
    processor.save_pretrained(output)
    return trainer


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        raise SystemExit(__doc__)
    train(*sys.argv[1:])
