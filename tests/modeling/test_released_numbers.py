"""The released code's own numbers (shared/reference), against the converted checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from repository import shared
from safetensors.torch import load_file, save_file

from ctinstruct_hf import CTInstructError, CTInstructForConditionalGeneration
from ctinstruct_hf.hub.released import convert_released

TASKS = ("vqa", "segmentation", "diagnosis_ct_rate", "diagnosis_rad_chestct")


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(shared("reference/released_tiny/golden.safetensors"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CTInstructForConditionalGeneration:
    folder = tmp_path_factory.mktemp("converted") / "model"
    with pytest.warns(UserWarning, match="no tokenizer"):
        convert_released(shared("reference/released_tiny"), folder)
    return CTInstructForConditionalGeneration.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def batch(golden: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    z, y, x = golden["patch_num"].tolist()
    pixels = golden["pixel_values"].permute(0, 3, 1, 2)
    return {
        "pixel_values": pixels.flatten(0, 1),
        "patch_grid": torch.tensor([[z, y, x, pixels.shape[1]]]),
        "slice_mask": golden["slice_mark"].bool().flatten(),
    }


@torch.no_grad()
def test_skips_tokens_and_bridged_tokens_agree(model, golden, batch) -> None:
    features = model.get_image_features(**batch)
    for index, part in enumerate(features.feature_maps):
        assert relative(part.sum((2, 3)), golden[f"vision.skip{index}.sum_hw"]) < 1e-4
    assert relative(features.feature_maps[-1], golden["vision.skip4"]) < 1e-4
    assert relative(features.last_hidden_state, golden["vision.tokens"].flatten(0, 1)) < 1e-4
    assert relative(features.pooler_output[0], golden["vision.bridged"]) < 1e-4


@torch.no_grad()
def test_mask_logits_agree(model, golden, batch) -> None:
    features = model.get_image_features(**batch)
    queries = model.segmentation_query(golden["seg.text_embeddings"])
    grid = tuple(batch["patch_grid"][0].tolist())
    masks = model.segmentation_decoder(queries, features.feature_maps, features.last_hidden_state, grid)
    assert relative(masks.permute(0, 2, 3, 1), golden["seg.mask_logits"]) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("task", TASKS)
def test_positions_states_logits_and_losses_agree(model, golden, batch, task: str) -> None:
    input_ids = golden[f"{task}.input_ids"]
    positions, _ = model.model.get_rope_index(input_ids, batch["patch_grid"])
    assert torch.equal(positions, golden[f"{task}.position_ids"])
    labels = {"labels": golden[f"{task}.labels"]}
    if task == "segmentation":
        labels["mask_labels"] = [golden["segmentation.mask_target"][0].permute(2, 0, 1)]
    if f"{task}.targets" in golden:
        labels["disease_labels"] = golden[f"{task}.targets"]
    outputs = model(input_ids=input_ids, **batch, **labels)
    states = model.model(input_ids=input_ids, **batch).last_hidden_state
    assert relative(states, golden[f"{task}.last_hidden"]) < 1e-4
    assert relative(outputs.loss, golden[f"{task}.loss"]) < 1e-4
    if f"{task}.logits" in golden:
        assert relative(outputs.logits, golden[f"{task}.logits"]) < 1e-4
    if f"{task}.disease_logits" in golden:
        assert relative(outputs.disease_logits, golden[f"{task}.disease_logits"]) < 1e-4


def test_unknown_and_missing_tensors_are_refused_by_name(tmp_path: Path) -> None:
    source = shared("reference/released_tiny")
    tensors = load_file(source / "model.safetensors")
    for name in (
        "visual.qwen2biolord.weight",
        "rad_class_heads.3.bias",
        "visual.encoder.resnet2D.layer1.0.bn1.running_mean",
    ):
        tensors.pop(name)
    tensors["visual.extra"] = torch.zeros(1)
    broken = tmp_path / "broken"
    broken.mkdir()
    save_file(tensors, broken / "model.safetensors")
    (broken / "config.json").write_text((source / "config.json").read_text())
    with pytest.raises(CTInstructError) as error:
        convert_released(broken, tmp_path / "out")
    for name in ("visual.extra", "visual.qwen2biolord.weight", "rad_class_heads.3.bias", "layer1.0.bn1.running_mean"):
        assert name in str(error.value)
    assert not (tmp_path / "out").exists()


def test_every_tensor_of_the_full_release_has_a_rule() -> None:
    import json

    from ctinstruct_hf.hub.released import HEAD, our_names

    names = json.loads(shared("reference/released_full_tensors.json").read_text())
    assert len(names) > 600
    for name in names:
        if not HEAD.fullmatch(name):
            our_names(name)
