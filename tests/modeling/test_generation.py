"""`generate` of Transformers with images, masks and probabilities."""

from __future__ import annotations

import pytest
import torch

from ctinstruct_hf import CTInstructError, CTInstructForConditionalGeneration

GRIDS = [[2, 1, 1, 2], [1, 1, 2, 2], [1, 1, 1, 1]]


@pytest.fixture(scope="module", params=["one axis", "three axes"])
def model(request: pytest.FixtureRequest, tiny_config) -> CTInstructForConditionalGeneration:
    torch.manual_seed(0)
    overrides = {"disease_lists": {"pair": ["emphysema", "cardiomegaly"]}}
    if request.param == "three axes":
        config = tiny_config()
        text = {**config.text_config.to_dict(), "model_type": "qwen2_vl_text"}
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
        overrides |= {"text_config": text, "image_token_order": "slices"}
    return CTInstructForConditionalGeneration(tiny_config(**overrides)).eval()


def images(count: int) -> dict[str, torch.Tensor]:
    grid = torch.tensor(GRIDS[:count])
    rows = int(grid.prod(-1).sum())
    generator = torch.Generator().manual_seed(3)
    return {"pixel_values": torch.randn(rows, 64, 64, generator=generator), "patch_grid": grid}


def prompts(model, rows: list[list[int]], length: int) -> dict[str, torch.Tensor]:
    """Left-padded prompts; in each row of `rows`, numbers of images by their place in GRIDS, and words."""
    config = model.config
    texts = []
    for words in rows:
        ids: list[int] = []
        for word in words:
            if word < 0:  # an image
                tokens = int(torch.tensor(GRIDS[-word - 1]).prod())
                ids += [config.vision_start_token_id, *[config.image_token_id] * tokens, config.vision_end_token_id]
            else:
                ids.append(word)
        texts.append(ids)
    padded = torch.full((len(texts), length), 1)
    mask = torch.zeros(len(texts), length, dtype=torch.long)
    for row, ids in enumerate(texts):
        padded[row, length - len(ids) :] = torch.tensor(ids)
        mask[row, length - len(ids) :] = 1
    return {"input_ids": padded, "attention_mask": mask}


def forced(model, start: int):
    config = model.config

    def processor(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - start
        token = {1: config.seg_token_id, 3: config.disease_token_id, 4: config.disease_token_id}.get(step)
        banned = [config.seg_token_id, config.disease_token_id, 2]
        scores[:, banned] = -1e9
        if token is not None:
            scores[:, :] = -1e9
            scores[:, token] = 0.0
        return scores

    return [processor]


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "top_k": 20},
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
        {"do_sample": True, "num_return_sequences": 2},
        {"do_sample": False, "cache_implementation": "static"},
        {"do_sample": False, "use_cache": False},
        {"do_sample": False, "prompt_lookup_num_tokens": 2},
    ],
    ids=lambda options: "-".join(f"{key}={value}" for key, value in options.items()),
)
@torch.no_grad()
def test_masks_and_probabilities_equal_a_forward_pass_over_the_sequences(model, options: dict) -> None:
    batch = images(2)
    inputs = prompts(model, [[10, -1, 11, 12], [13, -2, 14]], 12)
    if "prompt_lookup_num_tokens" in options:  # works on one prompt at a time
        batch = {"pixel_values": batch["pixel_values"][:4], "patch_grid": batch["patch_grid"][:1]}
        inputs = {name: value[:1] for name, value in inputs.items()}
    logits_processor = forced(model, inputs["input_ids"].shape[1])
    outputs = model.generate(
        **inputs, **batch, max_new_tokens=7, return_dict_in_generate=True, logits_processor=logits_processor, **options
    )
    returned = options.get("num_return_sequences", 1)
    samples = inputs["input_ids"].shape[0]
    assert outputs.sequences.shape[0] == samples * returned
    assert len(outputs.mask_logits) == samples * returned
    assert len(outputs.disease_logits) == 2 * samples * returned
    for row, sequence in enumerate(outputs.sequences):
        sample = row // returned
        rows = batch["patch_grid"].prod(-1).tolist()
        start = sum(rows[:sample])
        mask = torch.cat([inputs["attention_mask"][sample], torch.ones(len(sequence) - 12, dtype=torch.long)])
        alone = model(
            input_ids=sequence[None],
            attention_mask=mask[None],
            pixel_values=batch["pixel_values"][start : start + rows[sample]],
            patch_grid=batch["patch_grid"][sample : sample + 1],
        )
        torch.testing.assert_close(outputs.mask_logits[row], alone.mask_logits[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            outputs.disease_logits[2 * row : 2 * row + 2], alone.disease_logits, atol=1e-4, rtol=1e-4
        )


@torch.no_grad()
def test_left_padding_and_neighbours_do_not_change_an_answer(model) -> None:
    batch = images(2)
    together = model.generate(
        **prompts(model, [[10, -1, 11, 12], [13, -2, 14]], 12), **batch, max_new_tokens=6, do_sample=False
    )
    first = {"pixel_values": batch["pixel_values"][:4], "patch_grid": batch["patch_grid"][:1]}
    alone = model.generate(**prompts(model, [[10, -1, 11, 12]], 9), **first, max_new_tokens=6, do_sample=False)
    assert torch.equal(together[0, 12:], alone[0, 9:])


@torch.no_grad()
def test_several_images_and_turns_and_the_mask_of_the_last_image_shown(model) -> None:
    batch = images(3)
    seg = model.config.seg_token_id
    inputs = prompts(model, [[10, -1, 11, seg, 12, -2, 13, seg, -3, 14, seg]], 27)
    outputs = model(**inputs, **batch)
    assert [tuple(mask.shape) for mask in outputs.mask_logits] == [(4, 64, 64), (2, 64, 128), (1, 64, 64)]
    generated = model.generate(**inputs, **batch, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    for ours, theirs in zip(generated.mask_logits, outputs.mask_logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_tower_runs_once_for_an_answer_with_a_mask(model) -> None:
    calls = []
    handle = model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    inputs = prompts(model, [[10, -1, 11]], 9)
    batch = {"pixel_values": images(1)["pixel_values"], "patch_grid": images(1)["patch_grid"]}
    model.generate(
        **inputs,
        **batch,
        max_new_tokens=6,
        return_dict_in_generate=True,
        logits_processor=forced(model, 9),
        do_sample=False,
    )
    handle.remove()
    assert len(calls) == 1


@torch.no_grad()
def test_precomputed_features_answer_like_pixels(model) -> None:
    inputs, batch = prompts(model, [[10, -1, 11]], 9), images(1)
    features = model.get_image_features(**batch)
    from_pixels = model.generate(**inputs, **batch, max_new_tokens=5, do_sample=False)
    from_features = model.generate(**inputs, vision_features=features, max_new_tokens=5, do_sample=False)
    assert torch.equal(from_pixels, from_features)


def test_an_assistant_that_cannot_see_is_refused(model) -> None:
    with pytest.raises(CTInstructError, match="cannot see"):
        model.generate(**prompts(model, [[10, -1]], 8), **images(1), assistant_model=model)
