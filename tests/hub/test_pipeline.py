"""The pipeline of Transformers, with whole scans by their paths."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from repository import ROOT
from scans import asymmetric, dicom_series
from transformers import pipeline

from ctinstruct_hf import CTInstructForConditionalGeneration, CTInstructProcessor


@pytest.fixture(scope="module")
def answer(untrained: Path) -> Any:
    return pipeline("image-text-to-text", model=str(untrained), trust_remote_code=True)


def chat(question: str, *scans: Path) -> list[dict[str, Any]]:
    images = [{"type": "image", "path": str(scan)} for scan in scans]
    return [{"role": "user", "content": [*images, {"type": "text", "text": question}]}]


def plain(folder: Path, messages: list[dict[str, Any]]) -> str:
    processor = CTInstructProcessor.from_pretrained(folder)
    model = CTInstructForConditionalGeneration.from_pretrained(folder).eval()
    batch = processor.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=True)
    new = model.generate(**batch, max_new_tokens=8, do_sample=False)[0, batch["input_ids"].shape[1] :]
    return processor.tokenizer.decode(new, skip_special_tokens=True)


def test_scans_by_path_are_answered_as_by_the_model_itself(
    answer: Any, untrained: Path, small_scan: Path, tmp_path: Path
) -> None:
    series = dicom_series(tmp_path / "series", asymmetric((6, 32, 32)))
    options = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    for scans in ([small_scan], [series], [small_scan, series]):
        messages = chat("What is seen?", *scans)
        assert answer(text=messages, **options)[0]["generated_text"] == plain(untrained, messages)
    several = answer(text=[chat("What is seen?", small_scan), chat("Is there a nodule?", series)], **options)
    assert len(several) == 2


def test_the_example_of_two_studies_runs(untrained: Path, small_scan: Path) -> None:
    sys.path.insert(0, str(ROOT / "examples"))
    from what_changed import ask_what_changed

    words = ask_what_changed(str(untrained), str(small_scan), str(small_scan))
    assert isinstance(words, str)
    assert words


def test_a_bad_path_is_named(answer: Any) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        answer(text=chat("What is seen?", Path("/nowhere.nii.gz")), max_new_tokens=2)
