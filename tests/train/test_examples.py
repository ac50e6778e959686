"""The scripts of `examples/` run over plain trainers and teach what they say."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from repository import ROOT
from safetensors.torch import load_file

from ctinstruct_hf import Study
from ctinstruct_hf.data.prepare import open_rows
from ctinstruct_hf.inference.folders import BUNDLED_MODEL
from ctinstruct_hf.train.policy import findings_f1

QUICK: dict[str, Any] = {"use_cpu": True, "max_steps": 3, "learning_rate": 1e-3, "logging_steps": 1, "disable_tqdm": True, "seed": 0,
                         "save_strategy": "no"}  # fmt: skip


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def moved_parts(folder: Path) -> set[str]:
    """The parts of the bundled model whose weights training has changed."""
    before, after = (load_file(one / "model.safetensors") for one in (BUNDLED_MODEL, folder))
    names = [
        name for name, value in after.items() if not torch.allclose(value.float(), before[name].float(), atol=1e-6)
    ]
    return {
        name.removeprefix("model.").split(".")[0] for name in names if not name.endswith(("mean", "var", "tracked"))
    }


def instruction(scan: Path, asked: str, answer: str, **more: Any) -> dict[str, Any]:
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": asked}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
    base = {
        "id": asked,
        "images": [{"path": str(scan)}],
        "messages": messages,
        "task": "question",
        "split": "train",
        "source": "mine",
    }
    return {**base, **more}


def test_sft_teaches_words_by_messages_and_images(small_scan: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Is there a nodule?"}, {"role": "assistant", "content": "No nodule is seen."}]
    rows = written(tmp_path / "rows.jsonl", [{"images": [str(small_scan)], "messages": turns}] * 2)
    trainer = example("sft").train(rows, str(tmp_path / "out"), assistant_only_loss=False, **QUICK)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert moved_parts(tmp_path / "out") == {"bridger", "language_model"}
    assert (
        Study.open(str(small_scan), model=str(tmp_path / "out")).ask("Is there a nodule?", max_new_tokens=4) is not None
    )


def test_trainer_teaches_masks_and_probabilities_too(small_scan: Path, tmp_path: Path) -> None:
    import nibabel as nib
    import numpy as np

    image: Any = nib.load(small_scan)
    labels = (np.asarray(image.dataobj) > 0).astype(np.uint8)
    nib.save(nib.Nifti1Image(labels, image.affine), tmp_path / "labels.nii.gz")
    masks = [{"name": "liver", "path": str(tmp_path / "labels.nii.gz"), "values": [1]}]
    disease = {"name": "kidney stone", "value": 1}
    rows = [
        instruction(small_scan, "Where is the liver?", "Sure, it is <SEG>.", masks=masks, task="segmentation"),
        instruction(
            small_scan,
            "Give the presence of kidney stone.",
            "kidney stone <disease_confidence>",
            labels=[disease],
            task="diagnosis",
        ),
    ]
    trainer = example("trainer").train(written(tmp_path / "rows.jsonl", rows), str(tmp_path / "out"), **QUICK)
    assert trainer.state.global_step == 3
    assert moved_parts(tmp_path / "out") == {
        "bridger", "language_model", "segmentation_query", "segmentation_decoder", "disease_head"
    }  # fmt: skip


def test_dpo_prefers_the_better_answer(small_scan: Path, tmp_path: Path) -> None:
    row = instruction(small_scan, "Report.", "No effusion.", rejected="A large effusion.", task="report")
    trainer = example("dpo").train(written(tmp_path / "rows.jsonl", [row] * 2), str(tmp_path / "out"), **QUICK)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(0.6931, abs=0.01)
    assert losses[-1] < losses[0]


def test_grpo_writes_reports_and_rewards_what_they_find(small_scan: Path, tmp_path: Path) -> None:
    rows = written(tmp_path / "rows.jsonl", [{"images": [str(small_scan)], "report": "Pleural effusion is seen."}] * 2)
    settings = {"num_generations": 2, "per_device_train_batch_size": 4, "max_completion_length": 8, "max_steps": 2}
    trainer = example("grpo").train(rows, str(tmp_path / "out"), **{**QUICK, **settings})
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert len(rewards) == 2
    assert all(0 <= reward <= 1 for reward in rewards)
    assert len(trainer.processing_class.scans.features) == 1  # encoded once
    assert Study.open(str(small_scan), model=str(tmp_path / "out")).report(max_new_tokens=4) is not None


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_reward_of_reports_rises_on_a_phantom(tmp_path: Path) -> None:
    """Reports of the bundled model are sampled loosely; what they find of the scan's findings becomes more."""
    (row,) = [
        row for row in open_rows("phantoms:trunk:900100-900101", "instructions", "train") if row["task"] == "report"
    ]
    report = row["messages"][-1]["content"][0]["text"]
    rows = written(tmp_path / "rows.jsonl", [{"images": [row["images"][0]["path"]], "report": report}])
    settings = {"max_steps": 20, "max_completion_length": 160, "temperature": 1.3}
    trainer = example("grpo").train(rows, str(tmp_path / "out"), **{**QUICK, **settings})
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.1  # 0.62 and 0.98 where it was written


def test_the_reward_is_f1_of_the_findings_that_both_reports_name() -> None:
    truth = "There is a pleural effusion. Emphysema is seen. No lung nodule."
    answers = ["Pleural effusion and emphysema are present.", "There is a pleural effusion.", "Cardiomegaly is seen.", "A pleural effusion and cardiomegaly."]  # fmt: skip
    assert findings_f1(answers, [truth] * 4) == pytest.approx([1, 2 / 3, 0, 0.5])
    spoken = [[{"role": "assistant", "content": "The lungs are clear."}]]
    assert findings_f1(spoken, ["No abnormality was found."]) == [1.0]
