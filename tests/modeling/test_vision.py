"""The towers: one suite for the paper's, the released layout and the two ablations."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_layers import GradientCheckpointingLayer

from ctinstruct_hf import (
    CTInstructConfig,
    CTInstructError,
    CTInstructForConditionalGeneration,
    CTInstructSegmentationDecoder,
    CTInstructVisionModel,
)
from ctinstruct_hf.evaluation.segmentation import volume_dice
from ctinstruct_hf.modeling.inference_ctinstruct import optimize_for_inference
from ctinstruct_hf.modeling.losses_ctinstruct import mask_loss

KINDS = [("hybrid", "paper"), ("hybrid", "released"), ("resnet3d", "paper"), ("vit3d", "paper")]


@pytest.fixture(params=KINDS, ids=lambda kind: "-".join(kind))
def tower(request: pytest.FixtureRequest, tiny_config) -> CTInstructVisionModel:
    config = tiny_config().vision_config
    config.architecture, config.attention_layout = request.param
    config.vit_hidden_size, config.vit_depths, config.vit_patch_size = 24, [1, 1, 1, 1], [2, 16, 16]
    config.resnet3d_planes = [4, 8, 8, 16]
    model = CTInstructVisionModel(config).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.BatchNorm3d):
            torch.nn.init.uniform_(module.running_mean, -0.2, 0.2)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


@torch.no_grad()
def test_a_token_and_five_maps_per_slice(tower: CTInstructVisionModel) -> None:
    features = tower(torch.randn(6, 64, 96), [(1, 1, 1, 6)])
    assert features.last_hidden_state.shape == (6, 32)
    sizes = [(4, 32, 48), (8, 16, 24), (16, 8, 12), (16, 4, 6), (32, 2, 3)]
    assert [tuple(part.shape[1:]) for part in features.feature_maps] == sizes


@torch.no_grad()
def test_the_stem_reads_each_window_as_a_channel(tiny_config) -> None:
    config = tiny_config().vision_config
    config.stem_windows = [[-1, 1], [-0.2, 0.3]]
    model = CTInstructVisionModel(config).eval()
    assert model.get_input_embeddings().weight.shape[1] == 2
    slices = torch.tensor([[[-1.0, -0.2, 0.05, 0.3, 1.0]]])
    torch.testing.assert_close(model.encoder.windows(slices)[0, 0], slices[0])
    torch.testing.assert_close(model.encoder.windows(slices)[0, 1], torch.tensor([[-1.0, -1.0, 0.0, 1.0, 1.0]]))
    pixels = torch.rand(3, 64, 64) - 0.5
    seen = model(pixels, [(1, 1, 1, 3)])
    outside = model(torch.where(pixels > 0.3, pixels + 0.1, pixels), [(1, 1, 1, 3)])  # one of the windows still sees it
    assert not torch.equal(seen.last_hidden_state, outside.last_hidden_state)
    config.stem_windows = [[-0.2, 0.3]]
    narrow = CTInstructVisionModel(config).eval()
    moved = torch.where(pixels > 0.3, pixels + 0.1, pixels)
    torch.testing.assert_close(narrow(pixels).last_hidden_state, narrow(moved).last_hidden_state)
    config.stem_windows = [[0.3, -0.2]]
    with pytest.raises(CTInstructError, match="stem_windows"):
        CTInstructVisionModel(config)


@torch.no_grad()
def test_a_mixed_batch_gives_each_image_what_it_gets_alone(tower: CTInstructVisionModel) -> None:
    grids = [(1, 1, 1, 1), (2, 1, 1, 4), (1, 2, 1, 4), (2, 1, 1, 4)]
    images = [torch.randn(z * y * x * s, 64, 64) for z, y, x, s in grids]
    masks = [torch.ones(len(image), dtype=torch.bool) for image in images]
    masks[1][-2:] = False
    together = tower(torch.cat(images), torch.tensor(grids), torch.cat(masks))
    start = 0
    for image, grid, mask in zip(images, grids, masks, strict=True):
        alone = tower(image, torch.tensor([grid]), mask)
        rows = slice(start, start + len(image))
        torch.testing.assert_close(together.last_hidden_state[rows], alone.last_hidden_state, atol=1e-4, rtol=1e-4)
        for whole, part in zip(together.feature_maps, alone.feature_maps, strict=True):
            torch.testing.assert_close(whole[rows], part, atol=1e-4, rtol=1e-4)
        start += len(image)


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("grids", [[(3, 1, 1, 4)], [(1, 2, 3, 2), (1, 2, 3, 2), (2, 1, 1, 2)]], ids=["one", "several"])
def test_a_tower_made_quick_for_inference_gives_the_same(
    tower: CTInstructVisionModel, grids: list[tuple[int, int, int, int]], padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks, folded norms and reused padding change nothing but the rounding."""
    count = sum(z * y * x * s for z, y, x, s in grids)
    pixels = torch.randn(count, 64, 64)
    mask = torch.ones(count, dtype=torch.bool)
    if padded:
        mask[count - 4 :] = False
        pixels[count - 4 :] = -1.0
    monkeypatch.setattr("ctinstruct_hf.modeling.inference_ctinstruct.CELLS_PER_SLICE", 2)
    quick = copy.deepcopy(tower)
    quick.config.slice_chunk_size = 5
    optimize_for_inference(quick)
    with torch.no_grad():
        expected, found = tower(pixels, grids, mask), quick(pixels, grids, mask)
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, atol=1e-5, rtol=1e-4)
    for ours, theirs in zip(found.feature_maps, expected.feature_maps, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


class LargestTensor(TorchDispatchMode):
    """The most numbers that any operation newly makes."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if not func.is_view and isinstance(made, torch.Tensor):
            self.most = max(self.most, made.numel())
        return made


@torch.no_grad()
def test_attention_over_many_patches_works_in_bounded_chunks(tiny_config) -> None:
    """Beside the volume itself nothing grows with the patches but the biases, small at this size."""
    config = tiny_config().vision_config
    config.slice_chunk_size = 1
    tower = optimize_for_inference(CTInstructVisionModel(config).eval())
    largest = []
    for patches in (4, 16):
        last_map = torch.randn(patches * 32, config.hidden_size, 4, 4)
        with LargestTensor() as seen:
            tower.attention(last_map, (patches, 1, 1, 32), torch.ones(1, patches * 32, dtype=torch.bool))
        largest.append(seen.most / last_map.numel())
    assert largest[1] <= 1.5  # feed-forward over all cells at once would be more than twice the volume


@torch.no_grad()
def test_norms_are_folded_but_for_the_stem_whose_map_is_given_back(tiny_config) -> None:
    tower = optimize_for_inference(CTInstructVisionModel(tiny_config().vision_config).eval())
    norms = [name for name, module in tower.named_modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert norms == ["encoder.stem.norm"]


def test_a_model_made_quick_for_inference_is_not_saved(tiny_config, tmp_path: Path) -> None:
    """Its folded weights would load as something else."""
    model = optimize_for_inference(CTInstructForConditionalGeneration(tiny_config()).eval())
    with pytest.raises(CTInstructError, match="load it again"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


@torch.no_grad()
def test_padding_slices_are_no_keys(tiny_config) -> None:
    """What lies in a slice marked as padding does not reach the other slices' attention within a patch."""
    tower = CTInstructVisionModel(tiny_config().vision_config).eval()
    for layer in [*tower.attention.patch_layers, *tower.attention.slice_layers]:
        layer.position.conv.weight.zero_()  # positions look at neighbours whatever the mask says
    pixels, mask = torch.randn(4, 64, 64), torch.tensor([True, True, True, False])
    first = tower(pixels, [(1, 1, 1, 4)], mask).last_hidden_state[:3]
    pixels[3] = torch.randn(64, 64)
    torch.testing.assert_close(tower(pixels, [(1, 1, 1, 4)], mask).last_hidden_state[:3], first)


def test_grid_and_pixels_that_disagree_are_refused(tower: CTInstructVisionModel) -> None:
    with pytest.raises(CTInstructError, match="counts 8 slices"):
        tower(torch.randn(6, 64, 64), [(2, 1, 1, 4)])


@pytest.mark.parametrize("preset", ["tiny", "paper"])
def test_ablation_towers_match_in_parameters(preset: str) -> None:
    counts = []
    for architecture in ("hybrid", "resnet3d", "vit3d"):
        config = CTInstructConfig.preset(preset).vision_config
        config.architecture = architecture
        with torch.device("meta"):
            counts.append(sum(parameter.numel() for parameter in CTInstructVisionModel(config).parameters()))
    assert all(abs(count / counts[0] - 1) < 0.15 for count in counts), counts


def with_detail(config: CTInstructConfig) -> CTInstructConfig:
    config.vision_config.keeps_slices = True
    config.vision_config.stem_windows = [[-1, 1], [-0.2, 0.3]]
    config.segmentation_config.detail_channels = 6
    config.segmentation_config.feature_channels = config.vision_config.feature_channels
    return config


@pytest.mark.parametrize("detail", [False, True])
@torch.no_grad()
def test_masks_in_chunks_equal_masks_at_once(tiny_config, detail: bool) -> None:
    config = with_detail(tiny_config()) if detail else tiny_config()
    tower = CTInstructVisionModel(config.vision_config).eval()
    decoder = CTInstructSegmentationDecoder(config.segmentation_config).eval()
    grid = (2, 1, 2, 3)
    features = tower(torch.randn(12, 64, 64), [grid])
    arguments = (torch.randn(3, 16), features.feature_maps, features.last_hidden_state, grid)
    whole = decoder(*arguments)
    more = (torch.randn(9, 16), *arguments[1:])  # more queries than channels takes the other path
    more_whole = decoder(*more)
    decoder.config.slice_chunk_size = 2
    optimize_for_inference(decoder)
    assert whole.shape == (3, 6, 64, 128)
    torch.testing.assert_close(decoder(*arguments), whole, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(decoder(*more), more_whole, atol=1e-5, rtol=1e-4)


def test_the_slices_at_full_resolution_give_edges_of_one_voxel(tiny_config) -> None:
    torch.manual_seed(0)
    pixels = torch.randint(0, 2, (2, 64, 64)).float() - 0.5  # neighbours have nothing in common
    truth = (pixels > 0).to(torch.int8)
    query = torch.randn(1, 16)
    dice = []
    for config in (tiny_config(), with_detail(tiny_config())):
        tower = CTInstructVisionModel(config.vision_config)
        decoder = CTInstructSegmentationDecoder(config.segmentation_config)
        optimizer = torch.optim.Adam([*tower.parameters(), *decoder.parameters()], lr=1e-2)
        for _ in range(60):
            features = tower(pixels)
            (logits,) = decoder(query, features.feature_maps, features.last_hidden_state, (1, 1, 1, 2))
            optimizer.zero_grad()
            mask_loss(logits, truth).backward()
            optimizer.step()
        dice.append(volume_dice(logits > 0, truth > 0))
    assert dice[1] > 0.95 > 0.85 > dice[0], dice


@pytest.mark.parametrize("detail", [False, True])
def test_what_must_not_be_split_is_there(tiny_config, detail: bool) -> None:
    """FSDP wraps modules by these names and refuses one that the model does not have."""
    config = with_detail(tiny_config()) if detail else tiny_config()
    model = CTInstructForConditionalGeneration(config)
    names = {type(module).__name__ for module in model.modules()}
    assert model._no_split_modules <= names
    assert ("DetailBlock" in model._no_split_modules) == detail


def test_blocks_of_every_tower_are_recomputed_where_memory_is_saved(tower: CTInstructVisionModel) -> None:
    """Gradient checkpointing runs each block twice and changes no gradient; FSDP keeps just these blocks whole."""
    pixels = torch.randn(4, 64, 64)
    tower(pixels, [(1, 1, 1, 4)]).last_hidden_state.sum().backward()
    expected = {name: weight.grad.clone() for name, weight in tower.named_parameters() if weight.grad is not None}
    tower.zero_grad()
    tower.gradient_checkpointing_enable()
    tower.train()
    for module in tower.modules():
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.BatchNorm3d):
            module.eval()
    calls: dict[str, int] = {}
    blocks = {name: module for name, module in tower.named_modules() if isinstance(module, GradientCheckpointingLayer)}
    for name, block in blocks.items():
        first = next(block.children())  # hooks of the block itself stay outside what is recomputed
        first.register_forward_pre_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
    tower(pixels, [(1, 1, 1, 4)]).last_hidden_state.sum().backward()
    assert blocks
    assert set(calls.values()) == {2}
    assert len(calls) == len(blocks)
    assert {type(block).__name__ for block in blocks.values()} == set(tower._no_split_modules)
    for name, weight in tower.named_parameters():
        if name in expected:
            torch.testing.assert_close(weight.grad, expected[name], atol=1e-4, rtol=1e-3)


def test_slices_are_kept_for_the_detail_map_or_not_at_all() -> None:
    tiny = CTInstructConfig.preset("tiny").to_dict()
    one = {**tiny, "segmentation_config": {**tiny["segmentation_config"], "detail_channels": 8}}
    with pytest.raises(CTInstructError, match="set both or none"):
        CTInstructConfig(**one)
    one["vision_config"] = {**tiny["vision_config"], "keeps_slices": True}
    with pytest.raises(CTInstructError, match="feature_channels is"):
        CTInstructConfig(**one)
    one["vision_config"]["architecture"] = "resnet3d"
    with pytest.raises(CTInstructError, match="hybrid tower"):
        CTInstructConfig(**one)


def test_the_tower_compiles_in_one_graph_and_exports(tiny_config) -> None:
    tower = CTInstructVisionModel(tiny_config().vision_config).eval()
    pixels, grid = torch.randn(4, 64, 64), [(2, 1, 1, 2)]
    with torch.no_grad():
        expected = tower(pixels, grid).last_hidden_state
        compiled = torch.compile(tower, backend="eager", fullgraph=True)(pixels, grid).last_hidden_state
        torch.testing.assert_close(compiled, expected, atol=1e-5, rtol=1e-4)

        class Tokens(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.tower = tower

            def forward(self, pixels: torch.Tensor) -> torch.Tensor:
                return self.tower(pixels, grid, return_dict=True).last_hidden_state

        exported = torch.export.export(Tokens(), (pixels,)).module()
        torch.testing.assert_close(exported(pixels), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_attention_implementations_agree(tiny_config, implementation: str) -> None:
    tower = CTInstructVisionModel(tiny_config().vision_config).eval()
    pixels = torch.randn(8, 64, 64)
    mask = torch.tensor([True] * 6 + [False] * 2)
    expected = tower(pixels, [(2, 1, 1, 4)], mask).last_hidden_state
    tower.set_attn_implementation(implementation)
    torch.testing.assert_close(tower(pixels, [(2, 1, 1, 4)], mask).last_hidden_state, expected, atol=1e-5, rtol=1e-4)
