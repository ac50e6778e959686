"""Encode once, ask many: the same answers as the plain API, with the tower run once."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ctinstruct_hf import CTInstructError, CTInstructForConditionalGeneration, CTInstructProcessor, Study
from ctinstruct_hf.data.templates import answer_diagnosis, answer_segmentation, ask_diagnosis, ask_segmentation
from ctinstruct_hf.inference.predict import Request, predict_study
from ctinstruct_hf.inference.study import load_model
from ctinstruct_hf.phantoms.tiny import tiny_config, tiny_processor


@pytest.fixture(scope="module", params=["one axis", "three axes, released positions"])
def model(request: pytest.FixtureRequest):
    torch.manual_seed(0)
    processor: CTInstructProcessor = tiny_processor()
    settings = tiny_config().to_dict()
    if request.param != "one axis":
        settings["text_config"]["model_type"] = "qwen2_vl_text"
        settings["text_config"]["rope_parameters"]["mrope_section"] = [4, 6, 6]
        settings |= {"answer_positions": "sequential", "image_token_order": "slices"}
    config = type(tiny_config())(**settings)
    config.text_config.vocab_size = len(processor.tokenizer)
    return CTInstructForConditionalGeneration(config).eval(), processor


@pytest.fixture
def scan() -> np.ndarray:
    return np.random.default_rng(0).integers(-1000, 1000, (40, 96, 80)).astype(np.int16)


def plain(model, scan: np.ndarray, question: str, answer: str = "") -> dict[str, torch.Tensor]:
    _network, processor = model
    messages = [{"role": "user", "content": [{"type": "image", "image": scan}, {"type": "text", "text": question}]}]
    batch = processor.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=True)
    if answer:
        more = processor.tokenizer(answer, add_special_tokens=False, return_tensors="pt")
        batch["input_ids"] = torch.cat([batch["input_ids"], more["input_ids"]], dim=1)
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    return dict(batch)


@torch.no_grad()
def test_answers_masks_and_probabilities_equal_the_plain_api(model, scan: np.ndarray) -> None:
    network, processor = model
    calls: list[int] = []
    study = Study.open(scan, model, spacing=(2, 1, 1))
    handle = network.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    answers = [study.ask(question, max_new_tokens=8) for question in ("What is seen?", "Is there a nodule?")]
    masks = study.segment(["liver", "spleen"])
    probabilities = study.diagnose("phantom")
    handle.remove()
    assert len(calls) == 1
    for question, answer in zip(("What is seen?", "Is there a nodule?"), answers, strict=True):
        batch = plain(model, scan, question)
        new = network.generate(**batch, max_new_tokens=8, do_sample=False)[0, batch["input_ids"].shape[1] :]
        assert answer == processor.write_out(processor.tokenizer.decode(new))
    for name, mask in masks.items():
        outputs = network(**plain(model, scan, ask_segmentation([name]), answer_segmentation([name])))
        expected = processor.post_process_segmentation(outputs, study.volume)[0]
        assert (mask != expected).mean() < 1e-3
    names = network.config.disease_lists["phantom"]
    outputs = network(**plain(model, scan, ask_diagnosis(names), answer_diagnosis(names)))
    expected = processor.post_process_diagnosis(outputs, names)
    assert probabilities == pytest.approx(expected, abs=1e-4)


def test_questions_in_a_batch_are_answered_as_if_alone(model, scan: np.ndarray) -> None:
    network, processor = copy.deepcopy(model[0]), model[1]
    for weights in network.model.language_model.parameters():  # so that the answers differ
        weights.data.mul_(4)
    model = network, processor
    calls: list[int] = []
    handle = network.model.language_model.register_forward_hook(lambda *_: calls.append(1))
    study = Study.open(scan, model)
    questions = ["What is seen?", "Is there a pleural effusion on the right side, and how large is it?", "Where?"]
    together = study.ask_many(questions, max_new_tokens=12)
    in_a_batch = len(calls)
    alone = [Study.open(scan, model).ask(question, max_new_tokens=12) for question in questions]
    handle.remove()
    assert together == alone
    assert len(set(together)) > 1
    assert in_a_batch * 2 < len(calls) - in_a_batch
    assert [question for question, _ in study.results.answers] == questions
    with_masks = study.ask_many(questions[:2], max_new_tokens=6, num_beams=2)
    assert [str(one) for one in with_masks] == [
        str(study.ask(question, max_new_tokens=6, num_beams=2)) for question in questions[:2]
    ]


@pytest.mark.parametrize(
    ("weight", "told"),
    [
        (
            "model.vision_tower.encoder.stem.conv.weight",
            "The vision tower gives NaN or infinity: the weight model.vision",
        ),
        ("model.language_model.layers.1.mlp.up_proj.weight", "The language model gives NaN or infinity: the weight"),
    ],
)
def test_weights_that_are_no_numbers_are_named(model, scan: np.ndarray, weight: str, told: str) -> None:
    network = copy.deepcopy(model[0])
    network.get_parameter(weight).data.fill_(float("nan"))
    with pytest.raises(CTInstructError, match=told):
        Study.open(scan, (network, model[1])).ask("What is seen?")


def test_choices_come_from_the_options(model, scan: np.ndarray) -> None:
    study = Study.open(scan, model)
    assert study.choose("Which organ is largest?", ["liver", "spleen", "heart"]) in ("liver", "spleen", "heart")
    with pytest.raises(CTInstructError, match="2 to 26"):
        study.choose("Which?", ["one"])


def test_a_disease_without_a_head_is_refused(model, scan: np.ndarray) -> None:
    study = Study.open(scan, model)
    assert set(study.diagnose(["emphysema", "cardiomegaly"])) == {"emphysema", "cardiomegaly"}
    with pytest.raises(CTInstructError, match="no head for gout"):
        study.diagnose(["gout"])


def test_two_scans_of_one_patient_in_one_prompt(model, scan: np.ndarray) -> None:
    study = Study.open([scan, scan[:20]], model, spacing=(2, 1, 1))
    assert isinstance(study.ask("What has changed?", max_new_tokens=4), str)
    assert study.segment("liver").shape == (20, 96, 80)  # of the last scan


def test_the_processor_names_diseases_and_writes_answers_out(model) -> None:
    network, processor = model
    prompt = "Give probabilistic predictions for the presence of calcification and bronchiectasis."
    ids = processor(text=prompt)["disease_ids"]
    assert [network.config.disease_names[index] for index in ids.tolist()] == ["calcification", "bronchiectasis"]
    assert "disease_ids" not in processor(text="Give predictions for the presence of gout.")
    text = answer_diagnosis(["calcification", "bronchiectasis"])
    assert processor.write_out(text + "<|im_end|>", [0.9, 0.2]) == "calcification 0.90, bronchiectasis 0.20"


def test_mixed_images_and_the_number_of_their_tokens(model, scan: np.ndarray) -> None:
    _, processor = model
    text = "<|vision_start|><|image_pad|><|vision_end|> and <|vision_start|><|image_pad|><|vision_end|>"
    batch = processor(images=[scan, scan[0]], text=text, spacing=(2, 1, 1))
    rows = batch["patch_grid"].prod(-1)
    assert int((batch["input_ids"] == processor.image_token_id).sum()) == int(rows.sum()) == len(batch["pixel_values"])
    assert batch["patch_grid"][1, 3] == 1
    with pytest.raises(CTInstructError, match="one each is needed"):
        processor(images=[scan], text=text, spacing=(2, 1, 1))


@torch.no_grad()
def test_a_2d_image_a_small_and_a_large_volume_answer_in_a_batch_as_alone(model) -> None:
    """One call with all three gives, for each, the logits it gets alone."""
    network, processor = model
    rng = np.random.default_rng(1)
    scans = [rng.integers(-1000, 1000, shape).astype(np.int16) for shape in ((1, 90, 70), (20, 64, 64), (70, 160, 128))]
    conversations = [[{"role": "user", "content": [{"type": "image", "image": scan}, {"type": "text", "text": "What is seen?"}]}] for scan in scans]  # fmt: skip
    together = processor.apply_chat_template(conversations, tokenize=True, return_dict=True, add_generation_prompt=True)
    logits = network(**together).logits
    for row, conversation in enumerate(conversations):
        alone = processor.apply_chat_template(
            [conversation], tokenize=True, return_dict=True, add_generation_prompt=True
        )
        length = alone["input_ids"].shape[1]
        torch.testing.assert_close(logits[row, -length:], network(**alone).logits[0], atol=1e-4, rtol=1e-4)


def test_models_are_loaded_once(untrained: Path) -> None:
    assert load_model(str(untrained))[0] is load_model(str(untrained))[0]


def test_a_request_for_a_mask_among_the_questions_is_written_too(small_scan: Path, tmp_path: Path) -> None:
    predict_study(small_scan, tmp_path / "out", Request(questions=["Segment the LIVER"], structures=["liver"]))
    findings = json.loads((tmp_path / "out" / "findings.json").read_text())
    asked, named = findings["segmentation"]["Segment the LIVER"], findings["segmentation"]["liver"]
    assert asked["voxels"] == named["voxels"]
    assert (tmp_path / "out" / asked["file"]).exists()
    assert asked["file"] != named["file"]
