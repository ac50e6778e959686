"""Stage one: each loss against a value computed by hand, any subset of labels, the queue, the gather."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ctinstruct_hf import CTInstructConfig, CTInstructError, CTInstructForPretraining
from ctinstruct_hf.modeling.losses_ctinstruct import label_loss, mask_loss, masks_loss
from ctinstruct_hf.modeling.pretraining_ctinstruct import contrastive_loss
from ctinstruct_hf.modeling.small_models_ctinstruct import hard_weights, prompt_loss


def batch() -> dict[str, object]:
    return {
        "pixel_values": torch.randn(4, 64, 64),
        "patch_grid": torch.tensor([[1, 1, 1, 2], [1, 1, 1, 2]]),
        "input_ids": torch.randint(8, 90, (2, 6)),
        "class_input_ids": torch.randint(8, 90, (3, 4)),
        "class_labels": torch.tensor([[1.0, 0.0, -1.0], [0.0, 1.0, 1.0]]),
        "mask_input_ids": torch.randint(8, 90, (2, 3)),
        "mask_images": torch.tensor([1, 0]),
        "mask_labels": [torch.randint(-1, 2, (2, 64, 64), dtype=torch.int8) for _ in range(2)],
    }


def test_the_contrastive_loss_by_hand() -> None:
    scores = torch.tensor([[2.0, 0.0], [1.0, 3.0]])
    image = -(math.log(math.e**2 / (math.e**2 + 1)) + math.log(math.e**3 / (math.e + math.e**3))) / 2
    text = -(math.log(math.e**2 / (math.e**2 + math.e)) + math.log(math.e**3 / (1 + math.e**3))) / 2
    assert contrastive_loss(scores, scores.T).item() == pytest.approx(image + text, rel=1e-5)


def test_many_small_masks_are_scored_like_each_alone() -> None:
    torch.manual_seed(0)
    logits = [torch.randn(1, 9, 7, requires_grad=True) for _ in range(5)]
    labels = [torch.randint(-1, 2, (1, 9, 7)).to(torch.int8) for _ in range(4)] + [
        torch.full((1, 9, 7), -1, dtype=torch.int8)
    ]
    together = masks_loss(logits, labels, positive_weight=3.0)
    each = torch.stack([mask_loss(one, truth, positive_weight=3.0) for one, truth in zip(logits, labels, strict=True)])
    assert together.item() == pytest.approx(each.mean().item(), rel=1e-5)
    first = torch.autograd.grad(together, logits)
    second = torch.autograd.grad(each.mean(), logits)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    weights = torch.tensor([1.0, 0.0, 3.0, 0.0, 0.0])
    assert masks_loss(logits, labels, 3.0, weights).item() == pytest.approx(
        ((each[0] + 3 * each[2]) / 4).item(), rel=1e-5
    )
    with pytest.raises(ValueError, match="has shape"):
        masks_loss(logits, [*labels[:4], labels[0][:, :3]])


def test_joined_masks_are_one_mask_over_their_images() -> None:
    torch.manual_seed(0)
    logits = [torch.randn(1, 9, 7, requires_grad=True) for _ in range(5)]
    labels = [torch.randint(-1, 2, (1, 9, 7)).to(torch.int8) for _ in range(5)]
    labels[2] = torch.zeros(1, 9, 7, dtype=torch.int8)  # a slice without the structure
    groups = torch.tensor([7, 3, 7, 3, 7])
    each = [
        mask_loss(torch.cat([logits[index] for index in group]), torch.cat([labels[index] for index in group]))
        for group in ((1, 3), (0, 2, 4))
    ]
    together = masks_loss(logits, labels, groups=groups)
    assert together.item() == pytest.approx(((each[0] + each[1]) / 2).item(), rel=1e-5)
    for first, second in zip(
        torch.autograd.grad(together, logits), torch.autograd.grad((each[0] + each[1]) / 2, logits), strict=True
    ):
        torch.testing.assert_close(first, second, atol=1e-6, rtol=1e-4)
    weights = torch.tensor([1.0, 0.5, 1.0, 0.0, 1.0])
    weighed = masks_loss(logits, labels, weights=weights, groups=groups)
    assert weighed.item() == pytest.approx(((0.5 * each[0] + 3 * each[1]) / 3.5).item(), rel=1e-5)


def test_joined_masks_make_marks_on_a_slice_without_the_structure_dear() -> None:
    there = torch.zeros(1, 16, 16, dtype=torch.int8)
    there[0, 4:8, 4:8] = 1
    labels = [there, torch.zeros_like(there)]
    right = [torch.where(one > 0, 9.0, -9.0) for one in labels]
    wrong = [right[0], right[0].clone()]  # the other slice is marked alike
    groups = torch.tensor([0, 0])

    def price(groups: torch.Tensor | None) -> float:
        entropy = 9 * 16 / 256 / 2  # of the wrong voxels, which both ways pay
        loss = masks_loss(wrong, labels, groups=groups) - masks_loss(right, labels, groups=groups)
        return float(loss) - entropy

    assert price(None) == pytest.approx(0, abs=0.02)
    assert price(groups) == pytest.approx(1 / 3, abs=1e-3)  # Dice of 2 * 16 / (32 + 16)


def test_voxels_of_small_structures_weigh_more_up_to_the_limit() -> None:
    torch.manual_seed(0)
    logits = [torch.randn(1, 10, 10), torch.randn(1, 10, 10)]
    small, large = torch.zeros(1, 10, 10, dtype=torch.int8), torch.zeros(1, 10, 10, dtype=torch.int8)
    small[0, 0, :4], large[0, :5] = 1, 1  # 96 voxels outside of 4 inside; as many as inside
    small[0, 9] = -1
    weights = ((86 / 4) ** 0.5, 1.0)
    each = [
        mask_loss(one, truth, positive_weight=weight)
        for one, truth, weight in zip(logits, (small, large), weights, strict=True)
    ]
    together = masks_loss(logits, [small, large], positive_weight=50.0, positive_power=0.5)
    assert together.item() == pytest.approx(((each[0] + each[1]) / 2).item(), rel=1e-5)
    limited = masks_loss(logits[:1], [small], positive_weight=2.0, positive_power=0.5)
    assert limited.item() == pytest.approx(mask_loss(logits[0], small, positive_weight=2.0).item(), rel=1e-5)


def test_the_prompt_loss_is_the_share_of_the_spread_that_is_missed() -> None:
    wanted = torch.tensor([[0.0, 2.0], [4.0, 2.0], [2.0, 8.0]])
    assert prompt_loss(wanted.clone(), wanted).item() == 0
    assert prompt_loss(wanted.mean(0).expand(3, 2), wanted).item() == pytest.approx(1.0)
    assert prompt_loss(torch.zeros(1, 2), wanted[1:2]).item() == pytest.approx(1.0)  # one alone: against nothing


def test_the_mask_loss_by_hand() -> None:
    logits = torch.tensor([[[0.0, 2.0, -1.0, 9.0]]])
    labels = torch.tensor([[[1, 1, 0, -1]]])
    p = [1 / (1 + math.exp(-x)) for x in (0.0, 2.0, -1.0)]
    entropy = -(math.log(p[0]) + math.log(p[1]) + math.log(1 - p[2])) / 3
    dice = 2 * (p[0] + p[1]) / (p[0] ** 2 + p[1] ** 2 + p[2] ** 2 + 2)
    assert mask_loss(logits, labels).item() == pytest.approx(entropy + 1 - dice, rel=1e-5)


def test_the_label_loss_by_hand() -> None:
    logits, labels = torch.tensor([1.0, -2.0, 5.0]), torch.tensor([1.0, 0.0, -1.0])
    p = [1 / (1 + math.exp(-1.0)), 1 / (1 + math.exp(2.0))]
    expected = -(3 * math.log(p[0]) + math.log(1 - p[1])) / 2
    assert label_loss(logits, labels, torch.tensor([3.0, 1.0, 1.0])).item() == pytest.approx(expected, rel=1e-5)


def test_the_sum_of_the_three_and_the_category_cosine(tiny_config) -> None:
    model = CTInstructForPretraining(tiny_config()).eval()
    inputs = batch()
    outputs = model(**inputs)
    total = outputs.contrastive_loss + outputs.category_loss + outputs.segmentation_loss
    torch.testing.assert_close(outputs.loss, total)
    features = model.get_image_features(inputs["pixel_values"], inputs["patch_grid"])
    tokens = features.last_hidden_state.view(2, 2, -1).mean(1)
    texts = model.embed_texts(inputs["class_input_ids"])
    cosine = F.cosine_similarity(model.category_projection(tokens)[:, None], texts[None], dim=-1)
    torch.testing.assert_close(outputs.category_logits, cosine * model.category_scale.exp() + model.category_bias)
    assert [tuple(mask.shape) for mask in outputs.mask_logits] == [(2, 64, 64)] * 2


@pytest.mark.parametrize("kept", [("input_ids",), ("class_input_ids", "class_labels"), ("mask_input_ids", "mask_images", "mask_labels"), ()])  # fmt: skip
def test_any_subset_of_labels(tiny_config, kept: tuple[str, ...]) -> None:
    model = CTInstructForPretraining(tiny_config()).train()
    inputs = {name: value for name, value in batch().items() if name in ("pixel_values", "patch_grid", *kept)}
    outputs = model(**inputs)
    assert (outputs.loss is None) == (not kept)
    if kept:
        outputs.loss.backward()


def test_the_cell_loss_by_hand(tiny_config) -> None:
    """A cell has a structure if one of its voxels has; images of several grids, padding and weights are minded."""
    torch.manual_seed(0)
    model = CTInstructForPretraining(tiny_config()).eval()
    model.loss_weights = {"contrastive": 0, "category": 0, "segmentation": 0, "cells": 2.0}
    width, columns = 64, 2  # of a patch in voxels and in cells
    grids = [(1, 1, 1, 2), (1, 1, 2, 2), (1, 1, 1, 2)]
    labels = [torch.zeros(2, 64, width * x, dtype=torch.int8) for _, _, x, _ in grids]
    labels[1][1, 40, 70] = 1  # the second patch, its second slice, lower left cell
    labels[2][0] = -1  # a slice of padding
    inputs = {
        "pixel_values": torch.randn(8, 64, width),
        "patch_grid": torch.tensor(grids),
        "mask_input_ids": torch.randint(8, 90, (3, 3)),
        "mask_images": torch.tensor([0, 1, 2]),
        "mask_labels": labels,
    }
    output = model(**inputs)
    assert output.loss.item() == pytest.approx(2 * output.cell_loss.item(), rel=1e-5)

    features = model.get_image_features(inputs["pixel_values"], inputs["patch_grid"], output_hidden_states=True)
    cells = F.normalize(model.category_projection(features.hidden_states[-1]), dim=-1)
    texts = F.normalize(model.embed_texts(inputs["mask_input_ids"]), dim=-1)
    # hidden states come with images of one grid together: the first and the third image, then the second
    rows = [slice(0, 2), slice(4, 8), slice(3, 4)]
    scores = [cells[own] @ text * model.category_scale.exp() for own, text in zip(rows, texts, strict=True)]
    truth = [torch.zeros_like(one) for one in scores]
    truth[1][3, 1 * columns + 0] = 1
    rarity = torch.tensor(15.0).sqrt()  # one cell of sixteen
    each = [
        F.binary_cross_entropy_with_logits(a, b, pos_weight=rarity).item() for a, b in zip(scores, truth, strict=True)
    ]
    assert output.cell_loss.item() == pytest.approx(sum(each) / 3, rel=1e-4)
    weighted = model(**inputs, mask_weights=torch.tensor([1.0, 3.0, 0.0])).cell_loss
    assert weighted.item() == pytest.approx((each[0] + 3 * each[1]) / 4, rel=1e-4)
    model.loss_weights = {}
    assert model(**inputs).cell_loss is None


def test_a_frozen_text_encoder_reads_each_text_once(tiny_config) -> None:
    model = CTInstructForPretraining(tiny_config()).eval()
    model.text_encoder.requires_grad_(False)
    calls: list[int] = []
    model.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    ids = torch.tensor([[9, 10, 11], [9, 12, 1]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    first, second = model.embed_texts(ids, mask), model.embed_texts(ids.flip(0), mask.flip(0))
    torch.testing.assert_close(first, second.flip(0))
    assert len(calls) == 2


def test_the_momentum_queue_fills_and_follows(tiny_config) -> None:
    model = CTInstructForPretraining(tiny_config(queue_size=5, queue_momentum=0.5)).train()
    inputs = {name: value for name, value in batch().items() if name in ("pixel_values", "patch_grid", "input_ids")}
    model(**inputs)
    assert torch.equal(model.momentum_image_projection.weight, model.image_projection.weight)
    before = model.momentum_image_projection.weight.clone()
    with torch.no_grad():
        model.image_projection.weight.add_(1.0)
    for filled in (4, 5, 5):
        outputs = model(**inputs)
        assert int(model.queue.filled) == filled
        assert torch.isfinite(outputs.loss)
    outputs.loss.backward()
    assert model.momentum_image_projection.weight.grad is None
    moved = (model.momentum_image_projection.weight - before).mean().item()
    assert moved == pytest.approx(1 - 0.5**3, abs=1e-4)


def test_a_text_encoder_is_needed(tiny_config) -> None:
    with pytest.raises(CTInstructError, match="text encoder"):
        CTInstructForPretraining(tiny_config(text_encoder_config=None))


GATHER = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from tiny import tiny_config
from ctinstruct_hf import CTInstructForPretraining
dist.init_process_group('gloo')
rank = dist.get_rank()
torch.manual_seed(0)
model = CTInstructForPretraining(tiny_config(gather_features=True)).eval()
pixels, words = torch.randn(4, 64, 64), torch.randint(8, 90, (4, 5))
mine = slice(2 * rank, 2 * rank + 2)
grid = torch.tensor([[1, 1, 1, 1]] * 2)
loss = model(pixel_values=pixels[mine], patch_grid=grid, input_ids=words[mine]).loss
loss.backward()
gradient = model.image_projection.weight.grad.clone()
dist.all_reduce(gradient)
whole = CTInstructForPretraining(tiny_config()).eval()
whole.load_state_dict(model.state_dict())
expected = whole(pixel_values=pixels, patch_grid=torch.tensor([[1, 1, 1, 1]] * 4), input_ids=words).loss
expected.backward()
torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
torch.testing.assert_close(gradient / 2, whole.image_projection.weight.grad, atol=1e-5, rtol=1e-4)
dist.destroy_process_group()
"""


def test_two_processes_contrast_like_one_with_the_joined_batch(tmp_path: Path) -> None:
    script = tmp_path / "gather.py"
    script.write_text(GATHER)
    conformance = Path(__file__).parents[2] / "conformance"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29517", str(script), str(conformance)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_unet_runs_once_over_a_batch_and_paints_each_image_like_alone() -> None:
    """In evaluation the images are painted one by one, while training together: equal, as batch norm is frozen here."""
    config = CTInstructConfig.preset("tiny")
    model = CTInstructForPretraining(config).eval()
    pixels = torch.randn(10, 64, 64)
    grid = torch.tensor([[1, 1, 1, 4], [1, 1, 1, 1], [1, 1, 1, 5]])
    queries = torch.randn(3, config.segmentation_config.hidden_size)
    owners = torch.tensor([2, 0, 2])  # the second image is not asked about
    with torch.no_grad():
        features = model.get_image_features(pixels, grid, return_dict=True)
        alone = model.segment(features, queries, owners)
    together = model.segment(features, queries, owners)
    assert [tuple(mask.shape) for mask in together] == [(5, 64, 64), (4, 64, 64), (5, 64, 64)]
    for one, two in zip(alone, together, strict=True):
        torch.testing.assert_close(one, two.detach(), atol=1e-4, rtol=1e-4)


def test_hard_names_count_more(tiny_config) -> None:
    """Each name by its own loss: the weights are no part of the gradient, an unknown name is none."""
    model = CTInstructForPretraining(tiny_config())
    logits = torch.tensor([[2.0, -1.0, 0.5], [-3.0, 0.2, 1.0]], requires_grad=True)
    labels = torch.tensor([[1, 0, -1], [0, 1, -1]])
    by_name = F.binary_cross_entropy_with_logits(logits[:, :2], labels[:, :2].float(), reduction="none").mean(0)
    assert model.category_loss(logits, labels).item() == pytest.approx(by_name.mean().item(), rel=1e-6)
    model.hard_names = 2.0
    weights = by_name.detach() ** 2
    wanted = (by_name * weights).sum() / weights.sum()
    found = model.category_loss(logits, labels)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    (ours,) = torch.autograd.grad(found, logits, retain_graph=True)
    (theirs,) = torch.autograd.grad(wanted, logits)
    torch.testing.assert_close(ours, theirs)
    assert model.category_loss(logits, torch.full((2, 3), -1)).item() == 0
    losses = torch.tensor([0.5, 0.1])
    assert hard_weights(losses, 0.0) is None
    torch.testing.assert_close(hard_weights(losses, 1.0, torch.tensor([1.0, 5.0])), torch.tensor([0.5, 0.5]))
