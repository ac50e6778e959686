"""Tuning a model that is there: the bundled one by `model: bundled`, a few scans, adapters alone, what is said and drawn on the way."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from ctinstruct_hf import CTInstructError, CTInstructForConditionalGeneration, Study
from ctinstruct_hf.cli import app
from ctinstruct_hf.cli.train import show_end
from ctinstruct_hf.data.mixture import Mixture, MixtureBatches, MixtureEntry
from ctinstruct_hf.data.prepare import open_rows
from ctinstruct_hf.data.prepared import write_rows
from ctinstruct_hf.hub.publish import make_plan
from ctinstruct_hf.inference.folders import BUNDLED_MODEL
from ctinstruct_hf.inference.models import load_model, load_processor, resolve_model
from ctinstruct_hf.train.instruct import InstructSettings, build_model, instruct
from ctinstruct_hf.train.outlook import Outlook, Pace, duration
from ctinstruct_hf.train.recipe import INSTRUCT, parse_recipe, read_recipe

QUICK: dict[str, Any] = {
    "per_device_train_batch_size": 1,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "seed": 1,
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
}
MINE = {"name": "mine", "phantoms": {"kind": "slice", "seeds": [0, 3]}, "tasks": ["segmentation"], "turns": 3}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def recipe(tmp_path: Path, cache: str) -> dict[str, Any]:
    return {
        "output_dir": str(tmp_path / "run"),
        "cache": cache,
        "model": "bundled",
        "mixture": [MINE],
        "max_steps": 4,
        "save_steps": 1,
        **QUICK,
    }


def test_a_few_scans_are_taught_to_the_mask_decoder_alone(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Held-out Dice by part, the best checkpoint, an early end, the outlook, curves; words stay as they were."""
    few = read_recipe("few_scans", [], INSTRUCT)
    held_out = {
        "name": "rehearsal",
        "phantoms": {"kind": "slice", "seeds": [50, 52]},
        "tasks": ["segmentation"],
        "batches": 2,
    }
    recipe |= {name: few[name] for name in ("model", "freeze", "augmentation", "small_model", "metric_for_best_model")}
    recipe |= {
        "evaluation": [{"name": "mine", "batches": 2}, held_out],
        "early_stopping_patience": 1,
        "greater_is_better": True,
    }
    recipe |= {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "learning_rate": 0.05,
        "max_steps": 12,
        "save_total_limit": None,
    }
    told: list[str] = []
    scores = instruct(recipe, tell=told.append)
    run = tmp_path / "run"
    assert scores["eval_dice"] == pytest.approx((scores["eval_mine_dice"] + scores["eval_rehearsal_dice"]) / 2)
    steps = [int(path.name.rpartition("-")[2]) for path in run.glob("checkpoint-*")]
    assert max(steps) < 12  # at this rate masks get worse: training ends, and the best step counts
    (outlook,) = [line for line in told if line.startswith("trained: ")]
    assert outlook.startswith(
        "trained: 4.0 M of 7.4 M parameters (53.7 %): segmentation_decoder 4.0 M, segmentation_query"
    )
    assert any(line.startswith("12 steps of 1 sample (1 at once), on cpu, ") for line in told)
    assert (run / "curves.png").read_bytes()[:4] == b"\x89PNG"
    before, after = (load_file(folder / "model.safetensors") for folder in (BUNDLED_MODEL, run / "model"))
    moved = {
        name.split(".")[0] for name, value in after.items() if not torch.equal(value.float(), before[name].float())
    }
    assert moved == {"segmentation_decoder", "segmentation_query"}


def test_the_outlook_says_the_time_after_three_steps() -> None:
    told: list[str] = []
    outlook = Outlook(told.append)
    args = type(
        "Args",
        (),
        {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4,
            "world_size": 1,
            "device": torch.device("cpu"),
        },
    )
    state = type("State", (), {"max_steps": 100, "global_step": 0, "is_world_process_zero": True})
    model = torch.nn.ModuleDict(
        {"head": torch.nn.Linear(10, 100), "tower": torch.nn.Linear(10, 100).requires_grad_(False)}
    )
    outlook.on_train_begin(args, state, None, model=model)
    for step in range(1, 6):
        state.global_step = step
        outlook.on_step_end(args, state, None)
    assert told[0] == "trained: 1.1 k of 2.2 k parameters (50 %): head 1.1 k"
    assert told[1].startswith("100 steps of 8 samples (2 at once), on cpu, ")
    assert len(told) == 3
    assert " s a step, 0 s to the end, " in told[2]
    assert [duration(seconds) for seconds in (40, 700, 4000)] == ["40 s", "12 min", "1 h 7 min"]


def test_the_pace_counts_samples_and_the_share_of_waiting() -> None:
    pace = Pace()
    time.sleep(0.02)
    pace.note(0.01, [{"labels": torch.zeros(3, 5)}, {"patch_grid": torch.ones(2, 4)}])
    counted = pace.since_last(processes=2)
    assert counted["samples_per_second"] == pytest.approx(10 * counted["waiting_for_data"] / 0.01, rel=0.01)
    assert 0 < counted["waiting_for_data"] <= 0.5
    assert pace.since_last(processes=2)["samples_per_second"] == 0


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_main_process_prints_results(
    rank: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", str(rank))
    show_end({"eval_dice": 0.5}, {"output_dir": "runs/mine"})
    assert capsys.readouterr().out == ("" if rank else "eval_dice 0.5000\nThe model is in runs/mine/model.\n")


def test_a_set_without_held_out_rows_is_scored_on_its_own(recipe: dict[str, Any], tmp_path: Path) -> None:
    rows = list(open_rows("phantoms:slice:0-1", "instructions", "train"))
    for name, splits in (("one", ["train"]), ("more", ["train", "validation"])):
        split_rows = [{**row, "split": split} for row in rows for split in splits]
        write_rows(tmp_path / name, "instructions", split_rows)
    recipe["mixture"] = [
        {"name": name, "dataset": str(tmp_path / name), "tasks": ["segmentation"], "weight": 0.5}
        for name in ("one", "more")
    ]
    recipe["evaluation"] = [{"name": "one"}, {"name": "more", "tasks": ["report"], "batches": 2}]
    settings, _ = parse_recipe({**recipe, "trainer": "transformers"}, InstructSettings)
    one, more = settings.evaluation_parts
    assert one == {"name": "one", "dataset": str(tmp_path / "one"), "tasks": ["segmentation"], "split": "train"}
    assert more == {"name": "more", "dataset": str(tmp_path / "more"), "tasks": ["report"], "split": "validation"}
    with pytest.raises(CTInstructError, match="Part 'nobody' of the mixture needs either dataset"):
        parse_recipe({**recipe, "evaluation": {"name": "nobody"}, "trainer": "transformers"}, InstructSettings)


def test_rows_with_masks_come_in_batches_of_their_own() -> None:
    groups = [int(number) for number in torch.randint(0, 2, (61,), generator=torch.Generator().manual_seed(0))]
    entry = MixtureEntry("x", [{"id": str(index)} for index in range(61)], (), groups=groups)
    batches = [[row for _, row, _ in batch] for batch in MixtureBatches(Mixture([entry]), 4, 15)]
    alike = [len({groups[row] for row in batch}) == 1 for batch in batches]
    assert alike[:14] == [True] * 14  # what is left over of both comes last
    assert [groups[batch[0]] for batch in batches] != sorted(groups[batch[0]] for batch in batches)


def test_a_preview_marks_what_counts_and_draws_the_masks(recipe: dict[str, Any], tmp_path: Path) -> None:
    import yaml

    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    result = CliRunner().invoke(app, ["instruct", str(tmp_path / "mine.yaml"), "--preview", "2"])
    assert result.exit_code == 0, result.output
    assert result.output.count("<|image_pad|> × 1") == 2
    assert "⟦Sure, " in result.output
    assert "<SEG>.<|im_end|>" in result.output
    assert "user" not in result.output.split("⟦")[1].split("⟧")[0]
    pictures = sorted((tmp_path / "run" / "preview").iterdir())
    assert [path.name for path in pictures] == ["1.png", "2.png"]
    from PIL import Image

    pixels = torch.tensor(list(Image.open(pictures[0]).convert("RGB").getdata()))
    assert (pixels[:, 1] > pixels[:, 0] + 50).any()  # green
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with a head of its own."""
    folder = tmp_path_factory.mktemp("untied") / "model"
    model = CTInstructForConditionalGeneration.from_pretrained(BUNDLED_MODEL, dtype=torch.float32)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    config = model.config
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    alone = CTInstructForConditionalGeneration(config)
    alone.load_state_dict(weights)
    alone.save_pretrained(folder)
    load_processor(None).save_pretrained(folder)
    return folder


def test_adapters_alone_load_with_their_model_and_new_rows_move_in_embeddings_and_head(
    recipe: dict[str, Any], untied: Path, small_scan: Path, tmp_path: Path
) -> None:
    recipe |= {"model": str(untied), "lora": {"r": 2}, "save": "adapter", "max_steps": 2, "learning_rate": 0.01}
    recipe |= {"freeze": ["vision_tower", "segmentation_decoder"]}
    instruct(recipe)
    folder = tmp_path / "run" / "model"
    assert not (folder / "model.safetensors").exists()
    sizes = [sum(path.stat().st_size for path in one.iterdir()) for one in (folder, untied)]
    assert sizes[0] < 0.1 * sizes[1]
    model, _ = load_model(str(folder), "cpu")
    plain = CTInstructForConditionalGeneration.from_pretrained(untied, dtype=torch.float32)
    assert not any("lora" in name for name, _ in model.named_parameters())
    seg, start = (load_processor(None).tokenizer.convert_tokens_to_ids(token) for token in ("<SEG>", "<|im_start|>"))
    for matrix in ("lm_head.weight", "model.language_model.embed_tokens.weight"):
        changed = (model.get_parameter(matrix) - plain.get_parameter(matrix)).abs().sum(1)
        assert changed[seg] > 0, matrix
        assert changed[start] == 0, matrix
    layer = "model.language_model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(model.get_parameter(layer), plain.get_parameter(layer))
    assert {"aorta", "liver"} <= set(model.config.structures)
    study = Study.open(str(small_scan), model=str(folder))
    assert study.segment("liver").shape == study.volume.shape
    goes = dict(make_plan(untied, "").files)
    assert "model.safetensors" in goes
    with pytest.raises(CTInstructError, match="base_model_name_or_path is a path of this machine"):
        make_plan(folder, "card")


def test_adapters_of_the_bundled_model_name_it_and_can_be_published(
    recipe: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe |= {
        "disable_tqdm": False,
        "lora": {"r": 2},
        "save": "adapter",
        "max_steps": 1,
        "freeze": ["vision_tower", "segmentation_decoder"],
    }
    instruct(recipe)
    assert re.search(r"samples_per_second=[\d.]+, waiting_for_data=0?\.?\d+", capfd.readouterr().err)  # in the bar
    folder = tmp_path / "run" / "model"
    files = dict(make_plan(folder, "card").files)
    assert {"adapter_config.json", "adapter_model.safetensors", "config.json", "processor_config.json"} <= set(files)
    assert '"bundled"' in (folder / "adapter_config.json").read_text()
    again, _ = build_model(
        parse_recipe({**recipe, "model": str(folder), "save": "merged", "trainer": "transformers"}, InstructSettings)[0]
    )
    assert any("lora" in name for name, _ in again.named_parameters())  # a second pass has adapters of its own


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"save": "half"}, "save is 'half': use merged or adapter"),
        ({"save": "adapter"}, "save: adapter needs lora, and model"),
        ({"augmentation": {"mirror": 1}}, "augmentation has unknown mirror"),
        (
            {"augmentation": True, "freeze": ["vision_tower"], "small_model": {"keep_tokens": True}},
            "augmentation changes scans",
        ),
        ({"early_stopping_patience": 2, "eval_strategy": "steps"}, "early_stopping_patience needs an evaluation"),
        (
            {"early_stopping_patience": 2, "evaluation": {"name": "mine"}},
            "The recipe does not fit: --load_best_model_at_end requires",
        ),
        ({"model": "bundeled"}, "model: bundeled is no folder with a model"),
    ],
)
def test_what_does_not_go_together_is_refused(recipe: dict[str, Any], change: dict[str, Any], words: str) -> None:
    with pytest.raises(CTInstructError, match=words):
        instruct({**recipe, **change})


def test_the_bundled_model_has_a_name_wherever_a_model_is_named() -> None:
    assert resolve_model("bundled") == resolve_model(None)


@pytest.mark.parametrize("lora", [None, {"r": 2}])
def test_what_is_trained_is_float32_whatever_the_files_hold(
    recipe: dict[str, Any], lora: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bundled model's file holds bfloat16; dtypes are looked at once the trainer has prepared all."""
    seen: set[torch.dtype] = set()
    begin = Outlook.on_train_begin

    def watched(self: Outlook, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        begin(self, args, state, control, **kwargs)
        seen.update(weight.dtype for group in kwargs["optimizer"].param_groups for weight in group["params"])
        seen.update(weight.dtype for weight in kwargs["model"].parameters() if weight.requires_grad)

    monkeypatch.setattr(Outlook, "on_train_begin", watched)
    assert {value.dtype for value in load_file(BUNDLED_MODEL / "model.safetensors").values()} & {torch.bfloat16}
    instruct({**recipe, "lora": lora, "max_steps": 1, "bf16": True})
    assert seen == {torch.float32}


@pytest.mark.parametrize("reentrant", [False, True])
def test_running_statistics_count_a_batch_once_with_gradient_checkpointing(tiny_config: Any, reentrant: bool) -> None:
    torch.manual_seed(0)
    model = CTInstructForConditionalGeneration(tiny_config()).train()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    statistics = []
    pixels = torch.randn(4, 64, 64)
    for checkpointing in (False, True):
        model.load_state_dict(weights)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        features = model.get_image_features(pixels.clone().requires_grad_(), [(1, 1, 1, 4)], return_dict=True)
        queries = torch.randn(
            1, model.config.segmentation_config.hidden_size, generator=torch.Generator().manual_seed(1)
        )
        masks = model.segmentation_decoder(queries, features.feature_maps, features.last_hidden_state, (1, 1, 1, 4))
        masks.sum().backward()
        names = ("running_mean", "running_var", "num_batches_tracked")
        statistics.append({name: value.clone() for name, value in model.named_buffers() if name.endswith(names)})
    assert {int(value) for name, value in statistics[0].items() if name.endswith("tracked")} == {1}
    for name, value in statistics[0].items():
        assert torch.allclose(value, statistics[1][name], atol=1e-6), name
