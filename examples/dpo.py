"""Teach which of two answers is better by TRL's DPOTrainer.

python examples/dpo.py ROWS OUTPUT [MODEL]

ROWS: JSONL of instructions, as `ctinstruct data import` takes it (docs/data.md), with the worse answer beside each row's last one:
"rejected": "A large effusion." MODEL: a folder or a name on the Hub, the bundled model by default.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import DPOConfig, DPOTrainer

from ctinstruct_hf.data.samples import from_row, to_row
from ctinstruct_hf.data.store import PatchStore
from ctinstruct_hf.inference.models import resolve_model
from ctinstruct_hf.train.batch_norm import set_batch_norm
from ctinstruct_hf.train.collator import PreferenceCollator


def read_pairs(path: str) -> list[dict[str, Any]]:
    """Rows of instructions, each with its rejected answer."""
    rows = [json.loads(line) for line in Path(path).read_text().splitlines() if line.strip()]
    rejected = [row.pop("rejected") for row in rows]
    return [
        {**to_row(from_row(row, "instructions")), "rejected": worse} for row, worse in zip(rows, rejected, strict=True)
    ]


def train(rows: str, output: str, model: str = "bundled", **settings: Any) -> DPOTrainer:
    """The trainer after training; its model is in `output`. `settings` are DPOConfig's."""
    folder = resolve_model(model).folder
    policy, reference = (AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    set_batch_norm(policy, "frozen").model.vision_tower.requires_grad_(False)  # both read a scan alike
    processor = AutoProcessor.from_pretrained(folder)
    store = PatchStore(processor.image_processor, Path(output) / "cache")
    gpu = torch.cuda.is_available()
    arguments = DPOConfig(
        output,
        **{
            "remove_unused_columns": False,
            "max_length": None,
            "per_device_train_batch_size": 1,
            "bf16": gpu,
            "gradient_checkpointing": gpu,
            "report_to": "none",
            **settings,
        },
    )
    trainer = DPOTrainer(
        policy,
        reference.eval(),
        arguments,
        train_dataset=Dataset.from_list(read_pairs(rows)),
        data_collator=PreferenceCollator(store, processor),
        processing_class=processor,
    )
    trainer.train()
    trainer.save_model(output)
    return trainer


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        raise SystemExit(__doc__)
    train(*sys.argv[1:])
