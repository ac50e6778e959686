"""A small byte-level BPE tokenizer in the manner of Qwen2's, learned from the words of phantoms and of CT findings."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ..data import templates
from ..modeling.configuration_ctinstruct import CT_RATE_DISEASES, RAD_CHESTCT_DISEASES
from .imagined import imagine
from .structures import FINDINGS, ORGANS, UNIONS
from .wording import write_questions, write_report

# in the order of their ids, which CTInstructConfig's defaults name
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<SEG>",
    "<disease_confidence>",
)


def corpus(count: int = 3000) -> Iterator[str]:
    """Reports, questions, instructions and their answers about made-up findings, and the words of the chat template."""
    names = [*ORGANS, *UNIONS, *FINDINGS, *CT_RATE_DISEASES, *RAD_CHESTCT_DISEASES]
    yield from names
    for options in (templates.REPORT, templates.CAPTION):
        yield from options
    yield from ("system", "user", "assistant")
    for seed in range(count):
        rng = np.random.default_rng([7, seed])
        labels, found, phase = imagine(rng)
        yield write_report(rng, labels, found, phase)
        for question in write_questions(rng, labels, found, ORGANS, phase):
            choices = question["choices"]
            asked = str(question["question"])
            yield templates.ask_choice(asked, choices, rng) if choices else asked
            yield templates.answer_choice(choices, str(question["answer"])) if choices else str(question["answer"])
        chosen = [names[int(index)] for index in rng.integers(len(names), size=3)]
        yield templates.ask_segmentation(chosen[:1], rng)
        yield templates.ask_segmentation(chosen, rng)
        yield templates.ask_diagnosis(chosen, rng)
        yield templates.answer_segmentation(chosen)
        asked, present = FINDINGS[int(rng.integers(len(FINDINGS)))], bool(rng.integers(2))
        yield from templates.ask_presence(templates.with_article(asked), asked, present, rng)
        yield templates.ask_choice(templates.WHICH_ALL[int(rng.integers(2))], FINDINGS[:2], rng)
        yield templates.weigh_choices(FINDINGS, [value == 1 for value in labels.values()], [])


@functools.cache
def _trained(vocabulary_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    specials = [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def train_tokenizer(vocabulary_size: int = 2048) -> PreTrainedTokenizerFast:
    """The tokenizer of the `tiny` preset; the same every time."""
    return PreTrainedTokenizerFast(  # it copies
        tokenizer_object=_trained(vocabulary_size),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[token for token in SPECIAL_TOKENS if token not in ("<|im_end|>", "<|endoftext|>")],
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
