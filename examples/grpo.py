"""Teach reports by a reward, the F1 of the findings that they name, by TRL's GRPOTrainer.

python examples/grpo.py ROWS OUTPUT [MODEL]

ROWS: JSONL, a line each: {"images": ["scan.nii.gz"], "report": "There is a nodule in …"}; "prompt" may be another question than for
the report. MODEL: a folder or a name on the Hub, the bundled model by default.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from datasets import load_dataset
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import GRPOConfig, GRPOTrainer

from ctinstruct_hf.inference.models import resolve_model
from ctinstruct_hf.train.batch_norm import set_batch_norm
from ctinstruct_hf.train.policy import findings_f1, number_scans

QUESTION = "Please generate a report."


def as_prompt(row: dict[str, Any]) -> dict[str, Any]:
    """A row with its question as a conversation."""
    return {"prompt": [{"role": "user", "content": row.get("prompt") or QUESTION}]}


def train(rows: str, output: str, model: str = "bundled", **settings: Any) -> GRPOTrainer:
    """The trainer after training; model and processor are in `output`. `settings` are GRPOConfig's."""
    folder = resolve_model(model).folder
    policy = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    set_batch_norm(policy, "frozen")
    processor = AutoProcessor.from_pretrained(folder)
    gpu = torch.cuda.is_available()
    arguments = GRPOConfig(
        output,
        **{
            "num_generations": 8,
            "per_device_train_batch_size": 8,  # the reports of one scan
            "max_completion_length": 512,
            "bf16": gpu,
            "gradient_checkpointing": gpu,
            "report_to": "none",
            **settings,
        },
    )
    trainer = GRPOTrainer(
        policy,
        findings_f1,
        arguments,
        train_dataset=load_dataset("json", data_files=rows, split="train").map(as_prompt),
        processing_class=number_scans(policy, processor),  # a scan is read and encoded once
    )
    trainer.train()
    policy.save_pretrained(output)
    processor.save_pretrained(output)
    return trainer


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        raise SystemExit(__doc__)
    train(*sys.argv[1:])
