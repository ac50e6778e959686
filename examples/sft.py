"""Teach words about scans by TRL's SFTTrainer, as to any vision-language model.

python examples/sft.py ROWS OUTPUT [MODEL]

ROWS: JSONL, a line each: {"images": ["scan.nii.gz"], "messages": [{"role": "user", "content": "Is there a nodule?"},
{"role": "assistant", "content": "No."}]}; an image is any file or folder that `ctinstruct predict` reads. MODEL: a folder or a name
on the Hub, the bundled model by default. Masks and probabilities are taught by examples/trainer.py.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from datasets import load_dataset
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer

from ctinstruct_hf.inference.models import resolve_model
from ctinstruct_hf.train.batch_norm import set_batch_norm


def train(rows: str, output: str, model: str = "bundled", **settings: Any) -> SFTTrainer:
    """The trainer after training; its model is in `output`. `settings` are SFTConfig's."""
    folder = resolve_model(model).folder
    network = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    set_batch_norm(network, "frozen").model.vision_tower.requires_grad_(False)  # a batch is a scan or two
    processor = AutoProcessor.from_pretrained(folder)
    gpu = torch.cuda.is_available()
    arguments = SFTConfig(
        output,
        **{
            "max_length": None,  # a scan's tokens must not be cut
            "per_device_train_batch_size": 1,
            "bf16": gpu,
            "gradient_checkpointing": gpu,
            "report_to": "none",
            **settings,
        },
    )
    data = load_dataset("json", data_files=rows, split="train")
    trainer = SFTTrainer(network, arguments, train_dataset=data, processing_class=processor)
    trainer.train()
    trainer.save_model(output)
    return trainer


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        raise SystemExit(__doc__)
    train(*sys.argv[1:])
