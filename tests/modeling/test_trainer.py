"""A plain Trainer of Transformers over the model: accumulation, evaluation, metrics, and labels that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from ctinstruct_hf import (
    CTInstructConfig,
    CTInstructError,
    CTInstructForConditionalGeneration,
    CTInstructForPretraining,
)


def sample(config: CTInstructConfig, seed: int) -> dict[str, Any]:
    """A slice, a question with its answer, a mask and two diagnoses."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(8, 90, (4,), generator=generator).tolist()
    image = [config.vision_start_token_id, config.image_token_id, config.vision_end_token_id]
    answers = [config.seg_token_id, config.disease_token_id, config.disease_token_id]
    ids = torch.tensor([*image, *words, *answers])
    return {
        "input_ids": ids,
        "labels": torch.where(torch.arange(len(ids)) < 5, -100, ids),
        "pixel_values": torch.randn(1, 64, 64, generator=generator),
        "patch_grid": torch.tensor([[1, 1, 1, 1]]),
        "mask_labels": torch.randint(0, 2, (1, 64, 64), generator=generator, dtype=torch.int8),
        "disease_labels": torch.tensor([1.0, 0.0]),
        "disease_ids": torch.tensor([1, 3]),
    }


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    batch: dict[str, Any] = {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels")}
    joined = ("pixel_values", "patch_grid", "disease_labels", "disease_ids")
    batch |= {name: torch.cat([row[name] for row in rows]) for name in joined}
    return {**batch, "mask_labels": [row["mask_labels"] for row in rows]}


def trainer(model: Any, folder: Path, rows: list[Any], **options: Any) -> Trainer:
    names = ("compute_metrics", "data_collator", "eval_dataset")
    apart = {name: options.pop(name) for name in names if name in options}
    arguments = TrainingArguments(
        str(folder), report_to="none", use_cpu=True, save_strategy="no", logging_steps=1, optim="sgd",
        lr_scheduler_type="constant", max_grad_norm=0.0, learning_rate=0.1, max_steps=1, disable_tqdm=True, **options,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=rows, **{"data_collator": collate, **apart})


def still(model: torch.nn.Module) -> torch.nn.Module:
    """Norms keep their statistics, so that only the loss decides what a step does."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.train = lambda mode=True, module=module: module  # type: ignore[method-assign]
            module.training = False
    return model


def test_accumulation_learns_what_one_large_batch_learns(tiny_config, tmp_path: Path) -> None:
    found = []
    for accumulation in (1, 2, 4):
        torch.manual_seed(0)
        model = still(CTInstructForConditionalGeneration(tiny_config()))
        rows = [sample(model.config, seed) for seed in range(4)]
        one = trainer(
            model,
            tmp_path,
            rows,
            gradient_accumulation_steps=accumulation,
            per_device_train_batch_size=4 // accumulation,
        )
        one.train()
        found.append((one.state.log_history[0]["loss"], torch.cat([p.detach().flatten() for p in model.parameters()])))
    for loss, weights in found[1:]:
        assert abs(loss - found[0][0]) <= 1e-5
        torch.testing.assert_close(weights, found[0][1], atol=1e-5, rtol=0)


def test_batches_of_unequal_words_and_masks_count_alike_in_a_step(tiny_config, tmp_path: Path) -> None:
    model = still(CTInstructForConditionalGeneration(tiny_config()))
    whole, short = sample(model.config, 0), sample(model.config, 1)
    short["labels"][:-3] = -100
    short["mask_labels"] = None
    short["input_ids"] = short["input_ids"].masked_fill(short["input_ids"] == model.config.seg_token_id, 20)

    def batch_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = collate(rows)
        return batch if rows[0]["mask_labels"] is not None else {**batch, "mask_labels": None}

    with torch.no_grad():
        losses = [float(model(**batch_of([row])).loss) for row in (whole, short)]
    one = trainer(
        model,
        tmp_path,
        [whole, short],
        gradient_accumulation_steps=2,
        per_device_train_batch_size=1,
        data_collator=batch_of,
    )
    one.train()
    assert one.state.log_history[0]["loss"] == pytest.approx(sum(losses) / 2, abs=1e-5)


@torch.no_grad()
def test_losses_divided_by_all_words_of_a_step_add_up_to_those_of_one_large_batch(tiny_config) -> None:
    model = CTInstructForConditionalGeneration(tiny_config()).eval()
    rows = [sample(model.config, seed) for seed in range(4)]
    words = sum(int((row["labels"][1:] != -100).sum()) for row in rows)
    expected = model(**collate(rows))
    parts = [model(**collate(rows[first : first + 2]), num_items_in_batch=torch.tensor(words)) for first in (0, 2)]
    torch.testing.assert_close(sum(part.loss for part in parts), expected.loss)
    rows[3]["labels"][:-1] = -100  # batches of unequal words
    expected, words = model(**collate(rows)).lm_loss, words - 4
    parts = [model(**collate(rows[first : first + 2]), num_items_in_batch=words) for first in (0, 2)]
    torch.testing.assert_close(sum(part.lm_loss for part in parts), expected)


@pytest.mark.parametrize("words", [-100, "vision"])
def test_a_batch_without_a_word_to_learn_has_its_other_losses(tiny_config, words: Any) -> None:
    model = CTInstructForConditionalGeneration(tiny_config())
    batch = collate([sample(model.config, 0)])
    vision = torch.arange(batch["labels"].shape[1]) < 3
    batch["labels"] = torch.where(vision & (words == "vision"), batch["input_ids"], -100)
    outputs = model(**batch)
    assert float(outputs.lm_loss) == 0
    weights = model.config.segmentation_loss_weight, model.config.disease_loss_weight
    expected = weights[0] * outputs.segmentation_loss + weights[1] * outputs.disease_loss
    torch.testing.assert_close(outputs.loss, expected)
    outputs.loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


@torch.no_grad()
def test_a_mask_is_never_painted_over_the_image_of_another_sample(tiny_config) -> None:
    model = CTInstructForConditionalGeneration(tiny_config()).eval()
    config = model.config
    image = [config.vision_start_token_id, config.image_token_id, config.vision_end_token_id]
    seg, grid = config.seg_token_id, torch.tensor([[1, 1, 1, 1]])
    samples = [
        [*image, 20, seg, 21, 22],
        [20, seg, *image, 21, 22],
        [20, seg, 21, 22, 23, 24, 25],
        [*image, seg, *image],
    ]
    pixels = torch.randn(4, 64, 64)
    together = model(input_ids=torch.tensor(samples), pixel_values=pixels, patch_grid=grid.expand(4, -1)).mask_logits
    shown = [pixels[:1], pixels[1:2], None, pixels[2:]]
    for sample_ids, own, mask in zip(samples, shown, together, strict=True):
        if own is None:
            assert mask.shape == (0, 0, 0)
            continue
        alone = model(input_ids=torch.tensor([sample_ids]), pixel_values=own, patch_grid=grid.expand(len(own), -1))
        torch.testing.assert_close(mask, alone.mask_logits[0], atol=1e-5, rtol=1e-5)
    masks = [torch.zeros(1, 64, 64, dtype=torch.int8)] * 4
    with pytest.raises(CTInstructError, match="show an image in each sample with <SEG>"):
        model(input_ids=torch.tensor(samples), pixel_values=pixels, patch_grid=grid.expand(4, -1), mask_labels=masks)


def test_evaluation_gives_its_loss_and_calls_the_metrics(tiny_config, tmp_path: Path) -> None:
    model = CTInstructForConditionalGeneration(tiny_config())
    rows = [sample(model.config, seed) for seed in range(3)]
    seen = []

    def accuracy(prediction: Any) -> dict[str, float]:
        seen.append((prediction.predictions.shape, prediction.label_ids.shape))
        kept = prediction.label_ids[:, 1:] != -100
        right = prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]
        return {"accuracy": float(right[kept].mean())}

    one = trainer(model, tmp_path, rows, eval_dataset=rows, compute_metrics=accuracy, per_device_eval_batch_size=2)
    scores = one.evaluate()
    assert 0 <= scores["eval_accuracy"] <= 1
    assert seen == [((3, 10, 99), (3, 10))]
    with torch.no_grad():
        expected = [float(model.eval()(**collate(part)).loss) for part in (rows[:2], rows[2:])]
    assert scores["eval_loss"] == pytest.approx((2 * expected[0] + expected[1]) / 3, abs=1e-5)
    assert one._get_collator_with_removed_columns(collate) is not collate  # columns are chosen by the whole signature
    assert {"mask_labels", "disease_labels", "prompt_labels"} <= set(one._signature_columns)


def test_evaluation_of_stage_one_gives_its_loss(tiny_config, tmp_path: Path) -> None:
    model = CTInstructForPretraining(tiny_config())
    batch = {"pixel_values": torch.randn(1, 64, 64), "class_input_ids": torch.tensor([[8, 9]]),
             "class_labels": torch.tensor([[1.0]])}  # fmt: skip
    one = trainer(model, tmp_path, [batch], eval_dataset=[batch], data_collator=lambda rows: rows[0])
    with torch.no_grad():
        assert one.evaluate()["eval_loss"] == pytest.approx(float(model.eval()(**batch).loss), abs=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mask_labels": []}, "mask_labels has 0 entries for 1 <SEG>"),
        ({"disease_labels": torch.ones(3)}, "disease_labels has 3 entries for 2 <disease_confidence>"),
        ({"disease_labels": torch.ones(0)}, "disease_labels has 0 entries for 2"),
        ({"cut": 7}, "mask_labels has 1 entries for 0 <SEG>"),
        ({"cut": 7, "mask_labels": None}, "disease_labels has 2 entries for 0"),
        (
            {"cut": 7, "mask_labels": None, "disease_labels": None, "prompt_labels": torch.ones(1, 16)},
            "prompt_labels has 1",
        ),
        ({"embeds": True}, "mask_labels need input_ids"),
        ({"embeds": True, "mask_labels": None}, "disease_labels need input_ids"),
        ({"pixel_values": None}, "mask_labels need images"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_labels_without_their_tokens_are_refused(tiny_config, change: dict[str, Any], words: str) -> None:
    model = CTInstructForConditionalGeneration(tiny_config()).eval()
    batch = collate([sample(model.config, 0)])
    cut, embeds = change.pop("cut", None), change.pop("embeds", False)
    batch |= change
    if cut:
        batch |= {name: batch[name][:, :cut] for name in ("input_ids", "labels")}
    if batch["pixel_values"] is None:
        batch["input_ids"][batch["input_ids"] == model.config.image_token_id] = 20
    if embeds:
        batch["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids"))
    with pytest.raises(CTInstructError, match=words):
        model(**batch)


def test_stage_one_refuses_labels_without_their_texts(tiny_config) -> None:
    model = CTInstructForPretraining(tiny_config()).eval()
    pixels = torch.randn(1, 64, 64)
    with pytest.raises(CTInstructError, match="class_labels need class_input_ids"):
        model(pixel_values=pixels, class_labels=torch.ones(1, 1))
    with pytest.raises(CTInstructError, match="mask_labels need mask_input_ids"):
        model(pixel_values=pixels, mask_labels=[torch.zeros(1, 64, 64)])


@pytest.mark.parametrize("embeds", [False, True])
def test_labels_at_image_and_vision_tokens_never_count(tiny_config, embeds: bool) -> None:
    model = CTInstructForConditionalGeneration(tiny_config()).eval()
    batch = collate([sample(model.config, 0)])
    batch = {name: batch[name] for name in ("input_ids", "pixel_values", "patch_grid", "disease_ids")}
    everything = batch["input_ids"].clone()
    right = everything.masked_fill(torch.arange(everything.shape[1]) < 3, -100)
    if embeds:
        batch["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids"))
    with torch.no_grad():
        logits = model(**batch).logits
        expected = torch.nn.functional.cross_entropy(logits[0, :-1], right[0, 1:])
        torch.testing.assert_close(model(**batch, labels=everything).lm_loss, expected)
