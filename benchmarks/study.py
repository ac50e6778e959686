"""Encode once, ask many: a `Study` against the same calls made one by one through the plain API.

    python benchmarks/study.py [--quick] [--check] [--runs 3]

Ten questions, a report and five masks about one scan (64 image tokens with the bundled model). The plain side reads the file once,
then prepares, encodes and generates for every call, as anyone does with `AutoProcessor` and `AutoModel…`. Greedy decoding on
both sides; their answers and masks are compared.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from common import alternate, arguments, header, ratio, table, write_figures

from ctinstruct_hf import Study
from ctinstruct_hf.data.templates import REPORT, answer_segmentation, ask_segmentation
from ctinstruct_hf.inference.study import load_model
from ctinstruct_hf.phantoms import make_phantom

QUESTIONS = [
    "Is there a pleural effusion?",
    "Is there a lung nodule?",
    "How many lung nodules are there?",
    "On which side is the effusion?",
    "Is the heart enlarged?",
    "Is there emphysema?",
    "Is there a kidney stone?",
    "What is seen in the liver?",
    "Which contrast phase is this?",
    "Is there a hiatal hernia?",
]
STRUCTURES = ["liver", "spleen", "right lung", "left kidney", "heart"]


def ask_study(model: Any, volume: Any, words: int) -> tuple[list[str], list[np.ndarray]]:
    """Everything by one `Study`."""
    study = Study(volume, *model)
    answers = [str(answer) for answer in study.ask_many(QUESTIONS, max_new_tokens=words)]
    answers.append(study.report(max_new_tokens=4 * words))
    return answers, list(study.segment(STRUCTURES).values())


@torch.inference_mode()
def ask_plainly(model: Any, volume: Any, words: int) -> tuple[list[str], list[np.ndarray]]:
    """The same, each call from the scan on."""
    network, processor = model

    def batch_of(question: str, answer: str = "") -> dict[str, torch.Tensor]:
        content = [{"type": "image", "image": volume}, {"type": "text", "text": question}]
        batch = dict(
            processor.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=True, return_dict=True, add_generation_prompt=True
            )
        )
        if answer:
            more = processor.tokenizer(answer, add_special_tokens=False, return_tensors="pt")["input_ids"]
            batch["input_ids"] = torch.cat([batch["input_ids"], more], dim=1)
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        return batch

    answers = []
    for question, most in [*((one, words) for one in QUESTIONS), (REPORT[0], 4 * words)]:
        batch = batch_of(question)
        new = network.generate(**batch, max_new_tokens=most, do_sample=False)[0, batch["input_ids"].shape[1] :]
        answers.append(processor.write_out(processor.tokenizer.decode(new)))
    masks = []
    for name in STRUCTURES:
        answer = answer_segmentation([name], network.config.names_masks)
        outputs = network(**batch_of(ask_segmentation([name]), answer))
        masks.append(processor.post_process_segmentation(outputs, volume)[0])
    return answers, masks


def main() -> int:
    options = arguments(__doc__, runs=3)
    print(header("torch", "transformers", "ctinstruct-hf"))
    network, processor = load_model(None, "cpu")
    depth = 2 if options.quick else 19
    processor.image_processor.max_patches = depth
    words = 4 if options.quick else 24
    volume = make_phantom(5, (32 * depth, 96, 96), (320 / (32 * depth), 4.0, 4.0)).volume
    model = network, processor
    tokens = len(Study(volume, *model).batch["slice_mask"])
    ours, theirs = ask_study(model, volume, words), ask_plainly(model, volume, words)
    same = ours[0] == theirs[0]
    differ = max(float((one != other).mean()) for one, other in zip(ours[1], theirs[1], strict=True))
    runs = 1 if options.quick else options.runs
    pair = alternate(
        f"10 questions, a report, 5 masks ({tokens} tokens)",
        lambda: ask_study(model, volume, words),
        lambda: ask_plainly(model, volume, words),
        runs,
        None if options.quick else 5.0,
    )
    print(table([pair]))
    print(f"answers {'identical' if same else 'DIFFERENT'}; voxels of a mask that differ: at most {differ:.1e}")
    alike = "answers identical" if same else "answers DIFFERENT"
    write_figures(options, study=f"{ratio(pair)}, {alike}, at most {differ:.0e} of a mask's voxels differ")
    return 1 if options.check and (not same or differ > 1e-3 or pair.missed) else 0


if __name__ == "__main__":
    sys.exit(main())
